"""A run's directory: locked, checked before work starts, and never left half-written."""

import contextlib
import fcntl
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator

from gen_jax import config as config_lib


class WorkdirError(ValueError):
    """The work directory cannot be used as asked; the message is one line for the user."""


class Workdir:
    """Where a run keeps its configuration, records, checkpoints and results.

    Args:
      path: the directory; made when it does not exist.

    Raises:
      WorkdirError: it cannot be made or written to, or its name is not text in this locale.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path).expanduser().absolute()
        try:
            str(self.path).encode()  # TensorStore takes no other names
        except UnicodeEncodeError as error:
            raise WorkdirError(
                f"the work directory {str(self.path)!a} has a name that is not text in this "
                "locale; set PYTHONUTF8=1 or choose another with --workdir"
            ) from error
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(b"room?")
        except OSError as error:
            raise WorkdirError(
                f"cannot write to the work directory {self.path} ({error.strerror}); "
                "choose another with --workdir"
            ) from error

    @property
    def checkpoints(self) -> pathlib.Path:
        """Where checkpoints are kept."""
        return self.path / "checkpoints"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the directory for this process.

        Raises:
          WorkdirError: another process holds it.
        """
        with open(self.path / ".lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise WorkdirError(
                    f"another run (process {file.read().strip() or 'unknown'}) is using "
                    f"{self.path}; wait for it or choose another --workdir"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def stored_config(self) -> dict | None:
        """The configuration in config.json, or None where there is none.

        Raises:
          WorkdirError: the file is not valid JSON.
        """
        path = self.path / "config.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise WorkdirError(
                f"{path} is damaged ({error}); restore it or start afresh"
            ) from error

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
        if stored is not None and any(self.checkpoints.glob("[0-9]*")):
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

    def write_json(self, name: str, values: dict) -> pathlib.Path:
        """Writes a JSON file whole: a reader sees the old one or the new one."""
        path = self.path / name
        temporary = path.with_name(f".{name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(values, indent=2) + "\n")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


class MetricsLog:
    """metrics.jsonl: one JSON object a line, appended and flushed.

    Args:
      path: the file.
      step: the step that training resumes from; records after it, and a last line cut short by
        a crash, are dropped.
    """

    def __init__(self, path: pathlib.Path, step: int = 0):
        kept = [line for line in self.read(path) if line["step"] <= step]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = open(path, "a")  # noqa: SIM115, closed by close()

    @staticmethod
    def read(path: pathlib.Path) -> list[dict]:
        """All whole records of a file; none when it does not exist."""
        records = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    break  # cut short by a crash: what follows was never written
        return records

    def write(self, record: dict) -> None:
        """Appends one record, which has a "step"."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # raised by `write` already, which leaves no buffer
            self._file.close()
