"""Images as sequences of tokens in raster order: rows, then columns, then channels.

A token is a value, or a square of pixels from a dictionary.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Int32, Integer, UInt8

from gen_jax.data.images import Images
from gen_jax.data.streams import check_tokens

__all__ = ["PixelSequences"]


@dataclass(frozen=True, eq=False)
class PixelSequences:
    """A set of images as sequences of L tokens.

    Images [height, width, C] give L = height x width x C tokens of 256 values, the channels of a
    pixel side by side; palette indices [height, width] give L = height x width. With a patch above
    1, palette indices give one token for each square of patch x patch pixels: its place in the
    dictionary of all squares of the set.

    Attributes:
      images: the set.
      patch: side of the squares; 1 for single pixels.

    Raises:
      ValueError: the patch is of images that are no palette indices, or does not divide their
        sides.
    """

    images: Images
    patch: int = 1

    def __post_init__(self):
        if self.patch == 1:
            return
        if len(self.shape) != 2 or self.patch < 1 or any(side % self.patch for side in self.shape):
            raise ValueError(
                f"a patch of {self.patch} does not fit images of "
                f"{' x '.join(map(str, self.shape))}: it divides the sides of palette images"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """A hash of all images and labels."""
        return self.images.digest

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, C) or (height, width) of one image."""
        return self.images.images.shape[1:]

    @property
    def length(self) -> int:
        """L, the number of tokens of an image."""
        return math.prod(self.shape) // self.patch**2

    @cached_property
    def dictionary(self) -> UInt8[np.ndarray, "vocabulary values"]:
        """The squares that the tokens stand for, row by row, in lexicographic order."""
        return np.unique(_squares(self.images.images, self.patch), axis=0)

    @cached_property
    def vocabulary(self) -> int:
        """256; or one more than the largest index of the set, `len(shapes.PALETTE)` for shapes; or
        the size of the dictionary."""
        if self.patch > 1:
            return len(self.dictionary)
        return 256 if len(self.shape) == 3 else int(self.images.images.max()) + 1

    def batch(
        self,
        seed: int,
        step: int,
        size: int,
        *,
        flip: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> dict[str, np.ndarray]:
        """The batch of `Images.batch`, whose arguments and errors these are, as tokens.

        Returns:
          "tokens": int32 [B, L] and "label": int32 [B], with B = size / count.
        """
        batch = self.images.batch(seed, step, size, flip=flip, shard=shard)
        return {"tokens": self.tokens_of(batch["image"]), "label": batch["label"]}

    def tokens_of(self, images: Integer[Any, "B ..."]) -> Int32[np.ndarray, "B L"]:
        """Images as sequences.

        Args:
          images: [B, height, width, C] or [B, height, width], like those of the set.

        Returns:
          Tokens, each in [0, vocabulary).

        Raises:
          ValueError: another shape or dtype, a value out of range, or a square that is not in the
            dictionary.
        """
        if self.patch == 1:
            images = self._checked("images", images, self.shape)
            check_tokens(images, self.vocabulary)
            return images.reshape(len(images), self.length).astype(np.int32)
        squares = _squares(self._checked("images", images, self.shape), self.patch)
        both, places = np.unique(
            np.concatenate([self.dictionary, squares]), axis=0, return_inverse=True
        )
        if len(both) > len(self.dictionary):
            raise ValueError("an image has squares of pixels that are not in the dictionary")
        places = places.reshape(-1)[len(self.dictionary) :]
        return places.reshape(-1, self.length).astype(np.int32)

    def images_of(self, tokens: Integer[Any, "B L"]) -> UInt8[np.ndarray, "B ..."]:
        """The inverse of `tokens_of`.

        Args:
          tokens: each in [0, vocabulary).

        Returns:
          Images [B, height, width, C] or [B, height, width].

        Raises:
          ValueError: another length or dtype, or a token out of range.
        """
        tokens = self._checked("tokens", tokens, (self.length,))
        check_tokens(tokens, self.vocabulary)
        if self.patch == 1:
            return tokens.reshape(len(tokens), *self.shape).astype(np.uint8)
        height, width = (side // self.patch for side in self.shape)
        return rearrange(
            self.dictionary[tokens],
            "b (h w) (p q) -> b (h p) (w q)",
            h=height,
            w=width,
            p=self.patch,
        )

    def _checked(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        array = np.asarray(array)
        if (
            array.ndim != len(shape) + 1
            or array.shape[1:] != shape
            or not np.issubdtype(array.dtype, np.integer)
        ):
            raise ValueError(
                f"{name} must be integers [B, {', '.join(map(str, shape))}], "
                f"not {array.dtype} {list(array.shape)}"
            )
        return array


def _squares(images, patch):
    """Images [B, height, width] as squares [B x L, patch x patch]."""
    return rearrange(images, "b (h p) (w q) -> (b h w) (p q)", p=patch, q=patch)
