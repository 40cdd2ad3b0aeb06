"""Threefry-2x32 (Salmon et al. 2011) in plain uint32 operations, bit for bit that of `jax.random`.

JAX hides the generator behind a primitive that is a loop of its own on some platforms. Written
out it fuses with what uses the numbers, and every backend of a kernel can do the same.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Integer, Key, UInt32

from kernels.typing import AnyArray

__all__ = ["gumbel", "gumbel_of", "threefry2x32"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry2x32(
    key: tuple[UInt32[Array, "..."], UInt32[Array, "..."]],
    x: UInt32[Array, "..."],
    y: UInt32[Array, "..."],
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """The block cipher: two words of key and two of counter to two words; shapes broadcast."""
    schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = x + schedule[0], y + schedule[1]
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << turn) | (y >> (32 - turn))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def gumbel(
    keys: Key[Array, " B"],
    ids: Integer[AnyArray, "B N"] | Integer[AnyArray, " N"],
) -> Float32[Array, "B N"]:
    """The noise of `jax.random.gumbel(key, [V])` at some of its V places, and no others.

    Args:
      keys: [B] threefry keys.
      ids: integers [B, N] or [N], places.

    Returns:
      float32 [B, N].
    """
    data = jax.random.key_data(keys)
    return gumbel_of((data[:, :1], data[:, 1:]), jnp.atleast_2d(ids))


def gumbel_of(
    key: tuple[UInt32[Array, "*#key"], UInt32[Array, "*#key"]], ids: Integer[AnyArray, "*#N"]
) -> Float32[Array, "..."]:
    """`gumbel` from the two words of a key, at ids; shapes broadcast."""
    ids = ids.astype(jnp.uint32)
    high, low = threefry2x32(key, jnp.zeros_like(ids), ids)
    bits = ((high ^ low) >> 9) | jnp.uint32(0x3F800000)  # a float in [1, 2)
    uniform = jax.lax.bitcast_convert_type(bits, jnp.float32) - 1
    return -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)))
