"""decode_attention: what is read of the cache and what is not. Values are in its cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import dispatch
from kernels.decode_attention.buckets import buckets
from kernels.decode_attention.cases import LENGTH, definition, example

ENTRIES = dispatch.operations()["decode_attention"].implementations()
NAMES = tuple(name for name, entry in ENTRIES.items() if entry.only_on is None)


@functools.cache
def program(implementation):
    return jax.jit(functools.partial(kernels.decode_attention, implementation=implementation))


def test_sizes_of_the_buckets():
    assert buckets(5) == (5,)
    assert buckets(64) == (64,)
    assert buckets(65) == (64, 65)
    assert buckets(97) == (64, 96, 97)
    assert buckets(1024) == (64, 96, 128, 192, 256, 384, 512, 768, 1024)
    for length in range(1, 600):
        sizes = np.array(buckets(length))
        assert sizes[-1] == length
        assert (np.diff(sizes) > 0).all()
        used = np.arange(1, length + 1)
        read = sizes[np.searchsorted(sizes, used)]
        assert (read <= np.maximum(1.5 * used, 64)).all()


@pytest.mark.parametrize("name", NAMES)
def test_later_and_earlier_columns_do_not_matter(name):
    q, k, v, cache = example(0)
    first = np.array([0, 4], np.int32)
    for column in (5, 63, 64, 80):
        rows = np.arange(LENGTH)
        hidden = (rows > column) | (rows < first[:, None])  # [B, T]
        poisoned = kernels.KVCache(
            np.where(hidden[:, None, None], np.float32(1e4), cache.keys),
            np.where(hidden[:, None, :, None], np.float32(1e4), cache.values),
        )
        clean, _ = program(name)(q, k, v, cache, np.int32(column), first)
        out, _ = program(name)(q, k, v, poisoned, np.int32(column), first)
        np.testing.assert_array_equal(out, clean)


@pytest.mark.parametrize(("column", "bucket"), [(0, 64), (63, 64), (64, 96), (95, 96)])
@pytest.mark.parametrize("ragged", [False, True])
def test_columns_beyond_the_bucket_are_not_read(column, bucket, ragged):
    q, k, v, cache = example(0)
    beyond = np.arange(LENGTH) >= bucket
    poisoned = kernels.KVCache(
        np.where(beyond, np.float32(np.nan), cache.keys),
        np.where(beyond[:, None], np.float32(np.nan), cache.values),
    )
    column = np.array([column, column // 2], np.int32) if ragged else np.int32(column)
    clean, _ = program("reference")(q, k, v, cache, column)
    out, grown = program("buckets")(q, k, v, poisoned, column)
    np.testing.assert_allclose(out, clean, atol=1e-6)
    assert np.isnan(grown.values).any(axis=(0, 1, 3)).sum() == LENGTH - bucket
    # The reference does read them: weights of zero times NaN.
    out, _ = program("reference")(q, k, v, poisoned, column)
    assert np.isnan(out).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_a_column_stays_finite(name):
    q, k, v, cache = example(0, new=3)
    first = np.array([7, 0], np.int32)
    for column in (0, 4, 6):
        out, _ = program(name)(q, k, v, cache, np.int32(column), first)
        assert np.isfinite(out).all()
        rest = kernels.KVCache(*(a[1:] for a in cache))
        expected, _ = definition(q[1:], k[1:], v[1:], rest, column)
        np.testing.assert_allclose(out[1:], expected, atol=2e-5)


def test_one_at_a_time_is_all_at_once():
    q, k, v, _ = (np.asarray(a) if i < 3 else a for i, a in enumerate(example(0, new=70)))
    empty = kernels.make_kv_cache(2, 2, LENGTH, 8)
    whole, at_once = jax.jit(functools.partial(kernels.decode_attention, column=0))(q, k, v, empty)
    cache, outs = empty, []
    for column in range(70):
        one = slice(column, column + 1)
        out, cache = program("buckets")(q[:, one], k[:, one], v[:, one], cache, np.int32(column))
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, atol=1e-5)
    for one, other in zip(cache, at_once, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (np.asarray(cache.values)[:, :, 70:] == 0).all()


def test_a_cache_in_another_type():
    cache = kernels.make_kv_cache(2, 3, 5, 4, jnp.bfloat16)
    assert (cache.keys.shape, cache.values.shape) == ((2, 3, 4, 5), (2, 3, 5, 4))
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16


def test_what_it_refuses():
    q, k, v, cache = example(0, new=3)
    for column in (98, 100, -1):
        with pytest.raises(ValueError, match=r"3 new tokens at column .* cache of 100"):
            kernels.decode_attention(q, k, v, cache, column)
    jax.eval_shape(lambda: kernels.decode_attention(q, k, v, cache, 97))
    with pytest.raises(NotImplementedError, match="known: reference, buckets"):
        kernels.decode_attention(q, k, v, cache, 0, implementation="mosaic")


def test_a_cache_on_a_tpu_fills_registers(monkeypatch):
    assert kernels.make_kv_cache(1, 2, 130, 8).keys.shape[-1] == 130
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert kernels.make_kv_cache(1, 2, 130, 8).values.shape == (1, 2, 256, 8)
    assert kernels.make_kv_cache(1, 2, 256, 8).values.shape == (1, 2, 256, 8)
