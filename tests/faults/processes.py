"""Programs in processes of their own, and what they leave on disk."""

import contextlib
import importlib
import json
import multiprocessing
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent

# The least that the experiment can be asked for.
MINUTE = (
    "--model.widths 8 --model.groups 4 --model.attention --model.patch 8 --train.batch 4 "
    "--train.warmup 0 --train.decay constant --train.log-every 1 --sample.number 3 "
    "--sample.micro-batch 2 --sampler.steps 4 --evaluate.images 4 --evaluate.draws 2"
)

# The same of two other experiments.
_TRANSFORMER = (
    "--model.layers 1 --model.width 8 --model.heads 1 --model.mlp-dim 8 --train.batch 4 "
    "--train.warmup 0 --train.decay constant --train.final-rate 0 --train.log-every 1 "
)
LEAST_TEXT = (
    f"{_TRANSFORMER} --data.name file --data.path {shlex.quote(str(HERE / 'toy.py'))} "
    "--model.context 16 --model.position learned --model.bias --sample.tokens 20 "
    "--train.evaluate-every 5"
)
LEAST_STAGES = (
    f"{_TRANSFORMER} --coder.widths 4 --coder.groups 2 --coder.patch 8 --coder.no-middle-attention "
    "--quantiser.codes 8 --quantiser.width 4 --quantiser.update gradient "
    "--quantiser.restart-every 0 --coder-train.batch 4 --coder-train.warmup 0 "
    "--coder-train.decay constant --coder-train.log-every 1 --evaluate.images 32"
)

# Programs as users have them, where those of the tests are compiled in a hurry.
OPTIMISED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}


_PRELOADED = [
    *("gen_jax.trainables", "gen_jax.training", "tyro", "toy"),
    *("gen_jax.runs", "gen_jax.tasks.text.task", "experiments.gpt_text"),
    *("gen_jax.tasks.two_stage.task", "experiments.two_stage"),
]


def _environment():
    """That of a process on the CPU; every program that it compiles is kept for the next."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


class Program:
    """A command line to be completed, always on the CPU.

    Args:
      arguments: what follows `python`.
      folder: the current directory of its processes.
      common: arguments that end every command line.
    """

    def __init__(self, arguments, folder, common=()):
        self.arguments, self.folder, self.common = arguments, folder, common
        self.environment = _environment()

    def command(self, *arguments):
        """The whole command line."""
        return [sys.executable, *map(str, (*self.arguments, *arguments, *self.common))]

    def start(self, *arguments, **options):
        """A process that goes on by itself; both of its streams are pipes of text."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            self.command(*arguments),
            **{"cwd": self.folder, "env": self.environment} | streams | options,
        )

    def run(self, *arguments, **options):
        """Waits for the end; the process with `returncode`, `stdout` and `stderr`."""
        with self.start(*arguments, **options) as process:
            try:
                stdout, stderr = process.communicate(timeout=300)
            finally:
                process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


class Toy(Program):
    """The program toy.py.

    Its processes are forked from one that has imported jax but has not used it yet, so that a start
    takes a tenth of a second; `command` starts one from nothing.
    """

    def __init__(self, folder):
        super().__init__([HERE / "toy.py"], folder)

    def start(self, *arguments, start_new_session=False):
        arguments = self.command(*arguments)[2:]
        return Forked(_run_toy, arguments, self.folder, start_new_session)


class ForkedExperiment(Program):
    """An experiment whose processes are forked as those of the toy are; `command` is as it is.

    Args:
      name: of the experiment.
      folder: the current directory of its processes.
      common: options that end every command line.
    """

    def __init__(self, name, folder, common):
        super().__init__(["-m", f"experiments.{name}"], folder, shlex.split(common))
        self.name = name

    def start(self, *arguments):
        arguments = [self.name, *self.command(*arguments)[3:]]
        return Forked(_run_experiment, arguments, self.folder)


class Forked:
    """What `subprocess.Popen` is for a command line: a process that is forked."""

    def __init__(self, main, arguments, folder, session=False):
        context = _fork_server()
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        writers = [writer for _, writer in pipes]
        self.args = arguments
        self._process = context.Process(
            target=_run_forked, args=(main, arguments, str(folder), session, *writers)
        )
        self._process.start()
        self.pid = self._process.pid
        self.stdout, self.stderr = (os.fdopen(os.dup(r.fileno()), "r") for r, _ in pipes)
        for connection in (end for pipe in pipes for end in pipe):
            connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.join()
        self.stdout.close()
        self.stderr.close()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self):
        if self.poll() is None:
            self._process.kill()

    def communicate(self, timeout=120):
        """Waits for the end; what is left to read on both streams."""
        texts = ["", ""]

        def read(place, stream):
            texts[place] = stream.read()

        readers = [
            threading.Thread(target=read, args=pair, daemon=True)
            for pair in enumerate((self.stdout, self.stderr))
        ]
        for reader in readers:
            reader.start()
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        for reader in readers:
            reader.join()
        return tuple(texts)


def _fork_server():
    """The server of forks, started with the environment of the processes.

    It must have one thread, so NumPy's own are switched off.
    """
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (_environment() | {"OPENBLAS_NUM_THREADS": "1"}).items():
            patch.setenv(name, value)
        context.set_forkserver_preload(_PRELOADED)
        multiprocessing.forkserver.ensure_running()
    return context


def _run_forked(main, arguments, folder, session, stdout, stderr):
    """In the forked process: where it runs, and what it is run with."""
    if session:
        os.setsid()
    for number, stream in ((1, stdout), (2, stderr)):
        os.dup2(stream.fileno(), number)
    os.chdir(folder)
    sys.exit(main(arguments))


def _run_toy(arguments):
    """What `python toy.py` does."""
    import toy

    sys.argv[1:] = arguments
    return toy.main()


def _run_experiment(arguments):
    """What `python -m experiments.NAME` does."""
    from gen_jax import cli, signals

    signals.end_at_once()
    name, *options = arguments
    return cli.main(importlib.import_module(f"experiments.{name}").EXPERIMENT, options)


def experiment(folder, options=MINUTE):
    """The experiment ddpm_cifar, with these options at the end of every command line."""
    return Program(["-m", "experiments.ddpm_cifar"], folder, options.split())


def free_address():
    """Of this machine, with a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def seconds_of_processes():
    """What the processor has spent on processes that have ended, however busy the machine was."""
    times = os.times()
    return times.children_user + times.children_system


def wait_until(condition, process, seconds=120):
    """Waits for a condition that a running process is to fulfil."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def next_error_line(process, start):
    """The first line on standard error that begins like this."""
    for line in process.stderr:
        if line.startswith(start):
            return line
    raise AssertionError(f"no line {start!r}")


def _stage(workdir):
    """Where a run trains: in the directory of its stage, or of the run itself for the toy."""
    path = Path(workdir).absolute()
    return path / "model" if (path / "model").is_dir() else path


def saved_steps(workdir):
    """The steps committed in a work directory, ascending."""
    path = _stage(workdir) / "checkpoints"
    names = os.listdir(path) if path.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def records(workdir):
    """The records in metrics.jsonl; none where it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        lines = (_stage(workdir) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]
    return []


def read_leaves(workdir, step=None):
    """All leaves of a step, the last by default, as Orbax reads them."""
    step = saved_steps(workdir)[-1] if step is None else step
    reader, leaves = ocp.PyTreeCheckpointer(), {}
    for name in ("ema", "state", "loop"):
        path = _stage(workdir) / "checkpoints" / str(step) / name
        names = reader.metadata(path).item_metadata.tree
        arrays = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
        for leaf, value in reader.restore(path, restore_args=arrays).items():
            leaves[f"{name}.{leaf}"] = np.asarray(value)
    return leaves


def assert_same_leaves(one, other):
    """Equal names, types, shapes and bits."""
    assert one.keys() == other.keys()
    assert {"loop.step", "loop.skipped"} < one.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert value.shape == other[name].shape, name
        assert value.tobytes() == other[name].tobytes(), name


def results(workdir):
    """All that a run leaves, by name: leaves of checkpoints, records and figures, other files.

    What depends on the clock is left out.
    """
    found = {}
    for path in sorted(path for path in Path(workdir).rglob("*") if path.is_file()):
        name = path.relative_to(workdir)
        if "checkpoints" in name.parts:
            stage, step = name.parts[0], name.parts[2]  # as in model/checkpoints/7/ema/d/1f
            if (stage, step) not in found:
                found[stage, step] = read_leaves(Path(workdir) / stage, step)
        elif path.suffix == ".jsonl":
            lines = path.read_text().splitlines()
            found[name] = [_without_times(json.loads(line)) for line in lines]
        elif path.name == "summary.json":
            figures = json.loads(path.read_text().replace(str(workdir), "the work directory"))
            found[name] = _without_times(figures)
        elif path.name != ".lock":
            found[name] = path.read_bytes()
    return found


def _without_times(figures):
    return {k: v for k, v in figures.items() if not k.endswith(("_seconds", "_per_second"))}


def assert_same_results(one, other):
    """Of two work directories: the same files, with the same bits in them but for times."""
    one, other = results(one), results(other)
    assert one.keys() == other.keys()
    for name, content in one.items():
        if isinstance(name, tuple):
            assert_same_leaves(content, other[name])
        else:
            assert content == other[name], name


def assert_one_line(stderr, *parts):
    """An error of one line that says all these things, and nothing else on the stream."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), stderr
    for part in parts:
        assert str(part) in stderr, (part, stderr)
