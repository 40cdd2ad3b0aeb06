"""Images as sequences of tokens in raster order: rows, then columns, then channels."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gen_jax.data.images import Images
from gen_jax.data.text import check_tokens


@dataclass(frozen=True, eq=False)
class PixelSequences:
    """A set of images as sequences of L tokens.

    Images [N, H, W, C] give L = H W C tokens of 256 values, the channels of a pixel side by side;
    palette indices [N, H, W] give L = H W.

    Args:
        images: the set.
    """

    images: Images

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) or (H, W) of one image."""
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
            "tokens": int32 [size / count, L] and "label": int32 [size / count].
        """
        batch = self.images.batch(seed, step, size, flip=flip, shard=shard)
        return {"tokens": self.tokens_of(batch["image"]), "label": batch["label"]}

    def tokens_of(self, images: np.ndarray) -> np.ndarray:
        """Images as sequences.

        Args:
            images: integer [n, H, W, C] or [n, H, W], like those of the set.

        Returns:
            int32 [n, L], each in [0, vocabulary).

        Raises:
            ValueError: another shape or dtype, or a value out of range.
        """
        images = self._checked("images", images, self.shape)
        return images.reshape(len(images), self.length).astype(np.int32)

    def images_of(self, tokens: np.ndarray) -> np.ndarray:
        """The inverse of `tokens_of`.

        Args:
            tokens: integer [n, L], each in [0, vocabulary).

        Returns:
            uint8 [n, H, W, C] or [n, H, W].

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
                f"{name} must be integers [n, {', '.join(map(str, shape))}], "
                f"not {array.dtype} {list(array.shape)}"
            )
        check_tokens(array, self.vocabulary)
        return array
