"""Images as sequences of tokens in raster order: rows, then columns, then channels."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from gen_jax.data.images import Images
from gen_jax.data.streams import check_tokens

__all__ = ["PixelSequences"]


@dataclass(frozen=True, eq=False)
class PixelSequences:
    """A set of images as sequences of L tokens.

    Images [height, width, C] give L = height x width x C tokens of 256 values, the channels of a
    pixel side by side; palette indices [height, width] give L = height x width.

    Attributes:
      images: the set.
    """

    images: Images

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, C) or (height, width) of one image."""
        return self.images.images.shape[1:]

    @property
    def length(self) -> int:
        """L, the number of tokens of an image."""
        return math.prod(self.shape)

    @cached_property
    def vocabulary(self) -> int:
        """256, or one more than the largest index of the set: `len(shapes.PALETTE)` for shapes."""
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
          ValueError: another shape or dtype, or a value out of range.
        """
        images = self._checked("images", images, self.shape)
        return images.reshape(len(images), self.length).astype(np.int32)

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
        return tokens.reshape(len(tokens), *self.shape).astype(np.uint8)

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
        check_tokens(array, self.vocabulary)
        return array
