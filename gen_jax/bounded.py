"""Files that others may have written, read within bounds; importing this loads no NumPy."""

import contextlib
import gzip
import io
import json
import os
import pathlib
import stat
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

__all__ = [
    "LARGEST_JSON",
    "LARGEST_LOG",
    "LARGEST_RECORD",
    "opened",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_text",
]

LARGEST_JSON = 2**24
"""Most bytes of a file of options or figures."""

LARGEST_RECORD = 2**28
"""Most bytes of the record of a checkpoint, which may have a vocabulary."""

LARGEST_LOG = 2**28
"""Most bytes of metrics.jsonl: the records of a million steps."""

_VALUES, _DEPTH, _DIGITS = 2**22, 100, 100
_PART = 2**20  # bytes that are unpacked at a time


def read_bytes(path: str | os.PathLike, most: int) -> bytes:
    """The content of a file; no more memory is taken than `most` bytes.

    Raises:
      OSError: it cannot be read.
      ValueError: it is larger, or a pipe or a device, which may never end.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(size, most) + 1)
    if len(content) > most:
        raise ValueError(f"{path} has {size} bytes, and at most {most} are read")
    return content


def read_text(
    path: pathlib.Path, most: int, advice: str, characters: int = 0, errors: str = "strict"
) -> str:
    """The content of a file of UTF-8, unpacked where its name ends in .gz.

    Args:
      path: of the file.
      most: bytes that it may have; more are never unpacked.
      advice: what to do where it has more, for the error.
      characters: how many are read, whatever follows; 0 for all.
      errors: what becomes of bytes that are no UTF-8, as `bytes.decode` takes it.

    Raises:
      OSError: it cannot be read.
      ValueError: it has more bytes, or is no UTF-8, damaged, a pipe or a device.
    """
    packed = path.suffix == ".gz"
    unpacked = " when unpacked" if packed else ""
    too_large = ValueError(f"{path} has more than {most} bytes{unpacked}; {advice}")
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(opened(path))
            if packed:
                file = stack.enter_context(gzip.open(file))
            if characters:
                text = stack.enter_context(io.TextIOWrapper(file, "utf-8", errors, newline=""))
                return text.read(characters)
            content = bytearray()
            if not packed and os.fstat(file.fileno()).st_size > most:
                raise too_large
            while part := file.read(min(_PART, most + 1 - len(content))):
                content += part
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); fetch it again") from None
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    if len(content) > most:
        raise too_large
    try:
        return content.decode(errors=errors)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None


def parse_json(content: str | bytes) -> Any:
    """The value of a text of JSON in UTF-8.

    Raises:
      ValueError: it is none, or has more than 4 million values, 100 levels, or an integer of more
        than 100 digits, with which no file of options or records is written.
    """
    text = content.decode() if isinstance(content, bytes) else content
    if sum(map(text.count, "[{,")) > _VALUES:
        raise ValueError(f"it has more than {_VALUES} values")
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"it has more than {_DEPTH} levels") from None
    level = [value]
    for _ in range(_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise ValueError(f"it has more than {_DEPTH} levels")


def read_json(path: pathlib.Path, most: int = LARGEST_JSON) -> Any:
    """The content of a file of JSON.

    Args:
      path: of the file.
      most: bytes that it may have.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged, or too large.
    """
    content = read_bytes(path, most)
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to be read, which is closed when the block ends.

    Raises:
      OSError: it cannot be read.
      ValueError: it is a pipe or a device, which may never end.
    """
    with open(path, "rb", opener=_open) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is a pipe or a device; give a file")
        yield file


def _open(path, flags):
    """Opens a file without waiting for another end, which a pipe may not have."""
    return os.open(path, flags | os.O_NONBLOCK)


def _not_utf8(path, error):
    return ValueError(
        f"{path} is not UTF-8 text ({error.reason}); convert it, for example with iconv"
    )


def _children(value):
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _integer(digits):
    if len(digits) > _DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits")
    return int(digits)
