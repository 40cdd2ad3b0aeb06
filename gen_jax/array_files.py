"""Files of arrays as NumPy writes them, of which no more is taken into memory than is there.

What a header states is compared with the size of the file before any memory of that size is taken.
Only arrays of numbers, bytes and characters are read: no pickles, and no headers that NumPy itself
would not write.
"""

import math
import os
import re
import struct
import zipfile
import zlib
from typing import BinaryIO

import numpy as np

from gen_jax import bounded, memory

__all__ = ["map_npy", "read_npz"]

_HEAD = 2**14  # bytes that hold any header
_PORTION = 2**20  # most bytes that are read at a time, as of a table of contents
_DEFLATED, _LEAST = 1032, 2**10  # what a byte can become in DEFLATE; bytes that any member may have
_HEADER = re.compile(
    rb"\x93NUMPY(?:\x01\x00..|\x02\x00....)"
    rb"\{'descr': '([<>|][biufcSUV]\d{1,9})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d+, )*\d*,?)\), \} *\n",
    re.DOTALL,
)
_DAMAGE = (
    EOFError,
    NotImplementedError,  # of compressions
    OverflowError,
    RuntimeError,  # of encryption
    TypeError,  # of types
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays in a file of `np.savez` or `np.savez_compressed`, by name.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged, has other things than arrays, or more than memory has room for.
    """
    with bounded.opened(path) as file:
        size, room = os.fstat(file.fileno()).st_size, memory.available()
        _check_room(path, size, room)
        try:
            with zipfile.ZipFile(_Portions(file)) as archive:
                members = archive.infolist()
                for member in members:
                    _check_member(member)
                if sum(member.compress_size for member in members) > size:
                    raise ValueError("its arrays are larger than the file")
                _check_room(path, sum(member.file_size for member in members), room)
                return {
                    member.filename.removesuffix(".npy"): _read(archive, member)
                    for member in members
                }
        except _TooLarge:
            raise
        except _DAMAGE as error:
            raise _damaged(path, error) from error


def map_npy(path: str | os.PathLike, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array in a file of `np.save`, mapped into memory, read only.

    Args:
      path: of the file.
      shape: that it must have.
      dtype: that it must have.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged, or of another shape or dtype.
    """
    with bounded.opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            kind, by_column, found, start = _header(file.read(_HEAD))
        except _DAMAGE as error:
            raise _damaged(path, error) from error
        if by_column or (kind, found) != (dtype, shape):
            raise ValueError(f"{path} is {kind} {list(found)}, not {dtype} {list(shape)}")
        if size != start + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path} is damaged (it has {size} bytes)")
        return np.memmap(file, dtype, "r", start, shape)


class _TooLarge(ValueError):
    pass


def _damaged(path, error):
    return ValueError(f"{path} is damaged ({error or type(error).__name__})")


def _check_room(path, size, room):
    if size > room:
        raise _TooLarge(
            f"{path} has {memory.readable(size)}, and {memory.readable(room)} of memory are left"
        )


def _check_member(member):
    """Refuses what `np.savez` does not write, and sizes that the member cannot become."""
    if not member.filename.endswith(".npy") or member.flag_bits & 1:
        raise ValueError(f"{member.filename[:100]!a} is no array")
    stored, most = member.compress_size, member.compress_size
    if member.compress_type == zipfile.ZIP_DEFLATED:
        most = _DEFLATED * stored + _LEAST
    elif member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its compression is of the type {member.compress_type}")
    if member.file_size > most:
        raise ValueError(f"{stored} bytes do not become {member.file_size}")


def _read(archive, member):
    with archive.open(member) as file:
        kind, _, shape, start = _header(file.read(_HEAD))
    if start + math.prod(shape) * kind.itemsize != member.file_size:
        raise ValueError(f"{kind} {list(shape)} does not have {member.file_size} bytes")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _header(head):
    """The dtype, whether columns come first, the shape, and where the values begin."""
    found = _HEADER.match(head)
    if found is None:
        raise ValueError("no header of an array of numbers")
    kind, by_column, axes = found.groups()
    shape = tuple(map(int, axes.replace(b",", b"").split()))
    if max(shape, default=0) >= 2**63 or len(shape) > 32:
        raise ValueError("no array has such a shape")
    return np.dtype(kind.decode()), by_column == b"True", shape, found.end()


class _Portions:
    """A file of which no call reads more than `_PORTION` bytes, whatever is asked for."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.tell, self.seekable = file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        return self._file.read(_PORTION if size < 0 else min(size, _PORTION))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if offset < 0 and whence == os.SEEK_SET:
            raise ValueError(f"a place is {offset}")
        return self._file.seek(offset, whence)
