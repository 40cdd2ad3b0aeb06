"""Local attention: the dense one under a band, whole and with a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax.nn.attention import local_attention
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from random_networks import random_params

CONFIG = TransformerConfig(
    vocabulary=11, context=90, window=6, layers=2, width=16, heads=2, position="both"
)
NETWORK = TokenNetwork(CONFIG)
apply = jax.jit(NETWORK.__call__)
extend = jax.jit(NETWORK.extend)


@pytest.mark.parametrize("window", [1, 5, 8, 23, 40])
def test_it_is_dense_attention_under_a_band(window):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 23, 4, 8))
    k, v = (jax.random.normal(key, (2, 23, 2, 8)) for key in keys[1:])
    place = np.arange(23)[None]
    seen = (place <= place.T) & (place > place.T - window)
    valid = np.ones((2, 23), bool)
    valid[1, 3:5] = False
    mask = jnp.asarray(seen[None, None] & valid[:, None, None])
    expected = jax.jit(jax.nn.dot_product_attention)(q, k, v, mask=mask)
    got = jax.jit(local_attention, static_argnums=3)(q, k, v, window, mask=valid)
    rows = mask.any(-1)[:, 0]  # a query whose keys are all hidden has no meaning
    np.testing.assert_allclose(got[rows], expected[rows], atol=1e-5)


def test_what_is_cached_is_what_is_not():
    params = random_params(CONFIG)
    tokens = np.random.default_rng(1).integers(0, 11, (2, 80)).astype(np.int32)
    whole = np.asarray(apply(params, tokens))
    assert np.abs(whole - whole[:, :1]).max() > 0.5
    prepared, caches = NETWORK.prepare(params), NETWORK.make_caches(2, 90)
    prefill = jax.jit(functools.partial(NETWORK.extend, column=0))
    hidden, caches = prefill(prepared, tokens[:, :20], caches)
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
    params = random_params(CONFIG)
    tokens = np.zeros((2, 80), np.int32)
    other = tokens.copy()
    other[0, 10] = 5
    changed = np.abs(np.asarray(apply(params, tokens) - apply(params, other))).max(-1)[0] > 0
    assert changed[10:21].all()  # two layers reach 2 x 5 places back
    assert not changed[:10].any()
    assert not changed[21:].any()


def test_it_is_for_causal_networks():
    with pytest.raises(ValueError, match="window is for causal networks"):
        dataclasses.replace(CONFIG, causal=False)
