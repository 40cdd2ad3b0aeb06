"""Passes over rows of logits in the memory of a TPU kernel, 128 tokens at a time.

A Pallas kernel has no use for one large expression over a row: its registers hold a few dozen
chunks. So rows are gone through in a loop, which carries arrays [R, 128], one value for each lane.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.tpu import LANES

__all__ = ["first_of_the_largest", "scan"]

_CHUNK = 1024  # tokens of one trip, at most


def scan(x: Any, start: Any, step: Callable) -> Any:
    """Carries a tree of arrays [R, 128] through the chunks of a reference x [R, V].

    Args:
      x: a reference; V is a multiple of 128.
      start: what the first step gets.
      step: a function of what is carried, a chunk [R, 128], and its ids int32 [R, 128].
    """
    rows, width = x.shape
    size = next(size for size in range(_CHUNK, 0, -LANES) if width % size == 0)

    def trip(i, carry):
        first = pl.multiple_of(i * size, size)
        for j in range(0, size, LANES):
            ids = first + j + jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
            carry = step(carry, x[:, pl.ds(first + j, LANES)], ids)
        return carry

    return jax.lax.fori_loop(0, width // size, trip, start)


def first_of_the_largest(scores: jax.Array, ids: jax.Array, *others: jax.Array) -> tuple:
    """Of the best in each lane the one with the lowest id.

    Args:
      scores: [R, 128], the largest of each lane.
      ids: int32 [R, 128], where it is.
      *others: float32 [R, 128], which go with it.

    Returns:
      The id int32 [R, 1], and each of the others at it, [R, 1].
    """
    best = scores == scores.max(axis=1, keepdims=True)
    id_ = jnp.where(best, ids, jnp.iinfo(jnp.int32).max).min(axis=1, keepdims=True)
    found = best & (ids == id_)
    picked = [jnp.where(found, x, -jnp.inf).max(axis=1, keepdims=True) for x in others]
    return id_, *picked
