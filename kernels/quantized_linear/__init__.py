"""Products with matrices of int8, whose every output channel has a scale: weight-only int8."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Float32, Int8

from kernels.dispatch import Operation
from kernels.quantized_linear.reference import product
from kernels.typing import AnyArray

__all__ = ["quantize", "quantized_linear"]

_quantized_linear = Operation("quantized_linear", __name__)
_LARGEST = 127  # of the symmetric values; -128 is not one of them


def quantize(
    weight: Float[AnyArray, "V D"],
) -> tuple[Int8[Array, "V D"], Float32[Array, " V"]]:
    """A matrix in int8, with the scale of each output channel: its largest magnitude over 127.

    Values are rounded to the nearest, ties to even. A channel of zeros has the scale 1.

    Args:
      weight: [V, D], the D weights of an output channel one after the other; finite. Within a
        traced program, where nobody can look, a channel that is not finite gets the scale NaN, and
        so all that is computed with it is NaN.

    Returns:
      int8 [V, D] in [-127, 127], and float32 [V], so that weight is about values * scale[:, None].

    Raises:
      ValueError: a weight is NaN or infinite.
    """
    weight = jnp.asarray(weight, jnp.float32)
    largest = jnp.abs(weight).max(axis=1, initial=0)
    finite = jnp.isfinite(largest)
    if not isinstance(finite, jax.core.Tracer) and not finite.all():
        number = int(jnp.argmin(finite))
        raise ValueError(f"the weights of output channel {number} are not finite")
    scale = largest / _LARGEST
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1, scale)
    values = jnp.round(weight / scale[:, None]).astype(jnp.int8)
    return values, jnp.where(finite, scale, jnp.nan)


def quantized_linear(
    x: Float[AnyArray, "B D"],
    weight: Int8[AnyArray, "V D"],
    scale: Float32[AnyArray, " V"],
    *,
    implementation: str | None = None,
) -> Float32[Array, "B V"]:
    """The product x (scale weight)^T, of weights that are read as int8 and computed with exactly.

    Products are those of x as it is, with the precision of float32 on every platform, and sums are
    float32. The gradient is that of x;
    weights of int8 and their scales are not trained.

    Args:
      x: [B, D] float32 or bfloat16; other floats are read as float32.
      weight: of `quantize`: a row for each output channel, which is how matrix units that sum over
        D read it in order.
      scale: of `quantize`.
      implementation: "reference"; "floats" multiplies with a matrix of float32 (the default on
        CPUs); "tpu" and "gpu" have no copy of the weights in another type. None takes "tpu" on TPUs
        where that is faster, by the cycles of the machine code.

    Returns:
      float32 [B, V].

    Raises:
      NotImplementedError: `implementation` is unknown or cannot take these arguments.
      TypeError: the scales are differentiated.
    """
    return _differentiable(implementation, x, weight, scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(implementation, x, weight, scale):
    return _quantized_linear(implementation, x, weight, scale)


@functools.partial(_differentiable.defjvp, symbolic_zeros=True)
def _tangent(implementation, primals, tangents):
    x, weight, scale = primals
    if not isinstance(tangents[2], SymbolicZero):
        raise TypeError("the scales of weights in int8 have no gradient: they are not trained")
    result = _quantized_linear(implementation, x, weight, scale)
    if isinstance(tangents[0], SymbolicZero):
        return result, jnp.zeros_like(result)
    return result, product(tangents[0], weight, scale)
