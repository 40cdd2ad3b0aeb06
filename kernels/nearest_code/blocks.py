"""nearest_code over blocks of vectors and of codes, whose distances fit in a core's cache.

A whole row of distances is searched in two passes that compilers vectorise, the least value and
then the first place where it stands: an arg-min with its pairs of value and index is not vectorised
on CPUs. The least values of the blocks before are carried along.
"""

import jax
import jax.numpy as jnp

from kernels.dispatch import EVERYWHERE, register
from kernels.nearest_code.reference import scores, squared_distance

__all__ = ["nearest_code"]

_VECTORS, _CODES = 512, 1024  # in a block: two megabytes of distances


def _needs_blocks(x, codebook):
    return x.shape[0] * codebook.shape[0] > _VECTORS * _CODES


@register("nearest_code", "blocks", default_on=EVERYWHERE, default_when=_needs_blocks)
def nearest_code(x, codebook):
    """See `kernels.nearest_code`."""
    x, codebook = x.astype(jnp.float32), codebook.astype(jnp.float32)
    number, width = x.shape
    size = min(number, _VECTORS)
    blocks = jnp.pad(x, ((0, -number % size), (0, 0))).reshape(-1, size, width)
    index, distance = jax.lax.map(lambda block: _search(block, codebook), blocks)
    return index.reshape(-1)[:number], distance.reshape(-1)[:number]


def _search(x, codebook):
    """Of one block of vectors: blocks of codes in turn, the last of which may be shorter."""
    number, size = codebook.shape[0], min(codebook.shape[0], _CODES)
    best = jnp.full_like(x[:, 0], jnp.inf), jnp.zeros_like(x[:, 0], jnp.int32)

    def block(i, best):
        codes = jax.lax.dynamic_slice_in_dim(codebook, i * size, size)
        return _better(best, x, codes, i * size)

    whole = number // size
    best = jax.lax.fori_loop(0, whole, block, best)
    if number % size:
        best = _better(best, x, codebook[whole * size :], whole * size)
    return best[1], squared_distance(x, best[0])


def _better(best, x, codes, first):
    """(least score, its index) after the codes first, first + 1, ..."""
    ours = scores(x, codes)
    least = ours.min(axis=1)
    places = jnp.arange(codes.shape[0], dtype=jnp.int32)
    place = jnp.where(ours == least[:, None], places[None], codes.shape[0]).min(axis=1)
    better = least < best[0]
    return jnp.where(better, least, best[0]), jnp.where(better, first + place, best[1])
