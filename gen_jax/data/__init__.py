"""Data of images, text and sequences behind `batch(seed, step, size)`, a pure function."""

from gen_jax.data.config import DataConfig, Split, TextConfig
from gen_jax.data.images import Images
from gen_jax.data.markov import MarkovSource
from gen_jax.data.sequences import PixelSequences
from gen_jax.data.shapes import ShapesSet
from gen_jax.data.text import TokenStream, load_text

__all__ = [
    "DataConfig",
    "Images",
    "MarkovSource",
    "PixelSequences",
    "ShapesSet",
    "Split",
    "TextConfig",
    "TokenStream",
    "load",
    "load_text",
]


def load(config: DataConfig, split: Split) -> Images:
    """Reads one split of the data set that the configuration names.

    The shapes set is the whole of its distribution, so both of its splits are the same images.

    Args:
        config: the choice of a data set; `flip` is for the caller of `Images.batch`.
        split: "train" or "test".

    Raises:
        ValueError: the split is unknown, or the files are not what they should be.
        FileNotFoundError: there are no files where the configuration points.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; choose train or test")
    if config.name == "shapes":
        return ShapesSet(config.size).as_images(config.palette)
    if config.name == "cifar10":
        from gen_jax.data import cifar10

        return cifar10.read(config.dir, split)
    if config.name == "folder":
        from gen_jax.data import folder

        return folder.read(config.dir, split, config.size)
    from gen_jax.data import tfds_source

    return tfds_source.read(config.tfds_name, split, config.dir)
