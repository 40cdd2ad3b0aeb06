"""float32 as sums of bfloat16, for matrix units that have products of bfloat16 alone."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32

__all__ = ["PAIRS", "differentiable", "is_half", "split"]

# Of the nine products of the parts of two float32, those that float32 can tell from zero.
PAIRS = tuple((i, j) for i in range(3) for j in range(3 - i))


def is_half(x: jax.Array, codebook: jax.Array) -> bool:
    """Whether one product of bfloat16 is exact."""
    return x.dtype == codebook.dtype == jnp.bfloat16


def split(x: Float32[Array, "..."]) -> list[BFloat16[Array, "..."]]:
    """Three bfloat16 that add up to a float32; the last two are 0 for one that is infinite."""
    parts = []
    for _ in range(3):
        # Not a pair of conversions, which the compiler may leave out.
        rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(rounded.astype(jnp.bfloat16))
        x = jnp.where(jnp.isinf(x), 0, x - rounded)
    return parts


def differentiable(search: Callable) -> Callable:
    """The same search, whose gradient is that of the distance to the code that it finds."""
    found = jax.custom_jvp(search)

    @found.defjvp
    def _tangent(primals, tangents):
        x, codebook = primals
        index, distance = found(x, codebook)
        difference = x.astype(jnp.float32) - codebook[index].astype(jnp.float32)
        change = tangents[0].astype(jnp.float32) - tangents[1][index].astype(jnp.float32)
        tangent = 2 * (difference * change).sum(axis=1)
        return (index, distance), (np.zeros(index.shape, jax.dtypes.float0), tangent)

    return functools.wraps(search)(found)
