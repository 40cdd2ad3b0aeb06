"""Images and text from TensorFlow Datasets, read and prepared without TensorFlow.

A set that is prepared in a format of random access (array_record) is read by NumPy alone. TFDS
prepares CIFAR-10 with TensorFlow; the builder here prepares it without, and the result is the
same data set, readable by any other user of TFDS.

A data set is files, and nothing in them is run: TFDS imports the module of any feature that a file
names, and Pillow starts Ghostscript for an image that is PostScript; both are refused here.

Importing this module takes two seconds, for tensorflow_datasets. The rest of the package reaches it
as `gen_jax.data.tfds_source`, which is imported at its first use.
"""

import contextlib
import functools
import importlib
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from PIL import EpsImagePlugin, Image
from tensorflow_datasets.core.download import download_manager
from tensorflow_datasets.image_classification import cifar

from gen_jax import memory
from gen_jax.bounded import LARGEST_JSON
from gen_jax.data import cifar10
from gen_jax.data.config import Split
from gen_jax.data.images import Images

__all__ = ["read", "read_pairs", "read_text"]

_ARCHIVE = "cifar-10-binary.tar.gz"
_TIMEOUT_SECONDS = 20


def _only_files(read: Callable) -> Callable:
    """Refuses files of a data set that are larger than any, or would run something."""

    @functools.wraps(read)
    def reading(name, split, directory="", *arguments):
        place = _data_dir(directory) / re.split("[/:]", name)[0]
        for path in place.rglob("*"):
            if path.suffix in (".json", ".txt") and path.is_file():
                size = path.stat().st_size
                if size > LARGEST_JSON:
                    raise ValueError(
                        f"{path} has {size} bytes, and at most {LARGEST_JSON} are read"
                    )
        with _nothing_in_files_is_run(place):
            return read(name, split, directory, *arguments)

    return reading


@contextlib.contextmanager
def _nothing_in_files_is_run(place: Path) -> Iterator[None]:
    """Refuses features of other packages than TFDS, and leaves Ghostscript alone.

    Raises:
      ValueError: a file in this place names such a feature, or a picture is too large for Pillow.
    """
    connector, refused = tfds.features.FeatureConnector, []
    find, ghostscript = connector.__dict__["cls_from_name"], EpsImagePlugin.gs_binary

    def checked(cls, name):
        if name not in cls._registered_features and not name.startswith("tensorflow_datasets."):
            refused.append(name)
            raise ValueError(name)
        return find.__func__(cls, name)

    connector.cls_from_name, EpsImagePlugin.gs_binary = classmethod(checked), False
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"{place} has a picture that is too large ({error})") from None
    except Exception:
        if not refused:
            raise
        raise ValueError(
            f"features.json in {place} has a feature of the class {refused[0]}, whose module would "
            "be run: only features of TFDS itself are read"
        ) from None
    finally:
        connector.cls_from_name, EpsImagePlugin.gs_binary = find, ghostscript


@_only_files
def read(name: str, split: Split, directory: str | Path = "") -> Images:
    """Reads one split of a TFDS data set of images, decoded once into one array.

    Args:
      name: its name in TFDS. "cifar10" is downloaded and prepared when it is not there yet;
        its archive is taken from `<directory>/downloads/manual` where present. Any other
        set must be prepared already.
      split: "train" or "test".
      directory: the data_dir of TFDS; empty for its default.

    Returns:
      Images uint8 [examples, height, width, C] with labels, which are 0 where the set has none.

    Raises:
      ConnectionError: CIFAR-10 could not be downloaded.
      FileNotFoundError: the set is not prepared in the directory.
      ValueError: the archive has another checksum, the set is no set of images of one size, it has
        features of other packages, or more images than memory has room for.
    """
    data_dir = _data_dir(directory)
    builder = _prepared_cifar10(data_dir) if name == "cifar10" else _builder(name, data_dir)
    return _decode(name, _source(builder, name, split, data_dir))


@_only_files
def read_text(
    name: str, split: Split, directory: str | Path = "", characters: int = 0, most: int = 2**30
) -> str:
    """Reads one split of a TFDS data set of text: its documents, joined by line ends.

    Args:
      name: its name in TFDS; the set must be prepared already, and has a feature `text`.
      split: "train" or "test"; where the set has no test split, its validation split is read.
      directory: the data_dir of TFDS; empty for its default.
      characters: read at most this many characters; 0 for all.
      most: bytes that the documents may have.

    Raises:
      FileNotFoundError: the set is not prepared in the directory.
      ValueError: it has no such split, no feature `text`, features of other packages, more bytes,
        or a text that is not UTF-8.
    """
    data_dir = _data_dir(directory)
    builder = _builder(name, data_dir)
    splits = builder.info.splits
    if split == "test" and "test" not in splits and "validation" in splits:
        split = "validation"
    source = _source(builder, name, split, data_dir)
    features = source.dataset_info.features
    if "text" not in features or not isinstance(features["text"], tfds.features.Text):
        raise ValueError(f"the TFDS data set {name} holds no feature `text` of plain text")
    documents, length, size = [], 0, 0
    for index in range(len(source)):
        document = source[index]["text"]
        size += len(document)
        _check_bytes(name, size, most)
        try:
            documents.append(document.decode())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"example {index} of the TFDS data set {name} is not UTF-8 text ({error.reason})"
            ) from None
        length += len(documents[-1]) + 1
        if 0 < characters < length:
            break
    text = "\n".join(documents)
    return text[:characters] if characters else text


@_only_files
def read_pairs(
    name: str,
    split: str,
    directory: str | Path,
    source: str,
    target: str,
    limit: int = 0,
    most: int = 2**30,
) -> tuple[list[str], list[str]]:
    """Reads one split of a TFDS data set of translations.

    Args:
      name: its name in TFDS; the set must be prepared already, and has both languages as
        features of text.
      split: a split of the set.
      directory: the data_dir of TFDS; empty for its default.
      source: language of the first list.
      target: language of the second list.
      limit: read at most this many pairs, the first ones; 0 for all.
      most: bytes that the sentences of both languages may have.

    Returns:
      Sentences of the one and of the other language, pair by pair.

    Raises:
      FileNotFoundError: the set is not prepared in the directory.
      ValueError: it has no such split or language, features of other packages, more bytes, or a
        text that is not UTF-8.
    """
    # Where TensorFlow is missing, TFDS leaves its builders of translations out until asked for.
    with contextlib.suppress(ImportError):
        importlib.import_module("tensorflow_datasets.translate")
    data_dir = _data_dir(directory)
    examples = _source(_builder(name, data_dir), name, split, data_dir)
    features = examples.dataset_info.features
    for language in (source, target):
        if language not in features:
            raise ValueError(
                f"the TFDS data set {name} has no language {language!r}, only {', '.join(features)}"
            )
    sources, targets, size = [], [], 0
    for index in range(min(len(examples), limit or len(examples))):
        example = examples[index]
        size += len(example[source]) + len(example[target])
        _check_bytes(name, size, most)
        try:
            sources.append(example[source].decode())
            targets.append(example[target].decode())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"example {index} of the TFDS data set {name} is not UTF-8 text ({error.reason})"
            ) from None
    return sources, targets


def _check_bytes(name, size, most):
    if size > most:
        raise ValueError(
            f"the TFDS data set {name} has more than {most} bytes of text; raise --data.max-bytes"
        )


def _data_dir(directory: str | Path) -> Path:
    return Path(directory or tfds.core.constants.DATA_DIR).expanduser()


def _builder(name: str, data_dir: Path) -> Any:
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        raise FileNotFoundError(
            f"TFDS knows no data set {name!r} and {data_dir} holds none; check --data.tfds-name "
            "and --data.dir"
        ) from None


def _source(builder: Any, name: str, split: str, data_dir: Path) -> Any:
    splits = builder.info.splits
    if splits and split not in splits:
        raise ValueError(f"the TFDS data set {name} has no split {split}, only {', '.join(splits)}")
    try:
        return builder.as_data_source(split=split)
    except (AssertionError, NotImplementedError):
        raise FileNotFoundError(
            f"the TFDS data set {name} is not prepared for random access in {data_dir}; prepare it "
            f"with `tfds build {name} --file_format=array_record --data_dir={data_dir}`"
        ) from None


def _decode(name: str, source: Any) -> Images:
    features = source.dataset_info.features
    if "image" not in features or len(source) == 0:
        raise ValueError(f"the TFDS data set {name} holds no feature `image` or no examples")
    labelled = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
    first = np.asarray(source[0]["image"])
    if first.dtype != np.uint8 or first.ndim != 3:
        raise ValueError(
            f"images of the TFDS data set {name} are {first.dtype} {list(first.shape)}; "
            "only uint8 [height, width, C] is read"
        )
    size, room = len(source) * first.nbytes, memory.available()
    if size > room:
        raise ValueError(
            f"the images of the TFDS data set {name} take {memory.readable(size)}, and "
            f"{memory.readable(room)} of memory are left"
        )
    images = np.empty((len(source), *first.shape), np.uint8)
    labels = np.zeros(len(source), np.int32)
    for index in range(len(source)):
        example = source[index]
        if example["image"].shape != first.shape:
            raise ValueError(
                f"images of the TFDS data set {name} differ in size ({list(first.shape)} and "
                f"{list(example['image'].shape)}); save them to a folder, which resizes: "
                "--data.name folder"
            )
        images[index] = example["image"]
        if labelled:
            labels[index] = example["label"]
    names = tuple(features["label"].names) if labelled else ("image",)
    return Images(images, labels, names)


def _prepared_cifar10(data_dir: Path) -> Any:
    builder = _Cifar10(data_dir=data_dir, file_format="array_record")
    downloads = data_dir / "downloads"
    manual = downloads / "manual"
    config = tfds.download.DownloadConfig(manual_dir=manual)
    try:
        if not builder.is_prepared() and not any(downloads.rglob("*cifar-10-binary*.tar.gz")):
            # TFDS tries an unreachable server for minutes; one short request decides.
            requests.head(cifar10.URL, timeout=_TIMEOUT_SECONDS).raise_for_status()
        builder.download_and_prepare(download_dir=downloads, download_config=config)
    except (requests.exceptions.RequestException, tfds.download.DownloadError) as error:
        raise ConnectionError(
            f"cannot download {cifar10.URL} ({type(error).__name__}): put {_ARCHIVE} into "
            f"{manual.absolute()}, or use the embedded set with --data.name shapes"
        ) from None
    except download_manager.NonMatchingChecksumError:
        expected = tfds.download.checksums.get_all_url_infos()[cifar10.URL]
        raise ValueError(
            f"{_ARCHIVE} has another checksum than the official file (sha256 {expected.checksum}, "
            f"{int(expected.size)} bytes): delete it from {downloads.absolute()} "
            f"and take it from {cifar10.URL}"
        ) from None
    return builder


class _Cifar10(cifar.Cifar10, skip_registration=True):
    """The builder of TFDS, which decodes the archive without TensorFlow."""

    name = "cifar10"
    pkg_dir_path = None

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        archive = Path(dl_manager.download(cifar10.URL))
        self.info.features["label"].names = list(cifar10.LABEL_NAMES)
        return {
            "train": _examples(archive, "train_", cifar10.TRAIN_FILES),
            "test": _examples(archive, "test_", cifar10.TEST_FILES),
        }


def _examples(archive: Path, prefix: str, names: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    index = 0
    contents = _members(archive, [f"{cifar10.BINARY_FOLDER}/{name}.bin" for name in names])
    for source, records in contents.items():
        for image, label in zip(*cifar10.decode(records, source), strict=True):
            # A Pillow image is stored as PNG by Pillow; an array would call TensorFlow.
            example = {
                "id": f"{prefix}{index:05d}",
                "image": Image.fromarray(image),
                "label": int(label),
            }
            yield index, example
            index += 1


def _members(archive: Path, names: list[str]) -> dict[str, bytes]:
    found = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.name in names and member.isfile():
                found[member.name] = tar.extractfile(member).read()
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{archive} holds no {missing[0]}: it is not the archive of {cifar10.URL}")
    return {name: found[name] for name in names}
