"""The command line: from arguments to a configuration, refusals in one line, exit codes.

Nothing here imports jax. A mistyped option, missing data or a work directory of another run is
refused in well under a second; then the phases of the run, in `gen_jax.runs`, are imported once.
"""

import contextlib
import dataclasses
import difflib
import errno
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import tyro

from gen_jax import arguments, host_watch, signals
from gen_jax import config as config_lib
from gen_jax.config import RunConfig
from gen_jax.tasks import config_class
from gen_jax.workdir import Workdir, WorkdirError

__all__ = [
    "Experiment",
    "claim",
    "command_line",
    "execute",
    "guarded",
    "main",
    "parse",
    "phases_of",
    "print_summary",
    "store",
    "stored_form",
    "stored_run",
    "stored_summary",
]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_THE_WAY = (FileExistsError, IsADirectoryError, NotADirectoryError)
_SMALLER = (
    "try a larger --train.accumulate, or a smaller --train.batch, --sample.number, "
    "--sample.micro-batch or --evaluate.batch"
)
_WHOLE = ("train", "sample", "evaluate")  # what "all" runs, as far as the task has them


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment: its name, and complete configurations of its task.

    Attributes:
      name: of its module in `experiments`.
      about: what --help says first.
      presets: configurations of one class by name; the first is the default.
      preset_by: a field whose value names the preset where --preset does not, or "".
    """

    name: str
    about: str
    presets: Mapping[str, RunConfig]
    preset_by: str = ""

    @property
    def default(self) -> RunConfig:
        """The first preset."""
        return next(iter(self.presets.values()))

    @property
    def commands(self) -> tuple[str, ...]:
        """All commands of the task; the first is the default."""
        return "all", *self.default.commands


def main(experiment: Experiment, argv: list[str] | None = None) -> int:
    """Runs the command that the arguments ask for; the exit code of `guarded`."""

    given = sys.argv[1:] if argv is None else argv

    def run():
        dry = "--dry-run" in given
        command, config = parse(experiment, [item for item in given if item != "--dry-run"])
        try:
            execute(experiment, config, phases_of(config, command), dry)
        except OSError as error:  # a failed write does not name its file
            if error.errno not in _DISK_FULL or error.filename is not None:
                raise
            raise OSError(f"{error}, in the work directory {config.workdir}") from error

    return guarded(run, command_line(experiment.name, given))


def phases_of(config: RunConfig, command: str) -> tuple[str, ...]:
    """The phases that a command runs, in order."""
    if command != "all":
        return (command,)
    return tuple(phase for phase in _WHOLE if phase in config.commands)


def execute(
    experiment: Experiment, config: RunConfig, phases: tuple[str, ...], dry: bool = False
) -> None:
    """Checks what can be checked without jax, holds the work directory, and runs the phases.

    Args:
      experiment: which one.
      config: of the run.
      phases: the commands, in order.
      dry: say what training would take instead, and leave no trace.

    Raises:
      ValueError, FileNotFoundError: the run, its data or its work directory do not fit; nothing was
        written.
    """
    workdir = Workdir(config.workdir)
    path = workdir.path
    training, several = "train" in phases, bool(config.distributed.coordinator)
    if not training and not config.pretrained and workdir.stored_config() is None:
        raise WorkdirError(f"no run in {path}; train one first, or give its --workdir")
    if several and not set(phases) <= set(_WHOLE):
        raise ValueError(f"several hosts {', '.join(_WHOLE)}; run {phases[0]} on one of them")
    if dry and not training:
        raise ValueError(f"--dry-run is of training, not of {phases[0]}")
    _check_stored(workdir, config)
    _check_pretrained(workdir, config)
    stored_summary(workdir)
    if training and config.init_from and not workdir.has_checkpoints():
        _check_init_from(config)
    data = config.load(path, phases)
    if dry:
        describe = config_lib.resolve("gen_jax.dry_run:dry_run")
        describe(experiment.name, config, workdir, phases, data)
        return
    with contextlib.nullcontext() if several else claim(workdir, config):
        run = config_lib.resolve("gen_jax.runs:run")
        run(experiment.name, config, workdir, phases, data)


def _check_pretrained(workdir, config):
    stored = workdir.stored_config()
    if config.pretrained and stored and not stored.get("pretrained") and workdir.has_checkpoints():
        raise WorkdirError(
            f"the run in {workdir.path} did not start from published weights; choose another "
            "--workdir for --pretrained"
        )


def _check_init_from(config):
    if config.pretrained:
        raise ValueError("init_from and pretrained both say where training starts; give one")
    source = Workdir(config.init_from).path
    if source == Workdir(config.workdir).path:
        raise ValueError(f"init_from is the work directory, {source}; give another --workdir")
    if stored_run(source, type(config)) is None:
        raise FileNotFoundError(f"no run in {source} to start from; give another --init-from")


@contextlib.contextmanager
def claim(workdir: Workdir, config: RunConfig) -> Iterator[None]:
    """Holds the work directory, which must be of this configuration; nothing is stored there.

    Args:
      workdir: the directory.
      config: of the run.

    Raises:
      WorkdirError: another process holds it, or it holds another run.
    """
    with workdir.lock():
        _check_stored(workdir, config)
        yield


def _check_stored(workdir, config):
    workdir.check_config(stored_form(config), _resumable(config, workdir.stored_config()))


def store(workdir: Workdir, config: RunConfig) -> None:
    """Stores the configuration in a work directory that is held.

    This comes after all checks: a run without `--preset` takes what is stored there, also that of
    a run that failed.

    Raises:
      WorkdirError: the directory holds another run.
    """
    workdir.write_config(stored_form(config), _resumable(config, workdir.stored_config()))


def stored_form(config: RunConfig) -> dict:
    """What config.json holds: the name of the task, and the fields.

    Those of `distributed` are of the processes, not of the run, which others may go on with.
    """
    fields = config_lib.to_dict(config)
    del fields["distributed"]
    return {"task": config.task} | fields


def stored_run(path: str | os.PathLike, kind: type[RunConfig] | None = None) -> RunConfig | None:
    """The configuration in config.json of a work directory, with `path` as its own.

    Args:
      path: the directory; where there is neither config.json nor a checkpoint, the result is None.
      kind: the class that the configuration must be of; None for that of its task.

    Raises:
      WorkdirError: it is of an older version, or of a task of another class; or its task or its
        fields are unknown, or a value is not possible.
    """
    values = Workdir(path).stored_config()
    if values is None:
        return None
    task = values.pop("task", None)
    values.pop("distributed", None)  # which older versions stored
    if task is None:
        raise WorkdirError(f"{path} is of an older version; train again in another --workdir")
    if not isinstance(task, str):
        raise WorkdirError(f"{path}/config.json: task must be a name, got {task!r}")
    if kind is not None and task != kind.task:
        raise WorkdirError(
            f"{path} holds a run of the task {task!r}, not {kind.task!r}; choose another directory"
        )
    try:
        config = config_lib.from_dict(kind or config_class(task), values)
        return dataclasses.replace(config, workdir=str(path))
    except ValueError as error:
        raise WorkdirError(f"{path}/config.json: {error}") from error


def stored_summary(workdir: Workdir) -> dict:
    """The figures in summary.json; none where it does not exist.

    Raises:
      WorkdirError: the file is damaged.
    """
    return workdir.read_json("summary.json", "move it away") or {}


def _resumable(config, stored):
    """Keys that may change on resume.

    They are those of the task, the number of steps where the rate does not depend on it, and fields
    at their defaults that the stored configuration is too old to have.
    """
    current = config_lib.flatten(config_lib.to_dict(config))
    added = config_lib.added(type(config), stored or {})
    same = tuple(key for key, value in added.items() if current.get(key) == value)
    steps = ("train.steps",) if config.train.decay == "constant" else ()
    return config.resumable + steps + same


def guarded(run: Callable[[], None], command: str = "") -> int:
    """Runs to the end, or prints one line that says why not.

    A ValueError that was not raised by this project is a defect, not bad input: it passes.

    Args:
      run: what is run.
      command: the command line that goes on where a signal stopped it, or "".

    Returns:
      The exit code: 0, 2 for bad input, 1 for a run that failed, 130 for SIGINT, 143 for SIGTERM.
    """
    sys.unraisablehook = _unraisable
    with _streams():
        return host_watch.end_together(run, lambda run: _stoppable(run, command))


def _stoppable(run, command):
    """The exit code, also where a signal stops it."""
    try:
        with signals.handled():
            return _exit_code(run)
    except signals.Stopped as stop:
        print(f"{stop}. Go on with:\n  {command}" if command else stop, file=sys.stderr)
        return stop.code


def _exit_code(run):
    try:
        run()
    except ValueError as error:
        if not _is_ours(error):
            raise
        return _fail(error, 2)
    except (FileNotFoundError, *_IN_THE_WAY) as error:
        return _fail(error, 2)
    except MemoryError as error:
        return _fail(f"out of memory{f' ({error})' * bool(str(error))}; {_SMALLER}", 1)
    except (FloatingPointError, OSError) as error:
        return _fail(error, 2 if getattr(error, "errno", None) == errno.ENAMETOOLONG else 1)
    except RuntimeError as error:  # of pathlib, or of jax, which may not have been imported
        if "home directory" in str(error):
            return _fail("a path begins with ~ and a user who is not known here", 2)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail(f"out of memory ({str(error).splitlines()[0][:200]}); {_SMALLER}", 1)
    return 0


def parse(experiment: Experiment, argv: list[str]) -> tuple[str, RunConfig]:
    """The command and the configuration.

    The base is the preset named by --preset; without one, the configuration stored in the work
    directory; without that, the one in the directory of --init-from; without that, the first
    preset. A base that is no stored one takes the sizes of --pretrained. A field that is a
    `config.Choice` is chosen by name, as in --sampler ddim, or by "module:class" of one's own.
    Every option overrides a field.

    Raises:
      SystemExit: --help was asked for.
      ValueError: a command, preset, choice or option is unknown, a value is ill-typed, or values
        contradict each other.
    """
    commands = experiment.commands
    command, rest = commands[0], argv
    if argv and not argv[0].startswith("-"):
        command, rest = argv[0], argv[1:]
    if command not in commands:
        close = difflib.get_close_matches(command, commands, n=1, cutoff=0.0)
        raise ValueError(f"unknown command {command!r}; did you mean {close[0]}?")
    preset, rest = arguments.take(rest, "--preset")
    workdir, _ = arguments.take(rest, "--workdir")
    initial, _ = arguments.take(rest, "--init-from")
    chosen, rest = arguments.take_choices(rest, type(experiment.default))
    if preset is not None and preset not in experiment.presets:
        raise ValueError(
            f"unknown preset {preset!r}; choose one of {', '.join(experiment.presets)}"
        )
    default = experiment.presets[preset] if preset is not None else experiment.default
    if preset is None and experiment.preset_by:
        named, _ = arguments.take(rest, f"--{experiment.preset_by}")
        default = experiment.presets.get(named, default)
    folder = (
        arguments.take(rest, "--pretrained")[0]
        if arguments.has_field(default, "pretrained")
        else None
    )
    if folder:
        name = f"{experiment.name}_{_last_name(folder)}"
        place = str(pathlib.Path(default.workdir).parent / name)
        default = dataclasses.replace(default, workdir=place)
    stored = None
    if preset is None:
        stored = stored_run(workdir or default.workdir, type(default))
        if stored is None and initial:
            stored = stored_run(initial, type(default))
            stored = stored and dataclasses.replace(stored, workdir=default.workdir)
    if stored is not None:
        default = stored
    elif folder:
        default = arguments.unchecked(default, default.published(folder))
    default = arguments.with_choices(default, chosen)
    arguments.check_options(rest, default)
    prog = f"python -m experiments.{experiment.name} [{'|'.join(commands)}] [--preset NAME]"
    about = _description(experiment, default)
    with arguments.refusals_in_one_line():
        config = tyro.cli(type(default), prog=prog, description=about, default=default, args=rest)
    return command, config


def _last_name(folder):
    return os.path.basename(os.path.abspath(os.path.expanduser(folder)))


def _description(experiment, default):
    lines = [
        f"{experiment.about}\n",
        f"Commands: {', '.join(experiment.commands)} (default: {experiment.commands[0]}).",
        f"Presets: {', '.join(experiment.presets)} (--preset NAME, default: "
        f"{next(iter(experiment.presets))}).",
        "--dry-run prints what training would take, and trains nothing.",
    ]
    for field, kinds in config_lib.choices_of(type(default)).items():
        lines.append(
            f"--{field} is one of {', '.join(kinds)} (here: {getattr(default, field).name}), or "
            "MODULE:CLASS of your own; "
            f"`--{field} NAME --help` shows its options."
        )
    return "\n".join(lines)


def command_line(name: str, argv: Sequence[str]) -> str:
    """The command line of a module of `experiments` with these arguments.

    Those of `distributed` are left out: they are of processes that are gone.
    """
    kept, left_out = [], False
    for item in argv:
        if item.startswith("--"):
            left_out = item.startswith("--distributed.")
        if not left_out:
            kept.append(item)
    return shlex.join(["python", "-m", f"experiments.{name}", *kept])


def print_summary(title: str, rows: Mapping[str, object]) -> None:
    """A table of two columns on standard output."""
    width = max(len(name) for name in rows)
    print(f"\n{title}")
    for name, value in rows.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"  {name.replace('_', ' '):<{width}}  {text}")


def _is_ours(error):
    """Whether the statement that raised it is in one of this project's packages."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in ("gen_jax", "experiments", "kernels", "__main__")


class _Messages:
    """Standard error; what cannot be written there is a message lost, and stops nothing."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


@contextlib.contextmanager
def _streams():
    """Standard streams that stop nothing: closed ones, as by `2>&-`, lead nowhere.

    The next file that is opened would take their number, and get what others print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    nowhere = open(os.devnull, "w")  # noqa: SIM115
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out or nowhere, _Messages(err or nowhere)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        nowhere.close()


def _unraisable(what):
    if isinstance(what.exc_value, signals.Stopped):
        signals.raise_again(what.exc_value)
        return
    # After an error, which is raised, TensorStore still calls back to an event loop that is gone.
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def _fail(error, code):
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))
    print(f"error: {line}", file=sys.stderr)  # also of a path with a line break
    return code
