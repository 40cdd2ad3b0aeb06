"""What the experiments share: the command line, and how a run ends.

Nothing here imports jax: a mistyped option is refused in well under a second.
"""

import dataclasses
import difflib
import errno
import os
import shlex
import sys
from collections.abc import Callable, Mapping

import tyro

from gen_jax import config as config_lib
from gen_jax.workdir import Workdir

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment's face on the command line.

    Attributes:
      name: of its module in `experiments`.
      about: what --help says first.
      presets: complete configurations by name; the first is the default. Each is a frozen
        dataclass with a field `workdir`.
      commands: functions of a configuration by name; the first is the default.
    """

    name: str
    about: str
    presets: Mapping[str, object]
    commands: Mapping[str, Callable[[object], None]]


def main(experiment: Experiment, argv: list[str] | None = None) -> int:
    """Runs the command that the arguments ask for; the exit code of `guarded`."""

    def run():
        command, config = parse(experiment, sys.argv[1:] if argv is None else argv)
        try:
            experiment.commands[command](config)
        except OSError as error:  # a failed write does not name its file
            if error.errno not in _DISK_FULL or error.filename is not None:
                raise
            raise OSError(f"{error}, in the work directory {config.workdir}") from error

    return guarded(run)


def guarded(run: Callable[[], None]) -> int:
    """Runs to the end, or prints one line that says why not.

    A ValueError that was not raised by this project is a defect, not bad input: it passes.

    Returns:
      The exit code: 0, 2 for bad input, 1 for a run that failed, 130 for SIGINT.
    """
    sys.unraisablehook = _unraisable
    try:
        run()
    except ValueError as error:
        if not _is_ours(error):
            raise
        return _fail(error, 2)
    except FileNotFoundError as error:
        return _fail(error, 2)
    except (FloatingPointError, OSError) as error:
        return _fail(error, 1)
    except RuntimeError as error:  # of jax, which may not have been imported
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail(
            "out of memory; try a larger --train.accumulate, or a smaller --sample.micro-batch "
            f"or --evaluate.batch ({str(error).splitlines()[0][:200]})",
            1,
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parse(experiment: Experiment, argv: list[str]) -> tuple[str, object]:
    """The command and the configuration.

    The base is the preset named by --preset; without one, the configuration stored in the work
    directory; without that, the first preset. Every option overrides a field of it.

    Raises:
      SystemExit: a value is ill-typed or contradicts another (code 2), or --help was asked for.
      ValueError: a command, preset or option is unknown.
    """
    commands = tuple(experiment.commands)
    command, rest = commands[0], argv
    if argv and not argv[0].startswith("-"):
        command, rest = argv[0], argv[1:]
    if command not in commands:
        close = difflib.get_close_matches(command, commands, n=1, cutoff=0.0)
        raise ValueError(f"unknown command {command!r}; did you mean {close[0]}?")
    preset, rest = _take(rest, "--preset")
    workdir, _ = _take(rest, "--workdir")
    if preset is not None and preset not in experiment.presets:
        raise ValueError(
            f"unknown preset {preset!r}; choose one of {', '.join(experiment.presets)}"
        )
    default = experiment.presets[preset or next(iter(experiment.presets))]
    if preset is None:
        stored = _stored(workdir or default.workdir)
        if stored is not None:
            default = config_lib.from_dict(type(default), stored)
            default = dataclasses.replace(default, workdir=workdir or default.workdir)
    _check_options(rest, default)
    about = (
        f"{experiment.about}\n\nCommands: {', '.join(commands)} (default: {commands[0]}). "
        f"Presets: {', '.join(experiment.presets)} (--preset NAME, default: "
        f"{next(iter(experiment.presets))})."
    )
    prog = f"python -m experiments.{experiment.name} [{'|'.join(commands)}] [--preset NAME]"
    config = tyro.cli(type(default), prog=prog, description=about, default=default, args=rest)
    return command, config


def resume_command(experiment: str, config) -> str:
    """The command line that goes on with a run."""
    return f"python -m experiments.{experiment} train --workdir {shlex.quote(str(config.workdir))}"


def print_summary(title: str, rows: Mapping[str, object]) -> None:
    """A table of two columns on standard output."""
    width = max(len(name) for name in rows)
    print(f"\n{title}")
    for name, value in rows.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"  {name.replace('_', ' '):<{width}}  {text}")


def _take(argv, option):
    """The value of an option, and the arguments without it."""
    rest, value, items = [], None, iter(argv)
    for item in items:
        if item == option:
            value = next(items, None)
            if value is None:
                raise ValueError(f"{option} needs a value")
        elif item.startswith(f"{option}="):
            value = item.split("=", 1)[1]
        else:
            rest.append(item)
    return value, rest


def _check_options(argv, config):
    """Refuses an option that is no field of the configuration, and says which is closest."""
    names = []
    for key, value in config_lib.flatten(config_lib.to_dict(config)).items():
        prefix, _, field = key.replace("_", "-").rpartition(".")
        prefix = f"--{prefix}." if prefix else "--"
        names += [prefix + field] + ([f"{prefix}no-{field}"] if isinstance(value, bool) else [])
    for item in argv:
        option = item.split("=", 1)[0].replace("_", "-")
        if item.startswith("--") and option != "--help" and option not in names:
            close = [name for name in names if _acronym(name) == option]
            close += difflib.get_close_matches(option, names, n=1, cutoff=0.0)
            raise ValueError(f"unknown option {item}; did you mean {close[0]}? (--help lists all)")


def _acronym(name):
    prefix, dot, field = name.rpartition(".")
    return prefix + dot + "".join(word[0] for word in field.split("-") if word)


def _stored(path):
    if not os.path.isfile(os.path.join(os.path.expanduser(path), "config.json")):
        return None
    return Workdir(path).stored_config()


def _is_ours(error):
    """Whether the statement that raised it is in one of this project's packages."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in ("gen_jax", "experiments", "kernels", "__main__")


def _unraisable(what):
    # After an error, which is raised, TensorStore still calls back to an event loop that is gone.
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def _fail(error, code):
    print(f"error: {error}", file=sys.stderr)
    return code
