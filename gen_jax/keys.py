"""Streams of random keys from one seed, one for each purpose.

`fold_in(key(seed), i)` alone would give training step i and sample i of the same seed the same
key, and so the same noise; each purpose has a root of its own.
"""

import operator
import zlib

import jax
import numpy as np
from jaxtyping import Array, Int, Integer, Key

from kernels import threefry

__all__ = ["fold_in_each", "grid", "of_items", "root", "stream"]

_LIMIT = 2**32  # of seeds and of the numbers of items, which a key takes as 32 bits


def root(seed: int, purpose: str) -> Key[Array, ""]:
    """The key of a purpose ("init", "train", "sample", "evaluate").

    Raises:
      ValueError: the seed is no whole number in [0, 2**32).
    """
    try:
        number = operator.index(seed)
    except TypeError as error:
        raise ValueError(f"seed must be a whole number, got {seed!r}") from error
    if not 0 <= number < _LIMIT:
        raise ValueError(f"seed must be in [0, 2**32), got {number}")
    return jax.random.fold_in(jax.random.key(number), zlib.crc32(purpose.encode()))


def stream(seed: int, purpose: str, start: int, count: int) -> Key[Array, " count"]:
    """Keys of the items start, start + 1, ..., start + count - 1 of a purpose.

    Raises:
      ValueError: the seed or the number of an item is not in [0, 2**32).
    """
    if start < 0 or count < 0 or start + count > _LIMIT:
        raise ValueError(f"items must be in [0, 2**32), got {count} from {start} on")
    key = root(seed, purpose)
    return of_items(key, np.arange(start, start + count).astype(np.uint32))


def fold_in_each(keys: Key[Array, " B"], data: int | Int[Array, ""]) -> Key[Array, " B"]:
    """Keys with the same integer folded into each."""
    return threefry.fold_in_each(keys, data)


def of_items(key: Key[Array, ""], items: Integer[Array | np.ndarray, " B"]) -> Key[Array, " B"]:
    """Keys of items of a purpose whose root is `key`; as `stream`, for numbers that are traced."""
    return threefry.fold_in_each(key, items)


def grid(keys: Key[Array, " B"], *counts: int) -> Key[Array, "..."]:
    """Keys [*counts, B] for every use that each of B samples makes of randomness in a loop."""
    uses = np.arange(np.prod(counts), dtype=np.int32)[:, None]
    # The shape comes last: JAX's check of key reuse fails where keys made here are partly used.
    return threefry.fold_in_each(keys, uses).reshape(*counts, *keys.shape)
