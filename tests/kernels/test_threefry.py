"""Threefry: the numbers of jax.random to the bit, and the draws that follow from them.

These programs are compiled as users compile them, with all optimisations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import threefry
from kernels.mask_scores.cases import example
from kernels.sample_token.cases import rows
from kernels.threefry import (
    fold_in_each,
    gumbel,
    gumbel_each,
    normal_each,
    normal_of,
    split_each,
    threefry2x32,
    uniform_each,
)


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


def _of_each(keys, per_key):
    """What `per_key` makes of each of the keys."""
    drawn = np.asarray(jax.jit(jax.vmap(per_key))(keys.ravel()))
    return drawn.reshape(keys.shape + drawn.shape[1:])


@pytest.mark.parametrize("other", ["", "rbg", "not partitionable"])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_draws_of_each_key_are_those_of_jax_to_the_bit(batch, other):
    with jax.threefry_partitionable(other != "not partitionable"):
        root = jax.random.key(9, impl=other if other == "rbg" else None)
        keys = jax.random.split(root, batch) if batch else root
        for shape in (), (7,), (3, 1, 4), (0,):
            for ours, theirs in (
                (uniform_each, jax.random.uniform),
                (normal_each, jax.random.normal),
                (gumbel_each, jax.random.gumbel),
            ):
                drawn = ours(keys, shape)
                expected = _of_each(keys, lambda key, draw=theirs, shape=shape: draw(key, shape))
                assert drawn.dtype == np.float32
                np.testing.assert_array_equal(drawn, expected)
        for count in 1, 3:
            expected = _of_each(
                keys, lambda key, count=count: jax.random.key_data(jax.random.split(key, count))
            )
            parts = split_each(keys, count)
            assert len(parts) == count
            assert all(part.dtype == keys.dtype for part in parts)
            for i, part in enumerate(parts):
                np.testing.assert_array_equal(
                    jax.random.key_data(part), expected[(slice(None),) * len(batch) + (i,)]
                )


@pytest.mark.parametrize("other", ["", "rbg", "not partitionable"])
def test_folding_in_is_that_of_jax_to_the_bit(other):
    with jax.threefry_partitionable(other != "not partitionable"):
        root = jax.random.key(9, impl=other if other == "rbg" else None)
        keys = jax.random.split(root, 4)

        def check(given, data, expected):
            folded = fold_in_each(given, data)
            assert folded.dtype == keys.dtype
            data_of = jax.random.key_data
            np.testing.assert_array_equal(data_of(folded), data_of(jnp.stack(expected)))

        fold_in = jax.random.fold_in
        for number in 0, 7, 2**32 - 1:
            check(keys, number, [fold_in(key, number) for key in keys])
        items = np.array([0, 3, 2**31, 2**32 - 1], np.uint32)
        check(root, items, [fold_in(root, item) for item in items])
        pairs = [fold_in(key, item) for key, item in zip(keys, items, strict=True)]
        check(keys, items, pairs)
        several = fold_in_each(keys, items[:, None])
        assert several.shape == (4, 4)
        assert several[2, 1] == fold_in(keys[1], items[2])
        for wrong in -1, 2**32:
            with pytest.raises(OverflowError):
                fold_in_each(keys, wrong)


@pytest.mark.parametrize("draw", [uniform_each, normal_each, gumbel_each, split_each])
def test_a_key_that_is_used_twice_is_found(draw):
    keys = jax.random.split(jax.random.key(1), 3)
    given = 2 if draw is split_each else (2,)
    twice = jax.jit(lambda keys: (draw(keys, given), uniform_each(keys)))
    twice(keys)
    with (
        jax.debug_key_reuse(True),
        pytest.raises(jax.errors.KeyReuseError),
    ):
        twice(keys)


def test_keys_have_no_more_numbers_than_counters():
    with pytest.raises(ValueError, match="no counters of 32 bits for the 4294967297 numbers"):
        jax.eval_shape(lambda key: uniform_each(key, (2**32 + 1,)), jax.random.key(0))


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
