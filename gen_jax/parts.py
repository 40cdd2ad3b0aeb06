"""Finished parts of a long request, kept on disk until all of it is done.

A run that is killed while it samples or evaluates goes on from them, and several machines draw
parts of one request. Every part is sealed with what it is a part of. One that is damaged, or is of
something else, is made again.
"""

import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gen_jax import array_files, whole_file
from gen_jax.bounded import parse_json
from gen_jax.checkpoint import digest
from gen_jax.sealed import seal, unseal

__all__ = ["FOLDER", "Parts", "clear"]

FOLDER = "parts"
_SEAL, _LASTING = "sealed", "-for-others"  # an entry beside arrays, and the end of a folder's name


class Parts:
    """The parts of one request, in the folder "parts" of a work directory.

    Args:
      workdir: of the run.
      request: what was asked for, in JSON values.
      others: work directories whose parts of the same request are read besides.
      lasting: whether they stay when the run is done, for other runs to read.

    Raises:
      ValueError: one of the others has no part of this request.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        request: Mapping[str, Any],
        others: Sequence[str | os.PathLike] = (),
        *,
        lasting: bool = False,
    ):
        text = json.dumps(request, sort_keys=True)
        self._request = hashlib.sha256(text.encode()).hexdigest()[:32]
        ordinary, kept = self._places(workdir)
        self._mine = kept if lasting else ordinary
        # What goes when the run is done is no part that lasts.
        self._folders = [kept] if lasting else [ordinary, kept]
        for place in (pathlib.Path(other).expanduser() for other in others):
            folders = self._places(place)
            if not any(folder.is_dir() for folder in folders):
                raise ValueError(
                    f"{place} has no part of these samples: it must be a run of the same "
                    "checkpoint and sampler, whose parts were drawn with the same --sample.seed, "
                    "--sample.micro-batch and number of all samples (--sample.of)"
                )
            self._folders += folders

    def _places(self, workdir):
        """Where parts of this request are that go with the run, and those that last."""
        return [workdir / FOLDER / (self._request + end) for end in ("", _LASTING)]

    def names(self) -> list[str]:
        """The names of all parts that there are, ascending."""
        found = (path.stem for folder in self._folders for path in folder.glob("[0-9]*.npz"))
        return sorted(set(found))

    def read(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The arrays and the facts of a part; None where there is none.

        One that is not whole is passed over, with a line on standard error.
        """
        for folder in self._folders:
            path = folder / f"{name}.npz"
            if path.exists():
                part = _read(path, self._request)
                if part is not None:
                    return part
                print(f"{path} is damaged: that part is made again", file=sys.stderr)
        return None

    def keep(self, name: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Writes a part whole.

        Args:
          name: it begins with a digit.
          arrays: what was made.
          facts: small JSON values kept with them.
        """
        digests = {key: digest(value) for key, value in arrays.items()}
        known = {"request": self._request, "digests": digests, "facts": dict(facts)}
        with whole_file.replacing(self._mine / f"{name}.npz") as file:
            np.savez(file, **arrays, **{_SEAL: np.array(json.dumps(seal(known)))})


def clear(workdir: pathlib.Path) -> None:
    """Removes all parts in a work directory but those that others are to read."""
    folder = workdir / FOLDER
    for path in folder.glob("*"):
        if not path.name.endswith(_LASTING):
            shutil.rmtree(path)
    if folder.is_dir() and not os.listdir(folder):
        folder.rmdir()


def _read(path, request):
    """A part, or None where it is not what was written."""
    try:
        arrays = array_files.read_npz(path)
        known = unseal(parse_json(str(arrays.pop(_SEAL))))
        if known is None or known["request"] != request:
            return None
        whole = known["digests"] == {key: digest(value) for key, value in arrays.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return (arrays, known["facts"]) if whole else None
