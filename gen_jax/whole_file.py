"""Files that are there whole or not at all, whatever happens while they are written."""

import contextlib
import os
import pathlib
import re
import secrets
from collections.abc import Iterator
from typing import BinaryIO

__all__ = [
    "make_folder",
    "naming",
    "remove_empty",
    "remove_leftovers",
    "replacing",
    "sync",
    "sync_tree",
    "write",
]

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}", re.DOTALL)  # as `replacing` names what it writes


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
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with naming(path), open(temporary, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
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


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes what processes that were killed within `replacing` left in a folder.

    Raises:
      OSError: the folder cannot be read, or a file cannot be removed.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if _LEFTOVER.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)


def make_folder(path: str | os.PathLike) -> list[pathlib.Path]:
    """Makes a folder, and those around it, where there is none; its name outlives a loss of power.

    Returns:
      The folders that were made, from the outermost on.

    Raises:
      OSError: it cannot be made; nothing is.
    """
    path, made = pathlib.Path(path).absolute(), []
    while not os.path.lexists(outermost := made[0].parent if made else path):
        made.insert(0, outermost)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for folder in made:
            sync(folder.parent)
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: list[pathlib.Path]) -> None:
    """Removes folders, each inside of the one before it, where they are empty."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()


def sync_tree(path: str | os.PathLike) -> None:
    """Makes a folder with all that is in it outlive a loss of power.

    Raises:
      OSError: something in it cannot be read or written.
    """
    with os.scandir(path) as entries:
        for entry in entries:
            (sync_tree if entry.is_dir(follow_symlinks=False) else sync)(entry.path)
    sync(path)


def sync(path: str | os.PathLike) -> None:
    """Makes the content of a file, or the names in a folder, outlive a loss of power.

    Raises:
      OSError: it cannot be read or written; the error names it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(pathlib.Path(path)):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
