"""What implementations with a shortlist share: few codes by bfloat16, the nearest by float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from kernels.nearest_code.halves import differentiable
from kernels.nearest_code.reference import squared_distance

__all__ = ["CLASSES", "nearest_of", "shortlist_of"]

CLASSES = 8  # of codes, by their number: one for each sublane of a TPU
_LAST = jnp.iinfo(jnp.int32).max


def nearest_of(candidates_of, x, codebook, shortlist):
    """The nearest code, in float32, of those that candidates_of(x, codebook, number) names.

    Its gradient is that of the distance to the code that it finds.
    """
    number = min(shortlist, codebook.shape[0])

    def search(x, codebook):
        return _reranked(x, codebook, candidates_of(x, codebook, number))

    return differentiable(search)(x, codebook)


def shortlist_of(
    score: Float32[Array, "classes N"], code: Int32[Array, "classes N"], number: int
) -> Int32[Array, "number N"]:
    """The codes of the least scores among the best of each class; of equals the lower ones."""
    chosen = []
    for _ in range(number):
        one = _first_of_the_least(score, code)
        chosen.append(one)
        score = jnp.where(code == one[None], jnp.inf, score)
    return jnp.stack(chosen)


def _first_of_the_least(score, code):
    return jnp.where(score == score.min(axis=0, keepdims=True), code, _LAST).min(axis=0)


def _reranked(x, codebook, candidates):
    x, codebook = x.astype(jnp.float32), codebook.astype(jnp.float32)
    rows = codebook[candidates]  # [n, N, D]
    product = jnp.einsum("nd,mnd->mn", x, rows, precision=jax.lax.Precision.HIGHEST)
    score = 0.5 * jnp.square(rows).sum(axis=2) - product
    least = score.min(axis=0)
    index = jnp.where(jnp.isnan(least), 0, _first_of_the_least(score, candidates))
    return index, squared_distance(x, least)
