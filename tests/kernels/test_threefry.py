"""Threefry: the numbers of jax.random to the bit, and the draws that follow from them.

These programs are compiled as users compile them, with all optimisations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels.mask_scores.cases import example
from kernels.sample_token import threefry
from kernels.sample_token.cases import rows
from kernels.sample_token.threefry import gumbel, normal_of, threefry2x32


@jax.jit
def categorical(keys, logits):
    return jax.vmap(jax.random.categorical)(keys, logits)


@pytest.mark.parametrize("vocabulary", [1, 7, 1000])
def test_noise_is_that_of_jax_to_the_bit(vocabulary):
    keys = jax.random.split(jax.random.key(vocabulary), 33)
    draw = jax.jit(jax.vmap(lambda key: jax.random.gumbel(key, (vocabulary,))))
    expected = draw(keys)
    if vocabulary == 7:  # outside of a program as well
        np.testing.assert_array_equal(gumbel(keys, jnp.arange(vocabulary)), expected)
    some = np.random.default_rng(0).integers(vocabulary, size=(33, 5))
    both = jax.jit(lambda *ids: [gumbel(keys, places) for places in ids])
    whole, part = both(jnp.arange(vocabulary), jnp.asarray(some))
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(part, np.take_along_axis(np.asarray(expected), some, axis=1))


def test_normal_noise_is_that_of_jax():
    """Its bits are the same, and of all uniform numbers none is further than 3 ulp away."""
    key = jax.random.key(5)
    words = tuple(jax.random.key_data(key))
    shape = 7, 11, 13
    ids = jnp.arange(7 * 11 * 13)
    uniform = jax.jit(lambda: threefry._uniform_of(words, ids))()
    np.testing.assert_array_equal(uniform, jax.random.uniform(key, shape).ravel())
    normal = jax.jit(lambda: normal_of(words, ids))()
    expected = jax.jit(lambda: jax.random.normal(key, shape))()
    np.testing.assert_allclose(normal, expected.ravel(), rtol=6e-7)

    every = jnp.arange(2**23, dtype=jnp.float32) * jnp.float32(2**-22) + threefry._LOWEST
    inverse = np.asarray(jax.jit(threefry._inverse_erf)(every))
    exact = np.asarray(jax.jit(jax.lax.erf_inv)(every))
    assert np.array_equal(np.sign(inverse), np.sign(exact))
    apart = np.abs(inverse.view(np.int32).astype(np.int64) - exact.view(np.int32))
    assert apart.max() <= 3


def test_threefry_has_the_known_answers():
    # Of Random123, for 20 rounds: zeros, ones, digits of pi.
    zero, ones = jnp.uint32(0), jnp.uint32(0xFFFFFFFF)
    pi = [jnp.uint32(word) for word in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    for key, counter, answer in (
        ((zero, zero), (zero, zero), (0x6B200159, 0x99BA4EFE)),
        ((ones, ones), (ones, ones), (0x1CB996FC, 0xBB002BE7)),
        ((pi[2], pi[3]), (pi[0], pi[1]), (0xC4923A9C, 0x483DF7A0)),
    ):
        assert tuple(int(word) for word in threefry2x32(key, *counter)) == answer


@pytest.mark.parametrize("vocabulary", [2, 1000])
def test_without_filters_it_is_categorical_to_the_bit(vocabulary):
    logits, keys = rows(vocabulary), jax.random.split(jax.random.key(3), 192)
    expected = categorical(keys, logits)
    drawn = jax.jit(kernels.sample_logits)(logits, keys)
    np.testing.assert_array_equal(drawn, expected)
    assert drawn.dtype == np.int32


def test_tokens_at_masked_positions_are_categorical_to_the_bit():
    logits, tokens, masked, keys = example(33)
    drawn, _, _ = jax.jit(kernels.mask_scores)(logits, tokens, masked, keys)
    np.testing.assert_array_equal(drawn, np.where(masked, categorical(keys, logits), tokens))
