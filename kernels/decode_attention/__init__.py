"""Attention of new tokens to all tokens so far, with the cache that it owns."""

import functools

import jax
import jax.numpy as jnp

from kernels.decode_attention import reference
from kernels.decode_attention.reference import KVCache
from kernels.dispatch import select

__all__ = ["KVCache", "decode_attention", "make_kv_cache"]


def make_kv_cache(
    batch: int, kv_heads: int, length: int, head_width: int, dtype=jnp.float32
) -> KVCache:
    """An empty cache for sequences of up to `length` columns."""
    return KVCache(
        jnp.zeros((batch, kv_heads, head_width, length), dtype),
        jnp.zeros((batch, kv_heads, length, head_width), dtype),
    )


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    column: int | jax.Array,
    first: jax.Array | None = None,
    *,
    window: int = 0,
    implementation: str | None = None,
) -> tuple[jax.Array, KVCache]:
    """Writes S new keys and values to the cache and attends from the new tokens, causally.

    The new token s stands in column `column` + s and sees the columns from `first` to its own.
    Only the columns before `column` + S are read, rounded up to a bucket (see `buckets`), or those
    of the window, so that a step does not pay for the length of the cache. A row whose columns
    are all hidden gives finite values without meaning.

    Args:
      q: [B, S, H, W] float32 or bfloat16.
      k: [B, S, K, W] with K dividing H; query head h reads head h // (H / K).
      v: [B, S, K, W].
      cache: of `make_kv_cache`; to be updated in place it must not be used again.
      column: of the first new token: a Python int (prefill), int32 [] (a step of a loop), or
        int32 [B] where samples are at different columns (the write is then slower).
      first: int32 [B], the first column of each sample that holds a token; None for 0.
      window: columns that a token sees, its own included; 0 for all.
      implementation: "reference" reads the whole cache; "buckets" (the default) what is needed.

    Returns:
      [B, S, H, W], and the cache after the write.

    Raises:
      NotImplementedError: `implementation` is not available.
      ValueError: the new tokens do not fit into the cache (when `column` is an int).
    """
    length = cache.keys.shape[-1]
    if isinstance(column, int) and not 0 <= column <= length - q.shape[1]:
        raise ValueError(
            f"{q.shape[1]} new tokens at column {column} do not fit into a cache of {length}"
        )
    chosen = select("decode_attention", implementation or "buckets", _IMPLEMENTATIONS)
    return chosen(q, k, v, cache, column, first, window)


def buckets(length: int) -> tuple[int, ...]:
    """Sizes that a valid prefix is rounded up to: 64, 96, 128, 192, ... and `length` itself."""
    sizes, power = [], 64
    while power < length:
        sizes += [power, power + power // 2]
        power *= 2
    return (*(size for size in sizes if size < length), length)


def _bucketed(q, k, v, cache, column, first, window):
    cache = reference.write(cache, k, v, column)
    end, length = column + q.shape[1], cache.keys.shape[-1]
    if isinstance(column, int):
        return _attend(end, window, q, cache, column, first), cache
    if window and window + q.shape[1] - 1 < length and jnp.ndim(column) == 0:
        # As branches, which get the written cache: fused with the read, the write would be done
        # twice, and the cache copied.
        size = window + q.shape[1] - 1
        branches = [
            functools.partial(_attend, size, window),
            functools.partial(_last, size, window),
        ]
        return jax.lax.switch(jnp.int32(end > size), branches, q, cache, column, first), cache
    sizes = buckets(length)
    if len(sizes) == 1:
        return _attend(length, window, q, cache, column, first), cache
    bucket = jnp.sum(jnp.max(end) > jnp.asarray(sizes))
    branches = [functools.partial(_attend, size, window) for size in sizes]
    return jax.lax.switch(bucket, branches, q, cache, column, first), cache


def _attend(size, window, q, cache, column, first):
    """To the first `size` columns."""
    keys = jax.lax.slice_in_dim(cache.keys, 0, size, axis=3)
    values = jax.lax.slice_in_dim(cache.values, 0, size, axis=2)
    return reference.attend(q, keys, values, column, first, window)


def _last(size, window, q, cache, column, first):
    """To the `size` columns that end with the new tokens."""
    offset = column + q.shape[1] - size
    keys = jax.lax.dynamic_slice_in_dim(cache.keys, offset, size, axis=3)
    values = jax.lax.dynamic_slice_in_dim(cache.values, offset, size, axis=2)
    return reference.attend(q, keys, values, column, first, window, offset)


_IMPLEMENTATIONS = {"reference": reference.decode_attention, "buckets": _bucketed}
