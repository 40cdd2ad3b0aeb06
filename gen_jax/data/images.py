"""A data set of images in memory, whose batches are a pure function of (seed, step)."""

import functools
import hashlib
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from gen_jax.data.streams import check_batch, generator, shard_slice

__all__ = ["Images"]

# Separate random streams: the key of a Philox generator is (seed, stream + counter).
_EPOCHS = 0
_FLIPS = 1 << 62


@dataclass(frozen=True, eq=False)
class Images:
    """Images with labels, all in memory.

    Attributes:
      images: bytes, or indices of a palette where there is no axis C; at least one image.
      labels: one per image, each in [0, len(label_names)).
      label_names: one name per label.
      captions: one sentence per image, or empty.

    Raises:
      ValueError: an array has another dtype or shape, or a label has no name.
    """

    images: (
        UInt8[np.ndarray, "examples height width C"] | UInt8[np.ndarray, "examples height width"]
    )
    labels: Int32[np.ndarray, " examples"]
    label_names: tuple[str, ...]
    captions: tuple[str, ...] = ()
    _order: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        count = len(self.images)
        if self.images.dtype != np.uint8 or self.images.ndim not in (3, 4) or count == 0:
            raise ValueError(
                "images must be uint8 [examples, height, width] or [examples, height, width, C], "
                "at least one, "
                f"not {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.dtype != np.int32 or self.labels.shape != (count,):
            raise ValueError(
                f"labels must be int32 [{count}], not {self.labels.dtype} {list(self.labels.shape)}"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.label_names):
            raise ValueError(
                f"labels span {low}..{high} but there are {len(self.label_names)} label names"
            )
        if self.captions and len(self.captions) != count:
            raise ValueError(f"there are {len(self.captions)} captions for {count} images")

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of all images and labels."""
        total = hashlib.blake2b(str(self.images.shape).encode(), digest_size=16)
        for values in (self.images, self.labels):
            total.update(np.ascontiguousarray(values))
        return total.hexdigest()

    def indices(self, seed: int, step: int, size: int) -> Int64[np.ndarray, " {size}"]:
        """The examples of one global batch.

        The stream of all batches is a chain of epochs; each epoch is a permutation of all
        examples that depends on (seed, epoch) alone, so none is dropped or repeated within it.

        Args:
          seed: in [0, 2**64).
          step: from 0 up.
          size: examples per global batch, from 1 up; may exceed their number.

        Returns:
          The numbers of the examples, each from 0 up.

        Raises:
          ValueError: an argument is out of range.
        """
        check_batch(seed, step, size)
        count = len(self)
        first, last = step * size, (step + 1) * size
        parts = []
        for epoch in range(first // count, -(-last // count)):
            begin = max(first - epoch * count, 0)
            parts.append(self._permutation(seed, epoch)[begin : last - epoch * count])
        return np.concatenate(parts)

    def batch(
        self,
        seed: int,
        step: int,
        size: int,
        *,
        flip: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> dict[str, np.ndarray]:
        """This shard of the batch of a training step, a pure function of its arguments.

        Args:
          seed: in [0, 2**64).
          step: from 0 up.
          size: examples per global batch, over all shards; may exceed their number.
          flip: mirror each image left to right with probability one half.
          shard: (index, count); the shards in order, concatenated, are the whole batch.

        Returns:
          "image": uint8 [B, height, width, C], or [B, height, width] where there is a palette; and
          "label": int32 [B], with B = size / count.

        Raises:
          ValueError: an argument is out of range, or count does not divide size.
        """
        mine = shard_slice(size, shard)
        chosen = self.indices(seed, step, size)[mine]
        images = self.images[chosen]
        if flip:
            draws = generator(seed, _FLIPS + step).integers(0, 2, size, dtype=np.uint8)[mine]
            mirror = draws.astype(bool)
            images[mirror] = images[mirror, :, ::-1]
        return {"image": images, "label": self.labels[chosen]}

    def _permutation(self, seed: int, epoch: int) -> np.ndarray:
        # The entry is replaced as a whole, so that concurrent readers see a consistent pair.
        key, order = self._order.get("last", (None, None))
        if key != (seed, epoch):
            order = generator(seed, _EPOCHS + epoch).permutation(len(self))
            self._order["last"] = ((seed, epoch), order)
        return order
