"""Decoding with all blocks of a step in one kernel: the network, tokens and program of the loop."""

import collections
import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from gen_jax.condition import Condition
from gen_jax.models.autoregressive import (
    AutoregressiveModel,
    AutoregressiveSampler,
    SamplingOptions,
)
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from kernels import dispatch
from random_networks import LLAMA_FORM, random_params

GPT = TransformerConfig(
    vocabulary=9, context=128, layers=2, width=128, heads=4, mlp_dim=128, window=100
)


@pytest.fixture
def everywhere(monkeypatch):
    """Makes an implementation the default here too, interpreted, and no other kernel."""
    entries = dispatch.operations()["decode_layers"].implementations()
    used = collections.Counter()

    modes = contextlib.ExitStack()

    def make(name):
        def run(*arguments, **options):
            used[name] += 1
            return entries[name].run(*arguments, **options)

        entry = dataclasses.replace(
            entries[name], name="ours", run=run, default_on=dispatch.EVERYWHERE, only_on=None
        )
        monkeypatch.setitem(dispatch._REGISTRY["decode_layers"], "ours", entry)
        modes.enter_context(dispatch.leave_out("tpu"))
        modes.enter_context(pltpu.force_tpu_interpret_mode())
        return used

    with modes:
        yield make


@pytest.mark.parametrize(("name", "bias"), [("reference", True), ("tpu", False)])
def test_the_network_is_the_same(name, bias, everywhere):
    config = dataclasses.replace(GPT, bias=bias)
    network, params = TokenNetwork(config), random_params(config)
    tokens = np.array([[3], [8]], np.int32)
    column, first = jnp.asarray([120, 40]), jnp.asarray([90, 0])

    @functools.partial(jax.jit, static_argnums=0)
    def step(_, params):
        prepared, caches = network.prepare(params), network.make_caches(2, 128)
        before = np.random.default_rng(0).integers(0, 9, (2, 110)).astype(np.int32)
        _, caches = network.extend(prepared, before, caches, 0)
        return network.extend(prepared, tokens, caches, column, first)

    expected = step("as it was", params)
    used = everywhere(name)
    got = step("with ours", params)
    assert used == {name: 1}
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_tokens_of_the_loop_are_the_same(everywhere):
    """Caches are full after three tokens, and begun again from their last half."""
    config = dataclasses.replace(GPT, layers=1)
    model, params = AutoregressiveModel(TokenNetwork(config)), random_params(config)
    sampler = AutoregressiveSampler(model, 126, 6, SamplingOptions(top_k=5))
    prompt = np.random.default_rng(1).integers(0, 9, (1, 126)).astype(np.int32)
    keys = jax.random.split(jax.random.key(2), 1)

    @functools.partial(jax.jit, static_argnums=0)
    def draw(_, params):
        params = sampler.prepare(params)
        state = sampler.init(params, keys, Condition(prompt=prompt))
        state = jax.lax.fori_loop(0, 6, lambda i, state: sampler.step(params, state, i), state)
        return sampler.finish(params, state)

    expected = draw("as it was", params)
    used = everywhere("tpu")
    np.testing.assert_array_equal(draw("with ours", params), expected)
    assert used == {"tpu": 1}
    assert len(np.unique(expected)) > 2


@pytest.mark.parametrize(("batch", "expected"), [(2, {"decode_layers"}), (9, {"decode_attention"})])
def test_few_rows_are_one_kernel_on_a_tpu(batch, expected):
    network = TokenNetwork(GPT)
    prepared = jax.eval_shape(network.prepare, jax.eval_shape(network.init, jax.random.key(0)))
    caches = jax.eval_shape(lambda: network.make_caches(batch, 128))
    tokens, column = jnp.zeros((batch, 1), jnp.int32), jnp.int32(3)
    traced = jax.jit(network.extend).trace(prepared, tokens, caches, column)
    for platform, names in (("tpu", expected), ("cpu", set()), ("cuda", set())):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert set(re.findall(r'kernel_name = "(\w+)"', text)) == names, platform


@pytest.mark.parametrize(
    "other",
    [LLAMA_FORM, {"norm": "rms"}, {"kv_heads": 2}, {"head_width": 16}, {"memory": True}],
    ids=str,
)
def test_what_is_not_of_its_form_is_computed_as_before(other):
    network = TokenNetwork(dataclasses.replace(GPT, **other))
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.eval_shape(network.prepare, params).vectors is None
