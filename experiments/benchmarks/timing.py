"""What the benchmarks share."""

import importlib
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import tyro

from gen_jax import arguments, cli, hosts

__all__ = [
    "Peer",
    "agreement",
    "alternate",
    "is_timed",
    "machine",
    "main",
    "require",
    "torch_device",
]


class Peer:
    """A package that a benchmark compares with, imported when something of it is first used.

    diffusers and transformers put another module in their own place while they are imported, which
    `importlib.util.LazyLoader` does not survive.
    """

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def main(kind: type, benchmark: Callable[[Any], Any], about: str) -> int:
    """Runs a benchmark from the command line; what it returns is the last line, as JSON.

    Args:
      kind: the dataclass of its configuration.
      benchmark: a function of a configuration.
      about: what --help says first.

    Returns:
      The exit code of `cli.guarded`.
    """

    def run():
        with arguments.refusals_in_one_line():
            config = tyro.cli(kind, description=about)
        hosts.check_platform()
        print(json.dumps(benchmark(config)))

    return cli.guarded(run)


def require(*packages: str) -> None:
    """Raises a ValueError that says which are not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} not installed; install the extra: pip install -e '.[oracles]'"
        )


def is_timed(package: str, name: str) -> bool:
    """Whether a peer for CPUs (extra `peers`) can take part; where it cannot, a line says why."""
    if torch_device() != "cpu":
        print(f"{name} is timed on CPUs alone")
    elif importlib.util.find_spec(package) is None:
        print(f"{name} is not installed (extra `peers`): not timed")
    else:
        return True
    return False


def agreement(difference: float, tolerance: float, what: str = "the two sides") -> float:
    """The difference, which must be small enough for speeds to be compared.

    Raises:
      FloatingPointError: it is above the tolerance, or no number; the message says what differs.
    """
    if not difference <= tolerance:
        raise FloatingPointError(f"{what} differ by {difference:.2g}, above {tolerance}: not timed")
    return difference


def torch_device() -> str:
    """PyTorch's device where jax runs: CUDA where that is a GPU."""
    return {"gpu": "cuda"}.get(jax.default_backend(), "cpu")


def machine() -> str:
    """Processor, cores and, where jax runs on another, the device."""
    device = jax.devices()[0]
    kind = "" if device.platform == "cpu" else f", {device.device_kind}"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores{kind}"


def alternate(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run of each side, one run of each in turn; each must wait for its result.

    A short pause comes before each: PyTorch's threads wait for more work by spinning, and would
    take a core from what is timed next.
    """
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            time.sleep(0.1)
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds
