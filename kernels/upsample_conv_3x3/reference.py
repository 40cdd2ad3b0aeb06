"""The specification of upsample_conv_3x3: the large map is made, then convolved."""

import jax.numpy as jnp

from kernels.conv_3x3 import conv_3x3
from kernels.dispatch import register

__all__ = ["upsample_conv_3x3"]


@register("upsample_conv_3x3", "reference")
def upsample_conv_3x3(x, kernel):
    """See `kernels.upsample_conv_3x3`."""
    return conv_3x3(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel)
