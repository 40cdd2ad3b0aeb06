"""Which data set to read, as the command line and the experiments state it.

Importing this module loads nothing heavy, not even NumPy.
"""

from typing import Literal

from gen_jax.config import frozen

__all__ = ["DataConfig", "Split", "TextConfig", "TranslationConfig", "TranslationSplit"]

Split = Literal["train", "test"]
TranslationSplit = Literal["train", "validation", "test"]


@frozen
class DataConfig:
    """The choice of a data set and of how its images are presented.

    Raises:
      ValueError: a field is out of range, or asks of a set what it does not offer.
    """

    name: Literal["shapes", "cifar10", "folder", "tfds"] = "shapes"
    """shapes (embedded, nothing to download), cifar10 (official files), folder (images) or tfds."""
    dir: str = ""
    """Folder of cifar-10-batches-bin or -py, of the images, or the TFDS data_dir."""
    size: int = 16
    """Side in pixels: 16 or 32 for shapes; images of a folder are cropped and resized to it."""
    palette: bool = False
    """Shapes only: indices of a palette [height, width] instead of RGB [height, width, 3]."""
    tfds_name: str = "cifar10"
    """Name of the set in TensorFlow Datasets, for name=tfds."""
    flip: bool = False
    """Flip each training image left to right with probability one half."""
    max_pixels: int = 2**26
    """Folder only: most pixels of an image as it is stored; a larger one is refused."""

    def __post_init__(self):
        if self.name == "shapes" and self.size not in (16, 32):
            raise ValueError(
                f"data.size is {self.size}; the shapes set is drawn at 16 or 32 pixels"
            )
        if self.size < 1:
            raise ValueError(f"data.size is {self.size}; give a number of pixels of at least 1")
        if self.max_pixels < 1:
            raise ValueError(f"data.max_pixels is {self.max_pixels}; give a number of at least 1")
        if self.palette and self.name != "shapes":
            raise ValueError(f"data.palette is for data.name=shapes only, not {self.name}")
        if self.name == "folder" and not self.dir:
            raise ValueError("data.name=folder needs --data.dir, the folder that holds the images")
        _check_tfds_name(self)


@frozen
class TextConfig:
    """The choice of a text and of how it is split.

    Raises:
      ValueError: a field is out of range, or asks of a text what it does not offer.
    """

    name: Literal["pydoc", "file", "tfds"] = "pydoc"
    """pydoc (English that comes with Python, nothing to download), file (UTF-8) or tfds."""
    path: str = ""
    """The text file, for name=file, also .gz."""
    dir: str = ""
    """The TFDS data_dir, for name=tfds; empty for its default."""
    tfds_name: str = "lm1b"
    """Name of the set in TensorFlow Datasets, for name=tfds; its feature `text` is read."""
    validation: float = 0.1
    """The last share of a pydoc or file text, held out as the test split; TFDS has its own."""
    characters: int = 0
    """Read at most this many characters of the text, or of a split of TFDS; 0 for all."""
    max_bytes: int = 2**30
    """Most bytes of a text; a larger one is refused, unless `characters` of a file are given."""

    def __post_init__(self):
        if self.name == "file" and not self.path:
            raise ValueError("data.name=file needs --data.path, a UTF-8 text file")
        if self.path and self.name != "file":
            raise ValueError(f"data.path is for data.name=file only, not {self.name}")
        _check_tfds_name(self)
        if not 0 < self.validation < 1:
            raise ValueError(f"data.validation is {self.validation}; give a share between 0 and 1")
        if self.characters < 0:
            raise ValueError(f"data.characters is {self.characters}; give 0 for all, or a number")
        if self.max_bytes < max(self.characters, 1):
            raise ValueError(
                f"data.max_bytes is {self.max_bytes}; give a number from 1 up, and from "
                "data.characters up"
            )


@frozen
class TranslationConfig:
    """The choice of pairs of sentences and of how they become tokens.

    Raises:
      ValueError: a field is out of range, or asks of a set what it does not offer.
    """

    name: Literal["synonyms", "files", "tfds"] = "synonyms"
    """synonyms (procedural, nothing to download), files (one sentence per line) or tfds."""
    dir: str = ""
    """Folder of {train,val,test_2016_flickr}.{en,de}, also .gz, or the TFDS data_dir."""
    source: str = "en"
    """Language to translate from: the suffix of its files, or its feature in TFDS."""
    target: str = "de"
    """Language to translate to."""
    tfds_name: str = "wmt16_translate/de-en"
    """Name of the set in TensorFlow Datasets, for name=tfds."""
    vocabulary: int = 4000
    """Tokens of the byte-pair vocabulary that both languages share; files and tfds only."""
    max_length: int = 40
    """Most tokens of a side with its EOS; longer training pairs are left out, others truncated."""
    pairs: int = 0
    """Read only this many training pairs, the first ones; 0 for all, or 50000 synonyms."""
    targets: str = ""
    """UTF-8 file with one line per training pair that replaces its target: distillation."""
    max_bytes: int = 2**30
    """Most bytes of a file of sentences, unpacked, and 64 times its most lines; or of TFDS."""
    words: int = 64
    """Synonyms only: source words, from 1 up."""
    min_words: int = 3
    """Synonyms only: fewest words of a source."""
    max_words: int = 8
    """Synonyms only: most words of a source, which are distinct."""
    orders: Literal[1, 2] = 2
    """Synonyms only: 2 for targets in the order of the source or its reverse, 1 for the former."""
    styles: Literal[1, 2] = 2
    """Synonyms only: 2 for targets that are formal or informal, 1 for formal alone."""
    seed: int = 0
    """Synonyms only: decides the dictionary and the pairs."""

    def __post_init__(self):
        if self.name == "files" and not self.dir:
            raise ValueError("data.name=files needs --data.dir, the folder that holds the files")
        _check_tfds_name(self)
        if self.name == "synonyms" and self.dir:
            raise ValueError("data.dir is for data.name=files or tfds only, not synonyms")
        if not self.source or not self.target or self.source == self.target:
            raise ValueError(
                f"data.source {self.source!r} and data.target {self.target!r} must be two languages"
            )
        least = {"vocabulary": 258, "max_length": 2, "pairs": 0, "seed": 0, "max_bytes": 1}
        for field, low in least.items():
            if getattr(self, field) < low:
                raise ValueError(f"data.{field} is {getattr(self, field)}; give at least {low}")
        if not 1 <= self.min_words <= self.max_words <= self.words:
            raise ValueError(
                f"data.min_words {self.min_words}, data.max_words {self.max_words} and data.words "
                f"{self.words} must rise, from 1 up: the words of a source are distinct"
            )


def _check_tfds_name(config: DataConfig | TextConfig | TranslationConfig) -> None:
    if config.name == "tfds" and not config.tfds_name:
        raise ValueError("data.name=tfds needs --data.tfds-name, the name of a TFDS data set")
