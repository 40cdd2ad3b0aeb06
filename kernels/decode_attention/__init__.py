"""Attention of new tokens to all tokens so far, with the cache that it owns."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels.decode_attention.reference import KVCache
from kernels.dispatch import Operation, platform
from kernels.operands import up_to
from kernels.tpu import LANES
from kernels.typing import AnyArray, IntScalar

__all__ = ["KVCache", "decode_attention", "make_kv_cache"]

_decode_attention = Operation("decode_attention", __name__)


def make_kv_cache(
    batch: IntScalar,
    kv_heads: IntScalar,
    length: IntScalar,
    head_width: IntScalar,
    dtype: DTypeLike = jnp.float32,
) -> KVCache:
    """An empty cache for sequences of up to `length` columns.

    On a TPU there are as many more as fill its registers of 128, which its memory has in any case,
    and on a GPU as fill the blocks of its kernel.
    """
    if platform() in ("tpu", "cuda"):
        length = up_to(length, LANES)
    return KVCache(
        jnp.zeros((batch, kv_heads, head_width, length), dtype),
        jnp.zeros((batch, kv_heads, length, head_width), dtype),
    )


def decode_attention(
    q: Float[AnyArray, "B L H Dh"],
    k: Float[AnyArray, "B L Hkv Dh"],
    v: Float[AnyArray, "B L Hkv Dh"],
    cache: KVCache,
    column: IntScalar | Int[AnyArray, ""] | Int[AnyArray, " B"],
    first: Int[AnyArray, " B"] | None = None,
    *,
    window: IntScalar = 0,
    causal: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H Dh"], KVCache]:
    """Writes L new keys and values to the cache and attends from the new tokens.

    The new token l stands in column `column` + l and sees the columns from `first` to its own, or
    to the last new one where attention is not causal.
    Only the columns before `column` + L are read, rounded up to a bucket (see
    `kernels.decode_attention.buckets`), or those of the window, so that a step does not pay for
    the length of the cache. A row whose columns are all hidden gives finite values without
    meaning.

    Args:
      q: [B, L, H, Dh] float32 or bfloat16.
      k: [B, L, Hkv, Dh] with Hkv dividing H; query head h reads head h // (H / Hkv).
      v: [B, L, Hkv, Dh].
      cache: of `make_kv_cache`; to be updated in place it must not be used again.
      column: of the first new token: a Python int (prefill), int32 [] (a step of a loop), or
        int32 [B] where samples are at different columns (the write is then slower).
      first: int32 [B], the first column of each sample that holds a token; None for 0.
      window: the number of columns that a token sees, its own included; 0 for all.
      causal: whether a new token sees only itself and those before it, or all new tokens.
      implementation: "reference" reads the whole cache; "buckets" what is needed (the default);
        "tpu" of one new token, what its row needs (the default there, for caches of whole
        registers); "gpu" the same, of a cache in bfloat16.

    Returns:
      [B, L, H, Dh], and the cache after the write.

    Raises:
      NotImplementedError: `implementation` is unknown or cannot take these arguments.
      ValueError: the new tokens do not fit into the cache (when `column` is an int), or there is
        a window and attention is not causal.
    """
    if window and not causal:
        raise ValueError("a window is of causal attention: set it to 0")
    length = cache.keys.shape[-1]
    if isinstance(column, int) and not 0 <= column <= length - q.shape[1]:
        raise ValueError(
            f"{q.shape[1]} new tokens at column {column} do not fit into a cache of {length}"
        )
    return _decode_attention(
        implementation, q, k, v, cache, column, first, window=window, causal=causal
    )
