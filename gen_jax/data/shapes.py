"""Coloured shapes: a small world of images whose distribution is known exactly.

Every combination of shape, colour, size, row and column is drawn once, so the set is the
support of a uniform distribution over 648 images: its entropy is ln 648, the likelihood of a model
has a known floor, and any sample can be checked against the nearest image of the support.
"""

import itertools
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float64, Int32, Int64, Integer, UInt8

from gen_jax.config import frozen
from gen_jax.data.images import Images

__all__ = ["COLOURS", "GRID", "PALETTE", "SHAPES", "SIZES", "ShapesSet"]

# Whether a point (x, y) of the square [-1, 1]^2, y downwards, lies inside of a shape.
_OUTLINES = {
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "triangle": lambda x, y: abs(x) <= (y + 1) / 2 + 0.0635,
    "plus": lambda x, y: np.minimum(abs(x), abs(y)) <= 0.25,
    "cross": lambda x, y: abs(abs(x) - abs(y)) <= 0.27,
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.6**2),
}
SHAPES = tuple(_OUTLINES)
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SIZES = ("small", "large")
GRID = 3

# Corners of the RGB cube: any two differ by the full range of at least one channel.
PALETTE = np.array(
    [
        (0, 0, 0),
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 0),
        (255, 0, 255),
        (0, 255, 255),
    ],
    np.uint8,
)
PALETTE.setflags(write=False)

# Sides of the objects in an image of 16 pixels: the offsets of a grid of 3 then step by exactly
# 4 and 2 pixels, and every object stays inside. With these sizes and outlines any two images of
# the set differ by a mean squared error above 0.06 on the scale [-1, 1], and a blank one by 0.14.
_SIDES = (8, 12)
_BYTES = 1 << 25


@frozen
class ShapesSet:
    """The shapes set at one resolution; its arrays are made once and are read-only.

    There are 6 shapes x 6 colours x 2 sizes x 3 rows x 3 columns = 648 images, in the order of
    `itertools.product` over those attributes.

    Attributes:
      size: side of the images in pixels, 16 or 32; an object of the larger set is the same
        outline drawn at twice the scale.

    Raises:
      ValueError: another size.
    """

    size: Literal[16, 32] = 16

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the columns of `attributes`."""
        return ("shape", "colour", "size", "row", "column")

    @property
    def attribute_values(self) -> tuple[tuple[str, ...], ...]:
        """For each attribute, the names of its values."""
        places = tuple(str(place) for place in range(1, GRID + 1))
        return (SHAPES, COLOURS, SIZES, places, places)

    @cached_property
    def attributes(self) -> Int32[np.ndarray, "examples 5"]:
        """For each image, the index of the value of each attribute."""
        values = [range(len(names)) for names in self.attribute_values]
        return _frozen(np.array(list(itertools.product(*values)), np.int32))

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """A sentence for each image, true of no other."""
        return tuple(
            f"a {size} {colour} {shape} in row {row}, column {column}"
            for shape, colour, size, row, column in itertools.product(*self.attribute_values)
        )

    @property
    def entropy(self) -> float:
        """ln 648, in nats per image."""
        return float(np.log(len(self)))

    def __len__(self) -> int:
        return len(self.attributes)

    def images(
        self, palette: bool = False
    ) -> UInt8[np.ndarray, "examples side side 3"] | UInt8[np.ndarray, "examples side side"]:
        """All images of the set.

        Args:
          palette: give indices into `PALETTE`, where 0 is the background, instead of RGB.

        Returns:
          RGB, or indices in [0, 7).
        """
        return self._indices if palette else self._rgb

    def total_correlation(self, palette: bool = False) -> float:
        """How much the pixels of an image tell about each other, exactly, in nats.

        It is the sum of the entropies of the single pixels less the entropy of the image: the
        least KL divergence from the set to a model that draws all pixels
        independently (Watanabe, 1960). A pixel is one variable of 7 colours, so RGB and palette
        indices give the same number.

        Args:
          palette: read the pixels of the palette images instead of those of the RGB images.
        """
        images = self.images(palette)
        if not palette:
            images = images.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
        marginals = 0.0
        for values in images.reshape(len(self), -1).T:
            _, counts = np.unique(values, return_counts=True)
            probabilities = counts / len(self)
            marginals -= float(np.sum(probabilities * np.log(probabilities)))
        return marginals - self.entropy

    def nearest(
        self,
        images: Float[Any, "B side side 3"] | Integer[Any, "B side side"],
    ) -> tuple[Int64[np.ndarray, " B"], Float64[np.ndarray, " B"]]:
        """The nearest image of the set, in mean squared error on the scale [-1, 1].

        Args:
          images: RGB, nominally in [-1, 1], or palette indices in [0, 7), which are compared by
            their colours.

        Returns:
          The index into the set, and the error, a mean over pixels and channels.

        Raises:
          ValueError: another shape or dtype, an index outside the palette, or a value that is
            not finite.
        """
        samples = self._as_floats(images)
        support = self._flat
        norms = np.einsum("nd,nd->n", support, support)
        index = np.empty(len(samples), np.int64)
        mse = np.empty(len(samples), np.float64)
        chunk = max(1, _BYTES // (4 * (len(support) + 4 * support.shape[1])))
        for begin in range(0, len(samples), chunk):
            part = slice(begin, begin + chunk)
            scores = samples[part] @ support.T
            index[part] = np.argmin(norms - 2 * scores, axis=1)
            difference = samples[part].astype(np.float64) - support[index[part]]
            mse[part] = np.mean(np.square(difference), axis=1)
        return index, mse

    def as_images(self, palette: bool = False) -> Images:
        """The set as a data set, which is its own test set: it is the whole distribution.

        Labels are the pairs of shape and colour, `6 * shape + colour`, 36 in all.

        Args:
          palette: give palette indices instead of RGB.
        """
        return Images(
            images=self.images(palette),
            labels=self.attributes[:, 0] * len(COLOURS) + self.attributes[:, 1],
            label_names=tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS),
            captions=self.captions,
        )

    @cached_property
    def _indices(self) -> np.ndarray:
        images = np.zeros((len(self), self.size, self.size), np.uint8)
        scale = self.size // 16
        for image, (shape, colour, size, row, column) in zip(images, self.attributes, strict=True):
            side = _SIDES[size] * scale
            gap = (self.size - side) // (GRID - 1)
            window = image[row * gap : row * gap + side, column * gap : column * gap + side]
            window[_inside(SHAPES[shape], side)] = colour + 1
        return _frozen(images)

    @cached_property
    def _rgb(self) -> np.ndarray:
        return _frozen(PALETTE[self._indices])

    @cached_property
    def _flat(self) -> np.ndarray:
        return _frozen(_to_float(self._rgb).reshape(len(self), -1))

    def _as_floats(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        side = self.size
        if images.shape[1:] == (side, side) and np.issubdtype(images.dtype, np.integer):
            if images.size and (images.min() < 0 or images.max() >= len(PALETTE)):
                raise ValueError(
                    f"palette indices span {images.min()}..{images.max()}; "
                    f"they must lie in 0..{len(PALETTE) - 1}"
                )
            images = _to_float(PALETTE[images])
        elif images.shape[1:] != (side, side, 3) or not np.issubdtype(images.dtype, np.floating):
            raise ValueError(
                f"images must be floats [B, {side}, {side}, 3] in [-1, 1] or palette indices "
                f"[B, {side}, {side}], not {images.dtype} {list(images.shape)}"
            )
        if not np.isfinite(images).all():
            raise ValueError("images hold values that are not finite; did the sampler diverge?")
        return images.reshape(len(images), -1).astype(np.float32)


def _inside(shape: str, side: int) -> np.ndarray:
    """bool [side, side]: which pixels of its square a shape covers."""
    centres = (2 * np.arange(side) + 1) / side - 1
    return _OUTLINES[shape](centres[None, :], centres[:, None])


def _to_float(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 127.5 - 1


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array
