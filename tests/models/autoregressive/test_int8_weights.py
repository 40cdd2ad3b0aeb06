"""Decoding with weights in int8: it is the network of the quantised weights, and of no others."""

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.models.autoregressive import (
    AutoregressiveModel,
    AutoregressiveSampler,
    SamplingOptions,
    SpeculativeSampler,
    make_prompts,
)
from gen_jax.models.next_scale import NextScaleModel, NextScaleSampler
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from random_networks import LLAMA_FORM, random_params

GPT = TransformerConfig(vocabulary=9, context=16, layers=1, width=16, heads=2, extra_inputs=1)
LLAMA = dataclasses.replace(GPT, heads=4, kv_heads=2, extra_inputs=0, **LLAMA_FORM)
FORMS = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
INT8 = SamplingOptions(temperature=0, weights="int8")
PROMPTS = [[1, 2, 3, 4], [5], [8, 0]]


def model_of(config):
    return AutoregressiveModel(TokenNetwork(config))


def as_int8_holds_them(params, vocabulary):
    """Parameters whose matrices are what is left of them, and the head [D, V]."""

    def left(matrix):  # [D, V], of which each column has a scale
        values, scale = kernels.quantize(jnp.asarray(matrix).T)
        return (values * scale[:, None]).T

    flat = flax.traverse_util.flatten_dict(params)
    head = left(flat.get(("head",), flat[("token",)][:vocabulary].T))
    flat = {path: left(leaf) if path[-1] == "kernel" else leaf for path, leaf in flat.items()}
    return flax.traverse_util.unflatten_dict(flat), head


@FORMS
def test_the_network_is_that_of_the_quantised_weights(config):
    network, params = TokenNetwork(config), random_params(config)
    tokens = np.random.default_rng(0).integers(0, 9, (3, 10)).astype(np.int32)
    prepared, hidden = jax.jit(network.prepare_int8)(params), jax.jit(network.hidden)
    got = jax.jit(network.evaluate)(prepared, tokens)
    left, head = as_int8_holds_them(params, 9)
    np.testing.assert_allclose(got, hidden(left, tokens) @ head, atol=2e-5)
    exact = hidden(params, tokens) @ params.get("head", params["token"][:9].T)
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 0.05
    # Every matrix is there once, as int8; what is looked up stays.
    kinds = {path[-1]: leaf.dtype for path, leaf in flatten(prepared.params)}
    assert not {"kernel", "head"} & kinds.keys()
    matrices = [leaf for _, leaf in flatten(prepared.int8)] + [prepared.head]
    assert len(matrices) == 4 + 1
    assert {values.dtype for values, _ in matrices} == {jnp.dtype(jnp.int8)}


def flatten(tree):
    return flax.traverse_util.flatten_dict(tree).items()


def draw(sampler, params, prompts=PROMPTS):
    keys, cond = sampling.sample_keys(0, 0, len(prompts)), make_prompts(sampler.model, prompts)
    return np.asarray(sampling.generate(sampler, params, keys, cond))


def test_samples_are_the_same_with_a_draft_and_without_one():
    model, params = model_of(LLAMA), random_params(LLAMA)
    cached = draw(AutoregressiveSampler(model, 4, 8, INT8), params)
    drafted = SpeculativeSampler(model, model, 4, 8, 2, INT8)
    np.testing.assert_array_equal(cached, draw(drafted, {"target": params, "draft": params}))


def test_what_is_refused():
    source = dataclasses.replace(LLAMA, memory=True)
    with pytest.raises(ValueError, match="int8 are for models without a source: leave them as own"):
        AutoregressiveSampler(model_of(source), 4, 8, INT8)
    scales = dataclasses.replace(GPT, groups=(1, 4), context=5, causal=True)
    model = NextScaleModel(TokenNetwork(scales), (1, 2))
    with pytest.raises(ValueError, match="int8 are for one token at a time: leave them as own"):
        NextScaleSampler(model, INT8)


@pytest.mark.parametrize("drafts", [False, True])
def test_parameters_that_are_not_finite_are_named(drafts):
    model, params = model_of(LLAMA), random_params(LLAMA)
    sampler = AutoregressiveSampler(model, 4, 8, INT8)
    params["block_0"]["attention"]["out"]["kernel"] = np.full((16, 16), np.inf, np.float32)
    if drafts:
        sampler = SpeculativeSampler(model, model, 4, 8, 2, INT8)
        params = {"target": params, "draft": random_params(LLAMA)}
    message = "block_0.attention.out.kernel is not finite: it has no weights in int8"
    with pytest.raises(ValueError, match=message):
        sampler.check(params, Condition(prompt=np.zeros((1, 4), np.int32)))
