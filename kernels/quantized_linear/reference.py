"""The specification of quantized_linear in plain jax.numpy."""

import jax
import jax.numpy as jnp

from kernels.dispatch import register

__all__ = ["product", "quantized_linear"]


@register("quantized_linear", "reference")
def quantized_linear(x, weight, scale):
    """See `kernels.quantized_linear`."""
    return product(x, weight, scale)


def product(x, weight, scale):
    """[B, V]: of x [B, D], weights [V, D] and scales [V]; integers up to 256 are exact in both."""
    dtype = jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32
    product = jnp.einsum(
        "bd,vd->bv",
        x.astype(dtype),
        weight.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return product * scale[None]
