"""What the kernels for TPUs share."""

import jax
import jax.numpy as jnp

__all__ = ["LANES", "readable"]

LANES = 128  # of a register


def readable(array: jax.Array) -> jax.Array:
    """The array in a type that the vector units load: float32 in place of float16."""
    return array.astype(jnp.float32) if array.dtype == jnp.float16 else array
