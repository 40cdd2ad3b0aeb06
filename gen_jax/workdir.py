"""A run's directory: locked, checked before work starts, and never left half-written."""

import contextlib
import fcntl
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator

from gen_jax import bounded, whole_file
from gen_jax import config as config_lib
from gen_jax.sealed import unseal

__all__ = ["MetricsLog", "Workdir", "WorkdirError"]


_ID = 20  # characters of the number of a process
_CHECKPOINTS = ("checkpoints/[0-9]*", "*/checkpoints/[0-9]*")  # of a run, or of its stages


class WorkdirError(ValueError):
    """The work directory cannot be used as asked; the message is one line for the user."""


class Workdir:
    """Where a run keeps its configuration, records, checkpoints and results.

    Nothing is made on disk before `create` or `lock`, so that what is stored in a directory can be
    read, and refused, without a trace.

    Args:
      path: the directory, which need not exist.

    Raises:
      WorkdirError: its name is empty, not text in this locale, or begins with the home directory of
        nobody.
    """

    def __init__(self, path: str | os.PathLike):
        if not os.fspath(path):
            raise WorkdirError("the work directory has no name; give one with --workdir")
        try:
            self.path = pathlib.Path(path).expanduser().absolute()
        except RuntimeError as error:
            raise WorkdirError(
                f"the work directory {str(path)!a} begins with a home directory that is not there; "
                "choose another with --workdir"
            ) from error
        if "\0" in str(self.path):
            raise WorkdirError(f"the work directory {str(path)!a} has a null character in its name")
        try:
            str(self.path).encode()  # TensorStore takes no other names
        except UnicodeEncodeError as error:
            raise WorkdirError(
                f"the work directory {str(self.path)!a} has a name that is not text in this "
                "locale; set PYTHONUTF8=1 or choose another with --workdir"
            ) from error

    def create(self) -> None:
        """Makes the directory where it does not exist.

        Raises:
          WorkdirError: it cannot be made or written to.
        """
        self._create()

    def _create(self):
        """The directories that were made for it, from the outermost on."""
        made = []
        try:
            made = whole_file.make_folder(self.path)
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(b"room?")
        except OSError as error:
            whole_file.remove_empty(made)
            raise WorkdirError(
                f"cannot write to the work directory {self.path} ({error.strerror}); "
                "choose another with --workdir"
            ) from error
        return made

    def stage(self, name: str) -> "Workdir":
        """The directory of a stage of the run, inside of this one; nothing is made on disk.

        Raises:
          WorkdirError: checkpoints lie in this directory itself, as older versions left them, or
            something else than a directory is in its place.
        """
        if any(self.checkpoints.glob("[0-9]*")):
            raise WorkdirError(
                f"the checkpoints in {self.checkpoints} are of an older version of gen_jax; "
                "train again in another --workdir"
            )
        stage = Workdir(self.path / name)
        for place in (stage.path, stage.checkpoints):
            if os.path.lexists(place) and not place.is_dir():
                raise WorkdirError(f"{place} is no directory; move it away")
        return stage

    @property
    def checkpoints(self) -> pathlib.Path:
        """Where checkpoints are kept."""
        return self.path / "checkpoints"

    def has_checkpoints(self) -> bool:
        """Whether there are checkpoints, of the run or of one of its stages."""
        return any(any(self.path.glob(place)) for place in _CHECKPOINTS)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the directory and holds it for this process.

        What killed runs left of files that they were writing is removed. A directory that was made
        here is removed again where nothing was written to it, as when a check fails.

        Raises:
          WorkdirError: it cannot be made or written to, or another process holds it.
          OSError: what killed runs left cannot be removed.
        """
        made, path = self._create(), self.path / ".lock"
        with open(path, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    raise BlockingIOError  # removed by the process that held it until just now
            except OSError as error:
                file.seek(0)
                raise WorkdirError(
                    f"another run (process {file.read(_ID).strip() or 'unknown'}) is using "
                    f"{self.path}; wait for it or choose another --workdir"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            self._remove_leftovers()
            try:
                yield
            finally:
                if made and os.listdir(self.path) == [".lock"]:
                    path.unlink()
                    whole_file.remove_empty(made)

    def _remove_leftovers(self):
        """Also in folders of the directory where it can, unless another run has its lock there."""
        whole_file.remove_leftovers(self.path)
        for folder in self.path.iterdir():
            ours = folder.is_dir() and os.access(folder, os.R_OK | os.W_OK | os.X_OK)
            if ours and not (folder / ".lock").exists():
                whole_file.remove_leftovers(folder)

    def stored_config(self) -> dict | None:
        """The configuration in config.json; where that is lost, the one in the last checkpoint.

        None where there is neither.

        Raises:
          WorkdirError: the file cannot be read, is not valid JSON, or is no object.
        """
        stored = self.read_json("config.json", "restore it or start afresh")
        return self._recorded_config() if stored is None else stored

    def _recorded_config(self):
        """The configuration in the record of the checkpoint that was written last.

        `checkpoint.restore` reads the same file with Orbax, which takes a second to import. A
        record that is damaged is passed over here, and named there.
        """
        if not os.path.isdir(self.path):  # a name that is too long is refused by `create`
            return None
        files = [f for place in _CHECKPOINTS for f in self.path.glob(f"{place}/meta/metadata")]
        for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            try:
                content = unseal(bounded.read_json(path, bounded.LARGEST_RECORD))
                if content is not None:
                    return content["record"].get("config")
            except OSError as error:
                raise WorkdirError(f"{path} cannot be read ({error.strerror})") from error
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        return None

    def check_config(self, current: dict, free: tuple[str, ...]) -> None:
        """Refuses a configuration that changes what was being trained.

        Before the first checkpoint there is nothing to protect, and all keys are free.

        Args:
          current: nested dictionaries.
          free: dotted keys, or prefixes ending in a dot, that may change on resume.

        Raises:
          WorkdirError: keys that are not free differ from the stored ones; all are listed.
        """
        stored = self.stored_config()
        if stored is not None and self.has_checkpoints():
            changed = config_lib.differences(stored, current, free)
            if changed:
                raise WorkdirError(
                    f"{self.path} holds a run with another configuration "
                    f"({'; '.join(changed)}); undo the change or choose another --workdir"
                )

    def write_config(self, current: dict, free: tuple[str, ...]) -> None:
        """Stores the configuration after `check_config`, whose errors it raises."""
        self.check_config(current, free)
        self.write_json("config.json", current)

    def read_json(self, name: str, advice: str) -> dict | None:
        """The object in a JSON file, or None where there is no such file.

        Args:
          name: of the file.
          advice: what to do where it is damaged.

        Raises:
          WorkdirError: the file cannot be read, is too large or not valid JSON, or is no object.
        """
        path = self.path / name
        if not os.path.lexists(path):
            return None
        try:
            stored = bounded.read_json(path)
        except OSError as error:
            raise WorkdirError(f"{path} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise WorkdirError(f"{error}; {advice}") from error
        if not isinstance(stored, dict):
            raise WorkdirError(f"{path} is damaged (it holds no object of fields); {advice}")
        return stored

    def write_json(self, name: str, values: dict) -> pathlib.Path:
        """Writes a JSON file whole: a reader sees the old one or the new one."""
        path = self.path / name
        whole_file.write(path, json.dumps(values, indent=2) + "\n")
        return path


class MetricsLog:
    """metrics.jsonl: one JSON object a line, appended and flushed, on disk after `sync`.

    Args:
      path: the file.
      step: the step that training resumes from; records after it, and a last line cut short by
        a crash, are dropped.

    Raises:
      WorkdirError: as `read` does; the file is left as it is.
    """

    def __init__(self, path: pathlib.Path, step: int = 0):
        kept = [line for line in self.read(path) if line["step"] <= step]
        whole_file.write(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path = path
        self._file = open(path, "a")  # noqa: SIM115, closed by close()

    @staticmethod
    def read(path: pathlib.Path) -> list[dict]:
        """All whole records of a file; none when it does not exist.

        Raises:
          WorkdirError: the file cannot be read, is too large, or a line is no record with a step; a
            last line that a crash cut short is left out instead, and so is all from a line of zeros
            on, which a loss of power leaves of what was not on disk yet.
        """
        if not os.path.lexists(path):
            return []
        try:
            text = bounded.read_text(path, bounded.LARGEST_LOG, "move it away", errors="replace")
        except OSError as error:
            raise WorkdirError(f"{path} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise WorkdirError(str(error)) from error
        lines, records = text.splitlines(keepends=True), []
        for number, line in enumerate(lines, 1):
            try:
                record = bounded.parse_json(line)
            except ValueError:
                if "\0" in line or (number == len(lines) and not line.endswith("\n")):
                    break  # cut short by a crash: what follows was never written
                record = None
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise WorkdirError(
                    f"{path} is damaged: line {number} is no record with a step; "
                    "restore it or move it away"
                )
            records.append(record)
        return records

    def write(self, record: dict) -> None:
        """Appends one record, which has a "step"."""
        with whole_file.naming(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Makes all records so far outlive a loss of power."""
        with whole_file.naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # raised by `write` already, which leaves no buffer
            self._file.close()
