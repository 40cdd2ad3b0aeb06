"""Streams of random keys from one seed, one for each purpose.

`fold_in(key(seed), i)` alone would give training step i and sample i of the same seed the same
key, and so the same noise; each purpose has a root of its own.
"""

import zlib

import jax
import numpy as np


def root(seed: int, purpose: str) -> jax.Array:
    """The key of a purpose ("init", "train", "sample", "evaluate")."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def stream(seed: int, purpose: str, start: int, count: int) -> jax.Array:
    """Keys [count] of the items start, start + 1, ... of a purpose."""
    key = root(seed, purpose)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(start, start + count))


def grid(keys: jax.Array, *counts: int) -> jax.Array:
    """Keys [*counts, B] for every use that each of B samples makes of randomness in a loop."""
    uses = np.arange(np.prod(counts))
    fold = jax.vmap(jax.random.fold_in, (0, None))
    return jax.vmap(fold, (None, 0))(keys, uses).reshape(*counts, *keys.shape)
