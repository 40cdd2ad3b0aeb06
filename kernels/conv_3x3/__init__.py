"""3 x 3 convolution with the weights in the form that the platform's algorithm reads."""

import jax

from kernels.conv_3x3 import reference, winograd
from kernels.dispatch import select

__all__ = ["conv_3x3", "prepare_conv_3x3"]


def prepare_conv_3x3(kernel: jax.Array) -> jax.Array | None:
    """What `conv_3x3` can read instead of the weights, computed once before a loop.

    Args:
      kernel: [3, 3, C, D].

    Returns:
      [16, C, D] float32, or None where nothing but the weights as they are would be read: on
      other platforms than CPUs, in other types than float32, for fewer channels than pay.
    """
    if jax.default_backend() != "cpu" or not winograd.pays_for(kernel.shape, kernel.dtype):
        return None
    return winograd.transform_kernel(kernel)


def conv_3x3(
    x: jax.Array,
    kernel: jax.Array,
    prepared: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Convolution of stride 1 that keeps the size of the feature map (zero padding).

    Args:
      x: [B, H, W, C] float32 or bfloat16.
      kernel: [3, 3, C, D], the same dtype.
      prepared: of `prepare_conv_3x3(kernel)`, or None.
      implementation: "reference", or "winograd" (float32, even H and W). None takes Winograd on
        a CPU where it was measured to pay and the weights are prepared, else the reference.

    Returns:
      [B, H, W, D].

    Raises:
      NotImplementedError: `implementation` is not available for these arguments.
    """
    if implementation is None:
        if prepared is None or winograd.refusal(x.shape, x.dtype):
            return reference.conv_3x3(x, kernel)
        return jax.lax.platform_dependent(
            x,
            kernel,
            prepared,
            cpu=lambda x, kernel, prepared: winograd.conv_3x3(x, prepared),
            default=lambda x, kernel, prepared: reference.conv_3x3(x, kernel),
        )
    return select("conv_3x3", implementation, _IMPLEMENTATIONS)(x, kernel, prepared)


def _winograd(x, kernel, prepared):
    if reason := winograd.refusal(x.shape, x.dtype):
        raise NotImplementedError(f"conv_3x3: winograd {reason}")
    return winograd.conv_3x3(x, winograd.transform_kernel(kernel) if prepared is None else prepared)


_IMPLEMENTATIONS = {
    "reference": lambda x, kernel, prepared: reference.conv_3x3(x, kernel),
    "winograd": _winograd,
}
