"""Files that are there whole or not at all, whatever happens while they are written."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["naming", "replacing", "write"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends; its folder is made.

        with replacing("results.json") as file:
            file.write(content)

    A reader sees the old file or the new one. Where the block raises, the old one stays and nothing
    of the new one is left.

    Args:
      path: of the file.
      durable: whether the file outlives a loss of power from the end of the block on. That waits
        for the disk, which many small files need not.

    Raises:
      OSError: the file cannot be written; the error names it.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with naming(path), open(temporary, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | os.PathLike, content: str) -> None:
    """Replaces a file of text in UTF-8; see `replacing`."""
    with replacing(path) as file:
        file.write(content.encode())


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Names the file in errors of the system: a write that fails does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync_folder(path):
    """Makes the names in a folder outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
