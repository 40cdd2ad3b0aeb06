"""decode_attention that reads the valid prefix of the cache, rounded up to a bucket."""

import functools

import jax
import jax.numpy as jnp

from kernels.decode_attention import reference
from kernels.dispatch import EVERYWHERE, register

__all__ = ["buckets", "decode_attention"]


def buckets(length: int) -> tuple[int, ...]:
    """Sizes that a valid prefix is rounded up to: 64, 96, 128, 192, ... and `length` itself."""
    sizes, power = [], 64
    while power < length:
        sizes += [power, power + power // 2]
        power *= 2
    return (*(size for size in sizes if size < length), length)


@register("decode_attention", "buckets", default_on=EVERYWHERE)
def decode_attention(q, k, v, cache, column, first, *, window, causal):
    """See `kernels.decode_attention`; the bucket is chosen by a conditional."""
    cache = reference.write(cache, k, v, column)
    seen = window, causal
    end, length = column + q.shape[1], cache.keys.shape[-1]
    if isinstance(column, int):
        return _attend(end, seen, q, cache, column, first), cache
    if window and window + q.shape[1] - 1 < length and jnp.ndim(column) == 0:
        # As branches, which get the written cache: fused with the read, the write would be done
        # twice, and the cache copied.
        size = window + q.shape[1] - 1
        branches = [
            functools.partial(_attend, size, seen),
            functools.partial(_last, size, seen),
        ]
        return jax.lax.switch(jnp.int32(end > size), branches, q, cache, column, first), cache
    sizes = buckets(length)
    if len(sizes) == 1:
        return _attend(length, seen, q, cache, column, first), cache
    bucket = jnp.sum(jnp.max(end) > jnp.asarray(sizes))
    branches = [functools.partial(_attend, size, seen) for size in sizes]
    return jax.lax.switch(bucket, branches, q, cache, column, first), cache


def _attend(size, seen, q, cache, column, first):
    """To the first `size` columns."""
    keys = jax.lax.slice_in_dim(cache.keys, 0, size, axis=3)
    values = jax.lax.slice_in_dim(cache.values, 0, size, axis=2)
    return reference.attend(q, keys, values, column, first, *seen)


def _last(size, seen, q, cache, column, first):
    """To the `size` columns that end with the new tokens."""
    offset = column + q.shape[1] - size
    keys = jax.lax.dynamic_slice_in_dim(cache.keys, offset, size, axis=3)
    values = jax.lax.dynamic_slice_in_dim(cache.values, offset, size, axis=2)
    return reference.attend(q, keys, values, column, first, *seen, offset)
