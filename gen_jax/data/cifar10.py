"""CIFAR-10 (Krizhevsky, 2009) from its official files, binary or Python version."""

import codecs
import io
import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from gen_jax.bounded import read_bytes
from gen_jax.data.config import Split
from gen_jax.data.images import Images

__all__ = [
    "BINARY_FOLDER",
    "LABEL_NAMES",
    "PYTHON_FOLDER",
    "TEST_FILES",
    "TRAIN_FILES",
    "URL",
    "decode",
    "read",
]

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
BINARY_FOLDER = "cifar-10-batches-bin"
PYTHON_FOLDER = "cifar-10-batches-py"
LABEL_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILES = ("test_batch",)

_PIXELS = 3 * 32 * 32
_RECORD = 1 + _PIXELS
_OFFICIAL_RECORDS = 10_000
_LARGEST, _OPERATIONS = 2**28, 2**17  # bytes of a file, operations of a pickle

# What the standard library's unpickler raises on bytes that are cut short or altered.
_DAMAGE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)


def read(directory: str | Path, split: Split) -> Images:
    """Reads the official files of CIFAR-10.

    Args:
      directory: the folder cifar-10-batches-bin or cifar-10-batches-py, or one that holds it;
        the binary files are taken where both are there.
      split: "train" (five files) or "test" (one file).

    Returns:
      Images uint8 [examples, 32, 32, 3] with labels in [0, 10).

    Raises:
      FileNotFoundError: neither folder is there, or one of its files is missing.
      ValueError: a file is truncated, is no CIFAR-10 file, or is a pickle that asks for more
        than NumPy arrays in plain containers.
    """
    folder, suffix, read_file = _locate(Path(directory))
    names = TRAIN_FILES if split == "train" else TEST_FILES
    parts = [read_file(folder / (name + suffix)) for name in names]
    images = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    return Images(images, labels, LABEL_NAMES)


def decode(
    records: bytes, source: str
) -> tuple[UInt8[np.ndarray, "examples 32 32 3"], Int32[np.ndarray, " examples"]]:
    """Decodes records of the binary version: a byte of label, then planes of red, green, blue.

    Args:
      records: the content of a file, a whole number of records of 3073 bytes.
      source: the name of the file, for the error.

    Returns:
      Images and their labels.

    Raises:
      ValueError: the size is no positive multiple of 3073, or a label is not in [0, 10).
    """
    if not records or len(records) % _RECORD:
        raise ValueError(
            f"{source} has {len(records)} bytes; expected {_OFFICIAL_RECORDS * _RECORD} "
            f"(or another multiple of {_RECORD}): the file is damaged, copy it again"
        )
    table = np.frombuffer(records, np.uint8).reshape(-1, _RECORD)
    return _planes_to_images(table[:, 1:]), _checked_labels(table[:, 0], source)


def _locate(directory: Path) -> tuple[Path, str, Callable[[Path], tuple[np.ndarray, np.ndarray]]]:
    for name, suffix, reader in (
        (BINARY_FOLDER, ".bin", _read_binary),
        (PYTHON_FOLDER, "", _read_python),
    ):
        for folder in (directory / name, directory):
            if any((folder / (file + suffix)).is_file() for file in TRAIN_FILES + TEST_FILES):
                return folder, suffix, reader
    raise FileNotFoundError(
        f"no CIFAR-10 files in {directory.absolute()}: unpack {URL} so that "
        f"{directory.absolute() / BINARY_FOLDER} exists and give --data.dir {directory}, "
        "or use the embedded set with --data.name shapes"
    )


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    expected = _OFFICIAL_RECORDS * _RECORD
    return decode(_content(path, f"{expected} bytes"), str(path))


def _read_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = _content(path, f"a pickle of {_OFFICIAL_RECORDS} records")
    batch = _unpickle(content, path)
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise ValueError(f"{path} is no batch of CIFAR-10: it lacks the keys data and labels")
    data, labels = getattr(batch[b"data"], "value", None), batch[b"labels"]
    if (
        not isinstance(data, np.ndarray)
        or data.ndim != 2
        or data.shape[1] != _PIXELS
        or not isinstance(labels, list)
        or not all(isinstance(label, int) for label in labels)
        or not len(data) == len(labels) > 0
    ):
        raise ValueError(
            f"{path} is no batch of CIFAR-10: expected data uint8 [{_OFFICIAL_RECORDS}, {_PIXELS}] "
            "and as many integer labels"
        )
    return _planes_to_images(data), _checked_labels(np.array(labels), str(path))


def _content(path: Path, expected: str) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing (expected {expected}, found nothing): unpack {URL} again"
        )
    return read_bytes(path, _LARGEST)


def _planes_to_images(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _checked_labels(labels: np.ndarray, source: str) -> np.ndarray:
    if labels.min() < 0 or labels.max() >= len(LABEL_NAMES):
        raise ValueError(
            f"{source} has labels in {labels.min()}..{labels.max()}; those of CIFAR-10 lie in 0..9"
        )
    return labels.astype(np.int32)


def _unpickle(content: bytes, path: Path) -> Any:
    try:
        _check_operations(content)
        return _ArrayUnpickler(io.BytesIO(content), path).load()
    except _Refused:
        raise
    except _DAMAGE as error:
        raise ValueError(
            f"{path} has {len(content)} bytes and is no whole pickle (expected about 31035000 "
            f"bytes; {type(error).__name__}): the file is damaged, copy it again"
        ) from None


def _check_operations(content):
    """Refuses a pickle that is long, or keeps an object at a place for which memory is taken."""
    for number, (operation, place, _) in enumerate(pickletools.genops(content)):
        kept = operation.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if number > _OPERATIONS or (kept and place > _OPERATIONS):
            raise pickle.UnpicklingError("too many operations")


class _Refused(ValueError):
    pass


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what arrays of bytes need and nothing else: a pickle can name any function."""

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file, encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")
        admitted = {
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Bytes,
            ("_codecs", "encode"): _latin1,
        }
        if (module, name) not in admitted:
            raise _Refused(
                f"{self._path} is refused: its pickle asks for {module}.{name}, which no file of "
                f"CIFAR-10 needs; take the archive from {URL}"
            )
        return admitted[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"{self._path} is refused: its pickle asks for the external object {pid!r}")


class _Bytes:
    """Stands for the dtype of bytes, whose state NumPy would take as it comes."""

    def __init__(self, code, align=False, copy=True):
        if code not in ("u1", b"u1", "|u1", b"|u1"):
            raise pickle.UnpicklingError(f"dtype {code!r}")

    def __setstate__(self, state):
        pass


class _Array:
    """Stands for an array of bytes; `value` is that array once its state is known."""

    value = None

    def __setstate__(self, state):
        _, shape, kind, by_column, content = state
        if not isinstance(kind, _Bytes) or by_column or math.prod(shape) != len(content):
            raise pickle.UnpicklingError("not an array of bytes")
        self.value = np.frombuffer(content, np.uint8).reshape(shape)


def _reconstruct(kind, shape, typecode):
    if kind is not _Array or tuple(shape) != (0,):
        raise pickle.UnpicklingError("not an array")
    return _Array()


def _latin1(text, encoding):
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return codecs.encode(text, "latin1")
