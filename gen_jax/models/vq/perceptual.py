"""Distances of images in the space of any features, as a term of the loss of an autoencoder.

The distance of Zhang et al. 2018 (1801.03924, eq. 1), which is LPIPS where the maps are those of
its network, of unit length at each position (`unit_channels`), times its learned weights:

    d(x, y) = sum_l  mean over positions of  |f_l(x) - f_l(y)|^2

The features that come with us need no download: the bands of an image, which are no LPIPS.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from gen_jax.config import frozen

__all__ = ["LaplacianPyramid", "Perceptual", "perceptual_distance", "unit_channels"]

_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
_EPSILON = 1e-10


@runtime_checkable
class Perceptual(Protocol):
    """A feature function: frozen and hashable.

    One with weights may be hashable by identity (`dataclass(frozen=True, eq=False)`).
    """

    def features(self, x: Float[Array, "B height width C"]) -> Sequence[Float[Array, "B _ _ _"]]:
        """Maps [B, h, w, F] of features of images in [-1, 1], of any sizes; differentiable."""


def perceptual_distance(
    perceptual: Perceptual,
    x: Float[Array, "B height width C"],
    y: Float[Array, "B height width C"],
) -> Float[Array, ""]:
    """The distance in the equation above, a mean over the batch, float32."""
    pairs = zip(perceptual.features(x), perceptual.features(y), strict=True)
    terms = [jnp.square((a - b).astype(jnp.float32)).sum(axis=-1).mean() for a, b in pairs]
    return jnp.stack(terms).sum()


def unit_channels(features: Float[Array, "B h w F"]) -> Float[Array, "B h w F"]:
    """Features of length 1 at each position, as in LPIPS (1801.03924, section 3)."""
    square = jnp.square(features).sum(axis=-1, keepdims=True)
    return features / jnp.sqrt(square + _EPSILON)


@frozen
class LaplacianPyramid:
    """The bands of an image from fine to coarse, and what is left of it (Burt & Adelson 1983).

    A band is x - b(x), where b is the binomial filter 1 4 6 4 1 along both axes, with edges
    continued; the next one is of every second pixel of b(x). As a term is a mean over positions, an
    error of a coarse band weighs four times that of the next finer one, as in Bojanowski et al.
    2018 (1707.05776), whose norm is absolute.

    Attributes:
      levels: the number of bands.

    Raises:
      ValueError: at construction, where there is none.
    """

    levels: int = 3

    def __post_init__(self):
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1, got {self.levels}")

    def features(self, x: Float[Array, "B height width C"]) -> list[Float[Array, "B _ _ C"]]:
        """The bands, and the image that is left, which has 1 / 2^levels of the side."""
        maps = []
        for _ in range(self.levels):
            smooth = _smooth(_smooth(x, 1), 2)
            maps.append(x - smooth)
            x = smooth[:, ::2, ::2]
        return [*maps, x]


def _smooth(x, axis):
    """The binomial filter along an axis."""
    size, places = x.shape[axis], [(2, 2) if i == axis else (0, 0) for i in range(x.ndim)]
    padded = jnp.pad(x, places, mode="edge")
    parts = [
        weight * padded[(slice(None),) * axis + (slice(i, i + size),)]
        for i, weight in enumerate(_BINOMIAL)
    ]
    return sum(parts[1:], parts[0])
