"""Random command lines and damaged files, each of a seed and a number, and the law that all obey.

A case is made of (seed, number) alone, so that one that fails is run again by its name.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import random
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import gpt_pixels, gpt_text, report
from experiments.__main__ import _modules
from gen_jax import cli, dry_run, loading, parallel, runs, training
from gen_jax import config as config_lib
from gen_jax.comparison import run as comparison_run
from gen_jax.data import tfds_source

import experiments  # isort: skip

SECONDS = 10  # of the processor for one command, which takes 0.05 of them


def work_replaced(patch):
    """Leaves out the work, and the network; all that is checked before the work stays.

    Training saves its state as it is, without a step; samples are zeros, and evaluation reads them.

    Args:
      patch: of pytest.
    """

    def train(loop, step_fn, state, start, batch, mesh, stop):
        batch(start)
        steps = loop.config.steps
        loop._write({"step": steps, "loss": 1.0})
        state = state.replace(step=state.step + (steps - start))
        loop._save(state, steps)
        return training.Trained(loop._whole(state), start, 0.0, 1.0, 1.0)

    def sample(run):
        run.keep_samples(x=np.zeros(3))
        return {"samples": 3}

    def evaluate(run):
        return {"kept": len(run.kept_samples())}

    def absent(*arguments):
        raise ConnectionError("there is no network")

    def compare(comparing):
        raise MemoryError

    mesh = parallel.jax.sharding.Mesh(parallel.jax.devices()[:1], ("data",))
    patch.setattr(parallel, "data_mesh", lambda: mesh)
    patch.setattr(training._Loop, "run", train)
    patch.setattr(runs, "sample", sample)
    patch.setattr(runs, "evaluate", evaluate)
    patch.setattr(tfds_source, "read", absent)
    patch.setattr(comparison_run._Comparing, "_train", compare)


def nothing_run(patch):
    """Leaves out the phases, too, once their task is made and the start of training is checked."""

    def check(name, config, workdir, phases, data):
        task, mesh = runs.make_task(config, workdir, phases, data), parallel.data_mesh()
        for stage in task.stages:
            given = stage.initial is not None
            training.check_start(stage.training(config), stage.trainable, mesh, given)

    patch.setattr(runs, "run", check)
    patch.setattr(dry_run, "dry_run", check)


def all_experiments():
    """The modules that a user runs, by name: those of one run each, and those of many."""
    return {name: importlib.import_module(f"experiments.{name}") for name in _modules(experiments)}


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float
    trace: str

    def problem(self) -> str:
        """What the law forbids; empty where it was kept."""
        if self.trace:
            return self.trace
        if self.code not in (0, 1, 2):
            return f"the code is {self.code}"
        lines = self.stderr.splitlines()
        if self.code == 2 and (len(lines) != 1 or not lines[0].startswith("error: ")):
            return "a refusal is one line that begins with error:"
        if self.code == 1 and not (lines and lines[-1].startswith("error: ")):
            return "a failure ends with a line that begins with error:"
        if self.seconds > SECONDS:
            return f"it took {self.seconds:.1f} s of the processor"
        return ""


def ended(main: Callable[[], int]) -> Ended:
    """Runs a command in this process, on streams as Python opens them."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in range(2))
    began, trace, code = time.process_time(), "", None
    signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(record=True),
        ):
            warnings.simplefilter("always")
            code = main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        trace = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    seconds = time.process_time() - began
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return Ended(code, *texts, seconds, trace)


def _too_long(signum, frame):
    raise AssertionError(f"after {SECONDS} s of the processor")


def contents(folder: Path) -> dict:
    """What is in a folder, but for its lock: names, kinds, sizes, and when files were written."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if name == ".lock":
                continue
            path = os.path.join(place, name)
            state = os.lstat(path)
            written = None if name in folders else (state.st_size, state.st_mtime_ns)
            found[os.path.relpath(path, folder)] = written
    return found


_ZEROS = "0" * 30
NUMBERS = (
    *("-1", "0", "1", "2", "3", "5", "7", "8", "16", "64", "1000", "100000", "2147483648"),
    *("4294967295", "4294967296", "9223372036854775807", "9223372036854775808"),
    *(f"1{_ZEROS}", f"-1{_ZEROS}", f"1{_ZEROS * 14}", "0x10"),
)
FLOATS = (
    *("0.0", "-0.0", "0.5", "1.0", "1.5", "-0.1", "1e-30", "1e300", "-1e300", "1e400", ".5"),
    *("nan", "-nan", "inf", "-inf", "1_0.5"),
)
WORDS = (
    "ar",
    "masked",
    "ctc",
    "tiny",
    "paper",
    "chars",
    "bytes",
    "shapes",
    "cifar10",
    "ddim",
    "eos",
)
TEXTS = (
    "",
    " ",
    "-",
    "--",
    "-1-",
    "true",
    "False",
    "None",
    "none",
    "[]",
    "[1, 2]",
    "{}",
    "1,2",
    "1 2",
    "α β",
    "€",
    "\U0001f600",
    "e\u0301",
    "\u202e",
    "\ud800",
    "\udcff",
    "nul\0byte",
    "\0",
    "line\nbreak",
    "\r",
    "\x1b[31m",
    "%s %d {0} {}",
    "'",
    '"',
    "x" * 5000,
    "a:b",
    "json:loads",
    "json:",
    ":",
    ":x",
    "nowhere:x.y",
    ".:x",
    "..a:b",
    "gen_jax.config:RunConfig",
    "gen_jax.models.diffusion.solvers:DDIM",
    "gen_jax.models.diffusion.solvers:Ancestral.check",
    "α:β",
    "a b:c",
    "nul\0:x",
)


class Lines:
    """Command lines of an experiment, drawn from a generator.

    Args:
      module: of the experiment.
      draw: the generator.
      paths: what options may point to: files, folders, and what is not there.
    """

    def __init__(self, module, draw: random.Random, paths):
        self.draw, self.paths = draw, paths
        self.malice = draw.choice((0.1, 0.3, 1.0))  # a line of many faults is refused for the first
        experiment = getattr(module, "EXPERIMENT", None)
        if experiment is None:
            self.commands, self.presets, self.choices = ("all",), ("tiny",), {}
            config = module.ReportConfig("") if hasattr(module, "ReportConfig") else None
            config = config or module.CompareConfig()
        else:
            self.commands, self.presets = experiment.commands, tuple(experiment.presets)
            config = draw.choice(tuple(experiment.presets.values()))
            self.choices = config_lib.choices_of(type(config))
        self.fields = config_lib.flatten(config_lib.to_dict(config))

    def line(self) -> list[str]:
        """A command line."""
        draw, items = self.draw, []
        if draw.random() < 0.75:
            spoilt = draw.random() < 0.1 * self.malice
            items.append(self.spoilt_command() if spoilt else draw.choice(self.commands))
        if draw.random() < 0.8 * self.malice:
            items += self.spelled("--workdir", [draw.choice(self.paths)])
        for _ in range(draw.choice((0, 1, 1, 2, 2, 3, 5, 9))):
            items += self.option()
        if draw.random() < 0.1:
            draw.shuffle(items)
        return items

    def spoilt_command(self):
        name = self.draw.choice(self.commands)
        return self.draw.choice((name.upper(), name[:-1], name + "s", "", "help", "all train", "α"))

    def option(self):
        draw, kind = self.draw, self.draw.random()
        if kind < 0.25:
            name, values = draw.choice(
                (
                    ("--preset", self.presets),
                    ("--preset", (*self.presets, *TEXTS)),
                    ("--workdir", self.paths),
                    ("--init-from", self.paths),
                    ("--pretrained", self.paths),
                    ("--dry-run", ()),
                    ("--help", ()),
                )
            )
            return self.spelled(name, [draw.choice(values)] if values else [])
        if kind < 0.35 and self.choices:
            field = draw.choice(tuple(self.choices))
            names = TEXTS if draw.random() < 0.5 * self.malice else tuple(self.choices[field])
            return self.spelled(f"--{field}", [draw.choice(names)])
        key = draw.choice(tuple(self.fields))
        name = "--" + key.replace("_", "-")
        if isinstance(self.fields[key], bool) and draw.random() < 0.7:
            prefix, _, field = name[2:].rpartition(".")
            return [draw.choice((name, f"--{prefix}.no-{field}" if prefix else f"--no-{field}"))]
        if draw.random() < 0.2 * self.malice:
            name = self.spoilt(name)
        values = [self.value(self.fields[key]) for _ in range(1)]
        if draw.random() < 0.3 * self.malice:
            values = values * draw.choice((0, 2))
        return self.spelled(name, values) * draw.choice((1, 1, 1, 1, 2))

    def spelled(self, name, values):
        if len(values) == 1 and self.draw.random() < 0.4:
            return [f"{name}={values[0]}"]
        return [name, *values]

    def spoilt(self, name):
        at = self.draw.randrange(2, len(name))
        return self.draw.choice(
            (
                name[:at],
                name.upper(),
                name.replace("-", "_"),
                name[1:],
                name + "s",
                name[:at] + name[at + 1 :],
                "--no-" + name[2:],
                name.rpartition(".")[2],
                name + ".",
                name + "\0",
                "--α",
            )
        )

    def value(self, like):
        """A value as the option has it now, one near it, or any other."""
        draw, kind = self.draw, self.draw.random()
        if kind > 0.6 * self.malice:
            if type(like) in (int, float) and draw.random() < 0.7:
                return str(draw.choice((like * 2, like // 2, like + 1, like - 1, -like, 0, 1)))
            return " ".join(map(str, like)) if isinstance(like, list) else str(like)
        kind = draw.random()
        if kind < 0.3:
            return draw.choice(NUMBERS)
        if kind < 0.45:
            return draw.choice(FLOATS)
        if kind < 0.65:
            return draw.choice(self.paths)
        return draw.choice(TEXTS) if kind < 0.9 else draw.choice(WORDS)


class Sandbox:
    """A folder in which command lines run, with all sorts of places to point to.

    Args:
      folder: an empty one, which becomes the current directory and the home.
      patch: of pytest.
    """

    PATHS = (
        *("a file", "folder", "empty", "a file/run", "nowhere", "new/run", "loop", "dangling"),
        *("x" * 300, "y/" * 3000, "/proc/run", "/proc/self/mem", "/proc/self/fd", "/dev/null"),
        *("/dev/null/x", "", "~", "~/run", "~no-such-user/x", ".", "..", "nul\0byte", "\udcff"),
        *("für α", "folder/config.json", "finished", "finished/model", "closed", "closed/run"),
    )

    def __init__(self, folder: Path, patch):
        self.folder = folder / "a box" / "here"
        self.folder.mkdir(parents=True)
        patch.chdir(self.folder)
        patch.setenv("HOME", str(self.folder))
        (self.folder / "a file").write_text("text")
        (self.folder / "folder").mkdir()
        (self.folder / "folder" / "config.json").write_text("{}")
        (self.folder / "empty").mkdir()
        (self.folder / "closed").mkdir(mode=0o500)
        (self.folder / "loop").symlink_to("loop")
        (self.folder / "dangling").symlink_to("not there")
        self.modules = all_experiments()

    def run(self, seed, number):
        """Runs the command line of a seed and number; what is wrong with it, or an empty text."""
        draw = random.Random(f"{seed}/{number}")
        name = draw.choice(tuple(self.modules))
        module = self.modules[name]
        argv = Lines(module, draw, self.PATHS).line()
        if name == "nar_translation":  # as many pairs as are asked for are read before the work
            argv = [item for item in argv if not item.startswith("--data.pairs")]
            argv[1:1] = ["--data.pairs", "100"]
        before = contents(self.folder)
        if hasattr(module, "main"):
            end = ended(lambda: module.main(argv))
        else:
            end = ended(lambda: cli.main(module.EXPERIMENT, argv))
        return _said(end, f"{name} {argv!a}", before, self.folder)


def _said(end, what, before, folder, restored=()):
    """What is wrong with a command that has ended, and all about it; nothing where it is right."""
    problem, after = end.problem(), contents(folder)
    if after != before:
        changed = {name for name, _ in set(before.items()) ^ set(after.items())} - set(restored)
        if end.code == 2 and changed and not problem:
            problem = f"a refused start changed {sorted(changed)}"
    if not problem:
        return ""
    return f"{what}\nended with {end.code}:\n{end.stderr}\n{problem}"


_LEAST = (
    "--model.layers 1 --model.width 8 --model.heads 1 --model.mlp-dim 8 --train.decay constant "
    "--train.final-rate 0 --train.warmup 0"
)


class Damage:
    """A finished run of each of two experiments, copied, damaged and gone on with.

    Args:
      folder: an empty one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs = {
            "gpt_pixels": (gpt_pixels.EXPERIMENT, _LEAST.split()),
            "gpt_text": (gpt_text.EXPERIMENT, [*_LEAST.split(), "--model.context", "16"]),
        }
        for name in self.runs:
            for steps in (1, 2):  # two checkpoints
                assert self._main(name, "whole", "all", steps) == 0

    def _main(self, name, place, command, steps):
        options = ["--workdir", str(self.folder / f"{name} {place}"), "--train.steps", str(steps)]
        experiment, common = self.runs[name]
        return cli.main(experiment, [command, *options, *common])

    def run(self, seed, number):
        """Damages a copy and runs a command; what is wrong with that, or an empty text."""
        draw = random.Random(f"{seed}/{number}")
        name = draw.choice(tuple(self.runs))
        place = self.folder / f"{name} damaged"
        shutil.copytree(self.folder / f"{name} whole", place)
        try:
            done = [self._spoil(draw, place) for _ in range(draw.choice((1, 1, 1, 2)))]
            command = draw.choice(("train", "more", "sample", "evaluate", "all", "report", "load"))
            if command == "report":
                main = lambda: report.main(["--workdir", str(place)])  # noqa: E731
            elif command == "load":
                main = lambda: cli.guarded(lambda: loading.load(place))  # noqa: E731
            else:
                steps = 3 if command == "more" else 2
                command = "train" if command == "more" else command
                main = lambda: self._main(name, "damaged", command, steps)  # noqa: E731
            before = contents(place)
            lost, end = not (place / "config.json").exists(), ended(main)
            # It is written before samples are read where it is lost, and before all arrays are.
            early = lost or end.stderr.startswith("error: every checkpoint in ")
            restored = ("config.json",) if early else ()
            return _said(end, f"{name} {command} after {done}", before, place, restored)
        finally:
            shutil.rmtree(place)

    def _spoil(self, draw, place):
        """Damages one file; says which and how."""
        files = sorted(path for path in place.rglob("*") if path.is_file() and path.name != ".lock")
        plain = [path for path in files if "checkpoints" not in path.parts]
        path = draw.choice(plain if draw.random() < 0.7 else files)
        how = draw.choice(("flip", "cut", "empty", "swap", "folder", "noise", "loop", "gone"))
        if path.suffix in (".json", ".jsonl") and draw.random() < 0.7:
            how = "json"
        content = path.read_bytes()
        if how == "flip":
            content = bytearray(content or b"\0")
            for _ in range(draw.choice((1, 1, 8))):
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif how == "cut":
            content = content[: draw.randrange(len(content) + 1)]
        elif how == "empty":
            content = b""
        elif how == "swap":
            content = draw.choice(files).read_bytes()
        elif how == "noise":
            content = draw.randbytes(draw.choice((1, 100, 5000)))
        elif how == "json":
            content = self._other_json(draw, content)
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "loop":
            path.symlink_to(path.name)
        elif how != "gone":
            path.write_bytes(content)
        return f"{how} {path.relative_to(place)}"

    def _other_json(self, draw, content):
        """JSON with one value, at any depth, that is another."""
        other = draw.choice(VALUES)
        if draw.random() < 0.2:
            return other.encode()
        try:
            whole = [content] if content.startswith(b"{\n") else content.splitlines()  # of a log
            lines = [json.loads(part) for part in whole]
        except ValueError:  # it is damaged already
            return other.encode()
        mark, at = "the place of the other value", draw.choice(lines) if lines else None
        if not isinstance(at, dict | list) or not at:
            return other.encode()
        while True:
            keys = range(len(at)) if isinstance(at, list) else tuple(at)
            key = draw.choice(keys)
            inner = at[key]
            if isinstance(inner, dict | list) and inner and draw.random() < 0.8:
                at = inner
                continue
            if isinstance(at, dict) and draw.random() < 0.2:
                del at[key]
            else:
                at[key] = mark
            break
        text = "\n".join(map(json.dumps, lines))
        return text.replace(json.dumps(mark), other).encode()


VALUES = (
    *("null", "true", "false", "0", "-1", "1", "1.5", "NaN", "Infinity", "-Infinity", "1e400"),
    *(f"1{_ZEROS}", "1" * 5000, '""', '"\\u0000"', '"\\ud800"', '"~no-such-user/x"', '"α\\n"'),
    *('"' + "x" * 5000 + '"', "[]", "{}", "[[1]]", '{"name": []}', '{"a": {"b": null}}'),
    *("[" * 100_000, "[" * 500 + "]" * 500, '{"a":' * 300 + "1" + "}" * 300, "", "nul", "[1,]"),
)
