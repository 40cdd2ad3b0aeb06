"""What kernels for TPUs and for GPUs do with their operands."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

__all__ = ["alike", "result", "up_to"]


def up_to(number: int, multiple: int) -> int:
    """The least multiple that is not below the number."""
    return -(-number // multiple) * multiple


def alike(*arrays: jax.Array) -> list[jax.Array]:
    """The same arrays, each of them varying over every axis of a mesh that one of them varies over.

    Within `jax.shard_map` some operands are those of one device and some those of all. A kernel
    takes operands of one kind; outside of it there is nothing to do.
    """
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    every = frozenset().union(*axes)
    missing = [tuple(every - own) for own in axes]
    return [
        jax.lax.pcast(array, names, to="varying") if names else jnp.asarray(array)
        for array, names in zip(arrays, missing, strict=True)
    ]


def result(shape: tuple[int, ...], dtype: DTypeLike, operand: Any) -> jax.ShapeDtypeStruct:
    """The type of a result of a kernel that varies over the axes of a mesh as an operand does."""
    axes = jax.typeof(operand).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
