"""3 x 3 convolution with the weights in the form that the platform's algorithm reads."""

import jax

from kernels.conv_3x3 import reference, winograd
from kernels.dispatch import select

__all__ = ["conv_3x3", "prepare_conv_3x3"]


def prepare_conv_3x3(kernel: jax.Array) -> jax.Array:
    """What `conv_3x3` can read instead of transforming the weights in every call.

    Call it once before a loop that uses the same weights throughout. Where the platform's
    algorithm reads the weights as they are, the compiler drops what is computed here.

    Args:
      kernel: [3, 3, C, D] float32.

    Returns:
      [16, C, D] float32.
    """
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
        if prepared is None or not winograd.pays(x.shape, x.dtype, kernel.shape[-1]):
            return reference.conv_3x3(x, kernel)
        return jax.lax.platform_dependent(
            x,
            kernel,
            prepared,
            cpu=lambda x, kernel, prepared: winograd.conv_3x3(x, prepared),
            default=lambda x, kernel, prepared: reference.conv_3x3(x, kernel),
        )
    select("conv_3x3", implementation, {"reference": 0, "winograd": 0})
    if implementation == "reference":
        return reference.conv_3x3(x, kernel)
    reason = winograd.refusal(x.shape, x.dtype)
    if reason:
        raise NotImplementedError(f"conv_3x3: winograd {reason}")
    return winograd.conv_3x3(x, prepare_conv_3x3(kernel) if prepared is None else prepared)
