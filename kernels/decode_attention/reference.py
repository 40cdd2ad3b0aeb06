"""Attention of new tokens to all tokens so far, over a cache of keys and values: specification."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row with no key at all stays finite


class KVCache(NamedTuple):
    """Keys and values of one layer, column after column.

    Attributes:
      keys: [B, K, W, T], columns innermost: scores of a new token are then sums over W of rows.
      values: [B, K, T, W].
    """

    keys: jax.Array
    values: jax.Array


def write(cache, k, v, column):
    """The cache with k, v [B, S, K, W] in the columns from `column` (of all, or of each) on."""
    k, v = k.astype(cache.keys.dtype), v.astype(cache.values.dtype)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    put = jax.lax.dynamic_update_slice
    if jnp.ndim(column) == 0:
        return KVCache(
            put(cache.keys, k, (0, 0, 0, column)), put(cache.values, v, (0, 0, column, 0))
        )
    return KVCache(
        jax.vmap(lambda cache, k, column: put(cache, k, (0, 0, column)))(cache.keys, k, column),
        jax.vmap(lambda cache, v, column: put(cache, v, (0, column, 0)))(cache.values, v, column),
    )


def attend(q, keys, values, column, first, window, offset=0):
    """q [B, S, H, W] over keys [B, K, W, T] and values [B, K, T, W], columns from `offset` on."""
    batch, steps, heads, width = q.shape
    groups = heads // keys.shape[1]
    q = (q / width**0.5).reshape(batch, steps, -1, groups, width)
    scores = _product("bskgw,bkwt->bkgst", q, keys)
    columns, new = offset + jnp.arange(keys.shape[-1]), jnp.arange(steps)[:, None]
    own = jnp.asarray(column)[..., None, None] + new  # [S, 1] or [B, S, 1]
    seen = columns <= own
    if window:
        seen = seen & (columns > own - window)
    if first is not None:
        seen = seen & (columns >= first[:, None, None])
    if seen.ndim == 3:
        seen = seen[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)
    out = jnp.einsum("bkgst,bktw->bskgw", weights.astype(values.dtype), values)
    return out.reshape(batch, steps, heads, width)


def _product(subscripts, a, b):
    """An einsum in float32; CPUs have no product of bfloat16 that ends there."""
    native = functools.partial(jnp.einsum, subscripts, preferred_element_type=jnp.float32)
    if a.dtype == jnp.float32:
        return native(a, b)
    widened = lambda a, b: native(a.astype(jnp.float32), b.astype(jnp.float32))  # noqa: E731
    return jax.lax.platform_dependent(a, b, cpu=widened, default=native)


def decode_attention(q, k, v, cache, column, first, window):
    """Writes, then reads the whole cache."""
    cache = write(cache, k, v, column)
    return attend(q, cache.keys, cache.values, column, first, window), cache
