"""Which columns of a cache a new token sees: what kernels for TPUs and for GPUs share."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Int32

from kernels.typing import AnyArray, IntScalar

__all__ = ["seen"]


def seen(
    column: IntScalar | Int[AnyArray, ""] | Int[AnyArray, " B"],
    first: Int[AnyArray, " B"] | None,
    window: int,
    batch: int,
    length: int,
) -> tuple[Int32[Array, " B"], Int32[Array, " B"] | None]:
    """The column of the new token of each row, and the first one that it sees.

    Args:
      column, first, window: of `kernels.decode_attention`.
      batch: B.
      length: of the caches, in which both are clipped.

    Returns:
      Both [B]; the second is None where it is 0 in all rows.
    """
    own = jnp.clip(jnp.broadcast_to(jnp.asarray(column, jnp.int32), batch), 0, length - 1)
    start = None if first is None else jnp.clip(first.astype(jnp.int32), 0, own)
    if window:
        least = jnp.maximum(own + 1 - window, 0)
        start = least if start is None else jnp.maximum(least, start)
    return own, start
