"""The specification of nearest_code in plain jax.numpy."""

import jax
import jax.numpy as jnp

from kernels.dispatch import register

__all__ = ["nearest_code", "squared_distance"]


@register("nearest_code", "reference")
def nearest_code(x, codebook):
    """See `kernels.nearest_code`.

    The index depends on the least score, whether anybody reads that or not: where nobody does, XLA
    for TPUs keeps the running minimum in bfloat16, and a percent of the indices changes. (It sees
    through an optimisation barrier.)
    """
    x, codebook = x.astype(jnp.float32), codebook.astype(jnp.float32)
    product = jnp.einsum("nd,kd->nk", x, codebook, precision=jax.lax.Precision.HIGHEST)
    scores = 0.5 * jnp.square(codebook).sum(axis=1)[None] - product
    index, least = jnp.argmin(scores, axis=1).astype(jnp.int32), scores.min(axis=1)
    return jnp.where(jnp.isnan(least), 0, index), squared_distance(x, least)


def squared_distance(x, score):
    """[N]: from scores [N]; rounding does not make it negative."""
    return jnp.maximum(jnp.square(x).sum(axis=1) + 2 * score, 0)
