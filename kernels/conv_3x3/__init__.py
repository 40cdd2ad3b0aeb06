"""3 x 3 convolution with the weights in the form that the platform's algorithm reads."""

import jax
from jaxtyping import Array, Float, Float32

from kernels.conv_3x3 import winograd
from kernels.dispatch import Operation
from kernels.typing import AnyArray

__all__ = ["conv_3x3", "prepare_conv_3x3"]

_conv_3x3 = Operation("conv_3x3", __name__)


def prepare_conv_3x3(kernel: Float[AnyArray, "3 3 C Cout"]) -> Float32[Array, "36 C Cout"] | None:
    """What `conv_3x3` can read instead of the weights, computed once before a loop.

    Args:
      kernel: [3, 3, C, Cout].

    Returns:
      [36, C, Cout] float32, or None where nothing but the weights as they are would be read: on
      other platforms than CPUs, in other types than float32, for fewer channels than pay.
    """
    if jax.default_backend() != "cpu" or not winograd.pays_for(kernel.shape, kernel.dtype):
        return None
    return winograd.transform_kernel(kernel)


def conv_3x3(
    x: Float[AnyArray, "B height width C"],
    kernel: Float[AnyArray, "3 3 C Cout"],
    prepared: Float32[AnyArray, "36 C Cout"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "B height width Cout"]:
    """Convolution of stride 1 that keeps the size of the feature map (zero padding).

    Args:
      x: [B, height, width, C] float32 or bfloat16.
      kernel: [3, 3, C, Cout], the same dtype.
      prepared: of `prepare_conv_3x3(kernel)`, or None.
      implementation: "reference", "dense" (maps of at most 2 x 2), "sliced" (float32) or "winograd"
        (float32; it rounds about five times as much as the direct sum). None takes on a CPU what
        was measured to be fastest of those that can take the arguments, Winograd only where the
        weights are prepared; elsewhere it takes the reference.

    Returns:
      [B, height, width, Cout].

    Raises:
      NotImplementedError: `implementation` is unknown or cannot take these arguments.
    """
    return _conv_3x3(implementation, x, kernel, prepared)
