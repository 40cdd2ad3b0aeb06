"""Programs in processes of their own, and what they leave on disk."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]

# The least that the experiment can be asked for.
MINUTE = (
    "--model.widths 8 --model.groups 4 --model.attention --model.patch 8 --train.batch 4 "
    "--train.warmup 0 --train.decay constant --train.log-every 1 --sample.number 3 "
    "--sample.micro-batch 2 --sample.steps 4 --evaluate.images 4 --evaluate.draws 2"
)


class Program:
    """A command line to be completed, always on the CPU.

    Args:
        arguments: what follows `python`.
        folder: the current directory of its processes.
        cache: where they keep compiled programs, so that the next one starts soon.
        common: arguments that end every command line.
    """

    def __init__(self, arguments, folder, cache, common=()):
        self.arguments, self.folder, self.common = arguments, folder, common
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environment = os.environ | {
            "PYTHONPATH": path,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

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


def toy(folder, cache):
    """The program toy.py."""
    return Program([Path(__file__).with_name("toy.py")], folder, cache)


def experiment(folder, cache, options=MINUTE):
    """The experiment ddpm_cifar, with these options at the end of every command line."""
    return Program(["-m", "experiments.ddpm_cifar"], folder, cache, options.split())


def wait_until(condition, process, seconds=120):
    """Waits for a condition that a running process is to fulfil."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def saved_steps(workdir):
    """The steps committed in a work directory, ascending."""
    path = Path(workdir) / "checkpoints"
    names = os.listdir(path) if path.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def read_leaves(workdir, step=None):
    """All leaves of a step, the last by default, as Orbax reads them."""
    step = saved_steps(workdir)[-1] if step is None else step
    reader, leaves = ocp.PyTreeCheckpointer(), {}
    for name in ("params", "ema", "state"):
        path = Path(workdir).absolute() / "checkpoints" / str(step) / name
        names = reader.metadata(path).item_metadata.tree
        arrays = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
        for leaf, value in reader.restore(path, restore_args=arrays).items():
            leaves[f"{name}.{leaf}"] = np.asarray(value)
    return leaves


def assert_same_leaves(one, other):
    """Equal names, types, shapes and bits."""
    assert one.keys() == other.keys()
    assert {"state.step", "state.skipped"} < one.keys()
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
