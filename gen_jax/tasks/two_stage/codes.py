"""The codes of a data set, encoded once and kept in a file that is mapped into memory."""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gen_jax import array_files, checkpoint, evaluation, whole_file
from gen_jax.bounded import read_json
from gen_jax.data import Images
from gen_jax.data.exact import Enumerated
from gen_jax.models.diffusion.process import to_signal
from gen_jax.models.vq import Autoencoder

__all__ = ["CodeFiles", "distribution", "encoded"]

_BATCH = 256


def encoded(model: Autoencoder, params: Any, images: np.ndarray, latents: bool) -> np.ndarray:
    """The code sequences int32 [N, L] of images uint8, or their latents float32 [N, h, w, D].

    Latents are those before they are quantised, or the mean of a continuous one, over their
    deviation.
    """
    f = functools.partial(_encode, model, latents)
    return evaluation.map_rows(f, params, {"image": images}, _BATCH)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(model, latents, params, rows):
    x = to_signal(rows["image"])
    if not latents:
        return model.encode(params, x).code.reshape(len(x), -1)
    values = model.network.encode(params["network"], x, None)
    return model.quantiser.centre(values) / params["deviation"]


def distribution(codes: np.ndarray, vocabulary: int) -> Enumerated:
    """Of the code sequences [N, L] of equally likely images, which may share theirs."""
    distinct, counts = np.unique(codes.astype(np.int32), axis=0, return_counts=True)
    return Enumerated(distinct, counts / len(codes), vocabulary)


class CodeFiles:
    """The codes of images in files of a folder, which are read and compared with their digest once.

    Args:
      folder: of the files.
      images: the data sets by split.
      model: the autoencoder.
      latents: whether its latents are kept, not its codes; see `encoded`.
      mirrored: whether the training images mirrored left to right follow.

    Attributes:
      row, dtype: the shape and dtype of what one image gives.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        images: Mapping[str, Images],
        model: Autoencoder,
        latents: bool,
        mirrored: bool,
    ):
        self._folder, self._images = folder, images
        whole = model.latent_shape if latents else (math.prod(model.code_shape),)
        self.row, self.dtype = whole, np.dtype(np.float32 if latents else np.int32)
        self._mirrored = {split: mirrored and split == "train" for split in images}
        self._read: dict[pathlib.Path, np.ndarray] = {}

    def check(self, identity: str) -> None:
        """Reads the files of these images that are there.

        Args:
          identity: of `of`, or "*" where it is not known yet.

        Raises:
          ValueError: one of them is damaged.
        """
        for split in self._images:
            for record in sorted(self._folder.glob(self._name(split, identity) + ".json")):
                path = record.with_suffix(".npy")
                if path.exists():
                    self._read[path] = self._map(path, split, record)

    def of(
        self, split: str, identity: str, encode: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """The codes of a split, from its file, which is written where it is not there.

        Args:
          split: of the images.
          identity: the digest of the autoencoder, and of what is kept of its output.
          encode: images uint8 to codes.

        Returns:
          An array [N, ...] or, with the mirrored images, [2 N, ...], mapped into memory, read only.

        Raises:
          ValueError: the file is damaged.
        """
        path = self._folder / f"{self._name(split, identity)}.npy"
        record = path.with_suffix(".json")
        if path not in self._read:
            is_there = path.exists() and record.exists()
            if not is_there:
                whole = self._images[split].images
                if self._mirrored[split]:
                    whole = np.concatenate([whole, whole[:, :, ::-1]])
                _write(path, record, encode(whole))
            self._read[path] = self._map(path, split, record if is_there else None)
        return self._read[path]

    def _name(self, split, identity):
        end = "-mirrored" if self._mirrored[split] else ""
        return f"{split}-{identity[:12]}-{self._images[split].digest[:12]}{end}"

    def _map(self, path, split, record=None):
        """A file of codes, compared with the digest in its record where one is given."""
        number = len(self._images[split]) * (1 + self._mirrored[split])
        try:
            codes = array_files.map_npy(path, (number, *self.row), self.dtype)
            whole = record is None or read_json(record)["digest"] == checkpoint.digest(codes)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise _damaged(path) from error
        if not whole:
            raise _damaged(path)
        return codes


def _damaged(path):
    return ValueError(f"{path} is damaged: remove it, and it is written again")


def _write(path, record, codes):
    """Both files whole, the codes first."""
    with whole_file.replacing(path) as file:
        np.save(file, codes)
    whole_file.write(record, json.dumps({"digest": checkpoint.digest(codes)}))
