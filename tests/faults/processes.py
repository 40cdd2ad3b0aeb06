"""Programs in processes of their own, and what they leave on disk."""

import contextlib
import json
import multiprocessing
import os
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


# Programs as users have them, where those of the tests are compiled in a hurry.
OPTIMISED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}


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
        return Forked(self.command(*arguments)[2:], self.folder, start_new_session)


class Forked:
    """What `subprocess.Popen` is for a command line: a process of the toy, forked."""

    def __init__(self, arguments, folder, session):
        context = _fork_server()
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        writers = [writer for _, writer in pipes]
        self.args = arguments
        self._process = context.Process(
            target=_run_toy, args=(arguments, str(folder), session, *writers)
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
        context.set_forkserver_preload(["gen_jax.trainables", "gen_jax.training", "tyro", "toy"])
        multiprocessing.forkserver.ensure_running()
    return context


def _run_toy(arguments, folder, session, stdout, stderr):
    """In the forked process: what `python toy.py` does."""
    import toy

    if session:
        os.setsid()
    for number, stream in ((1, stdout), (2, stderr)):
        os.dup2(stream.fileno(), number)
    os.chdir(folder)
    sys.argv[1:] = arguments
    sys.exit(toy.main())


def experiment(folder, options=MINUTE):
    """The experiment ddpm_cifar, with these options at the end of every command line."""
    return Program(["-m", "experiments.ddpm_cifar"], folder, options.split())


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


def assert_one_line(stderr, *parts):
    """An error of one line that says all these things, and nothing else on the stream."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), stderr
    for part in parts:
        assert str(part) in stderr, (part, stderr)
