"""Reads the images that a configuration names."""

from typing import get_args

from gen_jax import data
from gen_jax.data import cifar10, folder
from gen_jax.data.config import DataConfig, Split
from gen_jax.data.images import Images
from gen_jax.data.shapes import ShapesSet

__all__ = ["load"]


def load(config: DataConfig, split: Split) -> Images:
    """Reads one split of the data set that the configuration names.

    The shapes set is the whole of its distribution, so both of its splits are the same images.

    Args:
      config: the choice of a data set; `flip` is for the caller of `Images.batch`.
      split: "train" or "test".

    Raises:
      ValueError: the split is unknown, or the files are not what they should be.
      FileNotFoundError: there are no files where the configuration points.
      ConnectionError: a set of TFDS could not be downloaded.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; choose train or test")
    match config.name:
        case "shapes":
            return ShapesSet(config.size).as_images(config.palette)
        case "cifar10":
            return cifar10.read(config.dir, split)
        case "folder":
            return folder.read(config.dir, split, config.size, config.max_pixels)
        case "tfds":
            return data.tfds_source.read(config.tfds_name, split, config.dir)
