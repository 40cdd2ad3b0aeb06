"""Nearest-neighbour upsampling by two, followed by a 3 x 3 convolution."""

from jaxtyping import Array, Float

from kernels.dispatch import Operation
from kernels.typing import AnyArray

__all__ = ["upsample_conv_3x3"]

_upsample_conv_3x3 = Operation("upsample_conv_3x3", __name__)


def upsample_conv_3x3(
    x: Float[AnyArray, "B height width C"],
    kernel: Float[AnyArray, "3 3 C Cout"],
    *,
    implementation: str | None = None,
) -> Float[Array, "B 2*height 2*width Cout"]:
    """Repeats every pixel twice along both sides, and convolves with stride 1 and zero padding.

    Args:
      x: [B, height, width, C] float32 or bfloat16.
      kernel: [3, 3, C, Cout], the same dtype.
      implementation: "reference", or "phases". None takes "phases" on a CPU, where it was measured
        to be faster, else the reference.

    Returns:
      [B, 2 height, 2 width, Cout].

    Raises:
      NotImplementedError: `implementation` is unknown or cannot take these arguments.
    """
    return _upsample_conv_3x3(implementation, x, kernel)
