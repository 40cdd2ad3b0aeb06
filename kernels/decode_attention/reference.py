"""Attention of new tokens to all tokens so far, over a cache of keys and values: specification."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.dispatch import register
from kernels.typing import AnyArray

__all__ = ["MASKED", "KVCache", "attend", "decode_attention", "write"]

MASKED = -1e30  # finite, so that a row with no key at all stays finite


class KVCache(NamedTuple):
    """Keys and values of one layer, column after column.

    Attributes:
      keys: [B, Hkv, Dh, T], T being the cache length. Columns are innermost, so that scores of a
        new token are sums over Dh of rows.
      values: [B, Hkv, T, Dh].
    """

    keys: Float[AnyArray, "B Hkv Dh T"]
    values: Float[AnyArray, "B Hkv T Dh"]


def write(cache, k, v, column):
    """The cache with k and v [B, L, Hkv, Dh] in the columns from `column` on, of all or of each."""
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


def attend(q, keys, values, column, first, window, causal, offset=0):
    """q [B, L, H, Dh] over keys [B, Hkv, Dh, T] and values [B, Hkv, T, Dh].

    The first column of these keys and values is column `offset` of the cache.
    """
    batch, length, heads, width = q.shape
    groups = heads // keys.shape[1]
    q = (q / width**0.5).reshape(batch, length, -1, groups, width)
    scores = _product("blkgd,bkdt->bkglt", q, keys)
    columns = offset + jnp.arange(keys.shape[-1])[None, None]  # [1, 1, T]
    own = jnp.atleast_1d(column)[:, None, None] + jnp.arange(length)[None, :, None]
    seen = columns <= (own if causal else own[:, -1:])  # [1 or B, L, T]
    if window:
        seen = seen & (columns > own - window)
    if first is not None:
        seen = seen & (columns >= first[:, None, None])
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("bkglt,bktd->blkgd", weights.astype(values.dtype), values)
    return out.reshape(batch, length, heads, width)


def _product(subscripts, a, b):
    """An einsum in float32; CPUs have no product of bfloat16 that ends there."""
    native = functools.partial(jnp.einsum, subscripts, preferred_element_type=jnp.float32)
    if a.dtype == jnp.float32:
        return native(a, b)

    def widened(a, b):
        return native(a.astype(jnp.float32), b.astype(jnp.float32))

    return jax.lax.platform_dependent(a, b, cpu=widened, default=native)


@register("decode_attention", "reference")
def decode_attention(q, k, v, cache, column, first, *, window, causal):
    """See `kernels.decode_attention`; it writes, then reads the whole cache."""
    cache = write(cache, k, v, column)
    return attend(q, cache.keys, cache.values, column, first, window, causal), cache
