"""decode_attention against softmax in float64, around the edges of buckets, and what it reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels.decode_attention import buckets

LENGTH = 100
EDGES = [0, 31, 62, 63, 64, 65, 94, 95, 96, 97, 99]


def example(batch=2, steps=1, heads=4, kv_heads=2, width=8, length=LENGTH, dtype=jnp.float32):
    """New queries, keys and values, and a cache without an empty column."""
    keys = jax.random.split(jax.random.key(steps * heads + kv_heads), 5)
    shapes = [(batch, steps, n, width) for n in (heads, kv_heads, kv_heads)]
    shapes += [(batch, kv_heads, width, length), (batch, kv_heads, length, width)]
    q, k, v, *cache = (
        2 * jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    return q, k, v, kernels.KVCache(*cache)


@functools.cache
def program(implementation):
    return jax.jit(functools.partial(kernels.decode_attention, implementation=implementation))


def definition(q, k, v, cache, column, first=None, window=LENGTH):
    """Each sample, head and query on its own, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    keys = np.array(cache.keys, np.float64).transpose(0, 1, 3, 2)
    values = np.array(cache.values, np.float64)
    batch, steps, heads, width = q.shape
    column = np.broadcast_to(column, batch)
    first = np.zeros(batch, int) if first is None else np.asarray(first)
    out = np.zeros(q.shape)
    for b in range(batch):
        for s in range(steps):
            keys[b, :, column[b] + s], values[b, :, column[b] + s] = k[b, s], v[b, s]
        for s in range(steps):
            own = column[b] + s
            seen = slice(max(first[b], own + 1 - window), own + 1)
            for h in range(heads):
                j = h // (heads // k.shape[2])
                scores = keys[b, j, seen] @ q[b, s, h] / np.sqrt(width)
                weights = np.exp(scores - scores.max())
                out[b, s, h] = weights / weights.sum() @ values[b, j, seen]
    return out, keys.transpose(0, 1, 3, 2), values


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


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_both_agree_with_the_definition_around_the_edges(steps, padded, ragged):
    q, k, v, cache = example(steps=steps)
    for edge in EDGES:
        column = min(edge, LENGTH - steps)
        columns = np.array([column, max(column - 40, 0)], np.int32) if ragged else np.int32(column)
        first = np.array([0, min(3, columns.min())], np.int32) if padded else None
        expected, keys, values = definition(q, k, v, cache, columns, first)
        for name in ("reference", "buckets"):
            out, grown = program(name)(q, k, v, cache, columns, first)
            np.testing.assert_allclose(out, expected, atol=2e-5, err_msg=f"{name} {column}")
            np.testing.assert_array_equal(grown.keys, keys.astype(np.float32))
            np.testing.assert_array_equal(grown.values, values.astype(np.float32))


@pytest.mark.parametrize(("steps", "window"), [(1, 1), (3, 20), (1, 99), (3, 200)])
def test_a_window_sees_its_own_column_and_those_just_before(steps, window):
    q, k, v, cache = example(steps=steps)
    for name in ("reference", "buckets"):
        call = functools.partial(kernels.decode_attention, window=window, implementation=name)
        call = jax.jit(call)
        for edge in EDGES:
            column, first = np.int32(min(edge, LENGTH - steps)), np.array([0, 3], np.int32)
            first = np.minimum(first, column)
            expected, *_ = definition(q, k, v, cache, column, first, window)
            out, _ = call(q, k, v, cache, column, first)
            np.testing.assert_allclose(out, expected, atol=2e-5, err_msg=f"{name} {column}")
            assert np.isfinite(out).all()


@pytest.mark.parametrize(("column", "steps"), [(0, 1), (0, 100), (63, 2)])
def test_a_python_column_is_a_prefill(column, steps):
    q, k, v, cache = example(steps=steps)
    expected, keys, values = definition(q, k, v, cache, column)
    for name in ("reference", "buckets", None):
        call = functools.partial(kernels.decode_attention, column=column, implementation=name)
        out, grown = jax.jit(call)(q, k, v, cache)
        np.testing.assert_allclose(out, expected, atol=2e-5)
        np.testing.assert_array_equal(grown.keys, keys.astype(np.float32))
        np.testing.assert_array_equal(grown.values, values.astype(np.float32))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1)])
def test_shared_heads(heads, kv_heads):
    q, k, v, cache = example(heads=heads, kv_heads=kv_heads)
    expected, *_ = definition(q, k, v, cache, 70)
    for name in ("reference", "buckets"):
        out, _ = program(name)(q, k, v, cache, np.int32(70))
        np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["reference", "buckets"])
def test_later_and_earlier_columns_do_not_matter(name):
    q, k, v, cache = example()
    first = np.array([0, 4], np.int32)
    poison = [np.full(LENGTH, 1e4, np.float32) for _ in range(2)]
    for column in (5, 63, 64, 80):
        rows = np.arange(LENGTH)
        hidden = (rows > column) | (rows < first[:, None])  # [B, T]
        poisoned = kernels.KVCache(
            jnp.where(hidden[:, None, None], poison[0], cache.keys),
            jnp.where(hidden[:, None, :, None], poison[1][:, None], cache.values),
        )
        clean, _ = program(name)(q, k, v, cache, np.int32(column), first)
        out, _ = program(name)(q, k, v, poisoned, np.int32(column), first)
        np.testing.assert_array_equal(out, clean)


@pytest.mark.parametrize(("column", "bucket"), [(0, 64), (63, 64), (64, 96), (95, 96)])
@pytest.mark.parametrize("ragged", [False, True])
def test_columns_beyond_the_bucket_are_not_read(column, bucket, ragged):
    q, k, v, cache = example()
    beyond = np.arange(LENGTH) >= bucket
    poisoned = kernels.KVCache(
        jnp.where(beyond, jnp.nan, cache.keys), jnp.where(beyond[:, None], jnp.nan, cache.values)
    )
    column = np.array([column, column // 2], np.int32) if ragged else np.int32(column)
    clean, _ = program("reference")(q, k, v, cache, column)
    out, grown = program("buckets")(q, k, v, poisoned, column)
    np.testing.assert_allclose(out, clean, atol=1e-6)
    assert np.isnan(grown.values).any(axis=(0, 1, 3)).sum() == LENGTH - bucket
    # The reference does read them: weights of zero times NaN.
    out, _ = program("reference")(q, k, v, poisoned, column)
    assert np.isnan(out).all()


@pytest.mark.parametrize("name", ["reference", "buckets"])
def test_a_row_without_a_column_stays_finite(name):
    q, k, v, cache = example(steps=3)
    first = np.array([7, 0], np.int32)
    for column in (0, 4, 6):
        out, _ = program(name)(q, k, v, cache, np.int32(column), first)
        assert np.isfinite(out).all()
        expected, *_ = definition(
            q[1:], k[1:], v[1:], kernels.KVCache(*(a[1:] for a in cache)), column
        )
        np.testing.assert_allclose(out[1:], expected, atol=2e-5)


def test_one_at_a_time_is_all_at_once():
    q, k, v, _ = example(steps=70)
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


@pytest.mark.parametrize(("steps", "kv_heads"), [(1, 4), (1, 2), (3, 4)])
def test_bfloat16_keeps_its_type(steps, kv_heads):
    q, k, v, cache = example(steps=steps, kv_heads=kv_heads, dtype=jnp.bfloat16)
    out, grown = program("buckets")(q, k, v, cache, np.int32(70))
    assert out.dtype == grown.keys.dtype == grown.values.dtype == jnp.bfloat16
    expected, *_ = definition(q, k, v, cache, 70)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.06)


def test_what_it_refuses():
    q, k, v, cache = example(steps=3)
    for column in (98, 100, -1):
        with pytest.raises(ValueError, match=r"3 new tokens at column .* cache of 100"):
            kernels.decode_attention(q, k, v, cache, column)
    kernels.decode_attention(q, k, v, cache, 97)
    with pytest.raises(NotImplementedError, match="available: reference, buckets"):
        kernels.decode_attention(q, k, v, cache, 0, implementation="mosaic")
