"""The specification of nearest_code with a shortlist, in plain jax.numpy."""

import jax
import jax.numpy as jnp

from kernels.dispatch import register
from kernels.nearest_code.shortlist import CLASSES, nearest_of, shortlist_of

__all__ = ["shortlisted_code"]


@register("shortlisted_code", "reference")
def shortlisted_code(x, codebook, *, shortlist):
    """See `kernels.nearest_code`; it keeps all N x K scores."""
    return nearest_of(_candidates, x, codebook, shortlist)


def _candidates(x, codebook, number):
    # Not a pair of conversions, which the compiler may leave out.
    half = [
        jax.lax.reduce_precision(array.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
        for array in (x, codebook)
    ]
    product = jnp.einsum("nd,kd->kn", *half, precision=jax.lax.Precision.HIGHEST)
    square = jnp.square(codebook.astype(jnp.float32)).sum(axis=1)
    scores = 0.5 * square[:, None] - product
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    missing = -len(codebook) % CLASSES
    scores = jnp.pad(scores, ((0, missing), (0, 0)), constant_values=jnp.inf)
    scores = scores.reshape(-1, CLASSES, len(x))
    code = jnp.argmin(scores, axis=0) * CLASSES + jnp.arange(CLASSES)[:, None]
    return shortlist_of(scores.min(axis=0), code.astype(jnp.int32), number)
