"""Local attention: the dense one under a band, whole and with a cache."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax import sampling
from gen_jax.models.autoregressive.losses import AutoregressiveSampler
from gen_jax.nn.attention import local_attention
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork

CONFIG = TransformerConfig(
    vocabulary=11, context=90, window=6, layers=2, width=16, heads=2, position="both"
)


def random_params(config):
    params = TokenNetwork(config).init(jax.random.key(0))
    return jax.tree.map(lambda leaf: 6 * leaf, params)


@pytest.mark.parametrize("window", [1, 5, 8, 23, 40])
def test_it_is_dense_attention_under_a_band(window):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 23, 4, 8))
    k, v = (jax.random.normal(key, (2, 23, 2, 8)) for key in keys[1:])
    place = np.arange(23)
    seen = (place <= place[:, None]) & (place > place[:, None] - window)
    exists = np.ones((2, 23), bool)
    exists[1, 3:5] = False
    mask = jnp.asarray(seen & exists[:, None, None])
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask)
    got = jax.jit(local_attention, static_argnums=3)(q, k, v, window, mask=exists)
    rows = mask.any(-1)[:, 0]  # a query whose keys are all hidden has no meaning
    np.testing.assert_allclose(got[rows], expected[rows], atol=1e-5)


def test_what_is_cached_is_what_is_not():
    network, params = TokenNetwork(CONFIG), random_params(CONFIG)
    tokens = jax.random.randint(jax.random.key(1), (2, 80), 0, 11)
    whole = np.asarray(jax.jit(network.__call__)(params, tokens))
    assert np.abs(whole - whole[:, :1]).max() > 0.5
    prepared = network.prepare(params)
    extend = jax.jit(network.extend)
    hidden, caches = network.extend(prepared, tokens[:, :20], network.make_caches(2, 90), 0)
    np.testing.assert_allclose(hidden @ prepared.head, whole[:, :20], atol=1e-4)
    for place in (*range(20, 40), 40, 43, 46):
        size = 1 if place < 40 else 3
        column = place if place < 43 else np.array([place, place])  # of all, or of each
        part = tokens[:, place : place + size]
        hidden, caches = extend(prepared, part, caches, column)
        np.testing.assert_allclose(
            hidden @ prepared.head, whole[:, place : place + size], atol=1e-4
        )


def test_an_input_before_the_window_of_all_layers_is_not_seen():
    network, params = TokenNetwork(CONFIG), random_params(CONFIG)
    tokens = np.zeros((1, 40), np.int32)
    other = tokens.copy()
    other[0, 10] = 5
    apply = jax.jit(network.__call__)
    changed = np.abs(np.asarray(apply(params, tokens) - apply(params, other))).max(-1)[0] > 0
    assert changed[10:21].all()  # two layers reach 2 x 5 places back
    assert not changed[:10].any()
    assert not changed[21:].any()


def test_the_caches_are_written_in_place():
    network = TokenNetwork(dataclasses.replace(CONFIG, context=300))
    sampler = AutoregressiveSampler(network, 1, 300)
    prepared = sampler.prepare(random_params(network.config))
    cond = {"tokens": np.zeros((3, 1), np.int32)}
    program = sampling.compile_generate(sampler, prepared, sampling.sample_keys(0, 0, 3), cond)
    loop, entry = program.as_text().split("\nENTRY ")  # which may copy the zeros of the start
    assert re.search(r"= f32\[3,2,8,300\]\S* fusion\(", loop)
    assert not re.findall(r"= f32\[3,2,(?:8,300|300,8)\]\S* copy\(", loop)
    assert " while(" in entry


def test_it_is_for_causal_networks():
    with pytest.raises(ValueError, match="window is for causal networks"):
        dataclasses.replace(CONFIG, causal=False)
