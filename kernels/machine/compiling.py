"""Programs compiled by the real compiler of a TPU that is not there.

The package libtpu (extra `tpu`) has the compilers of XLA and of Pallas for every TPU, and needs
none of them to be present. `Workshop` compiles in this process; what it compiles cannot be run.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from kernels.machine.bundles import Walk, walk
from kernels.machine.calls import count as count_calls
from kernels.machine.chips import CHIPS, Chip

__all__ = ["Program", "Workshop", "described", "missing"]

_MESH = 4  # chips of the smallest host


def missing() -> str | None:
    """Why nothing can be compiled for TPUs here, or None."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed: pip install -e '.[tpu]'"
    return None


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      chip: that it is for.
      text: its HLO, as it was compiled.
      walks: what each kernel and fusion does, by name; empty when nothing was to be counted.
      calls: how often it is run, by the same names; once for one that is in no call.
      strange: the number of calls that nothing is known of.
      temporaries: bytes that it needs besides arguments and results.
      arguments: bytes of its arguments.
      results: bytes of its results, those that are aliased to an argument among them.
      aliased: bytes of the results that replace an argument.
    """

    chip: Chip
    text: str
    walks: Mapping[str, Walk]
    calls: Mapping[str, int]
    strange: int
    temporaries: int
    arguments: int
    results: int
    aliased: int

    @property
    def repeats(self) -> bool:
        """Whether it has a loop or a branch, so that its kernels do not run once each."""
        return re.search(r"\b(while|conditional)\(", self.text) is not None

    @property
    def cycles(self) -> int:
        """Of all its kernels, one after the other, as often as they are called."""
        return self.total("cycles")

    def total(self, figure: str) -> int:
        """The sum of a figure of `Walk` over all calls."""
        return sum(
            self.calls.get(name, 1) * getattr(walk, figure) for name, walk in self.walks.items()
        )

    @property
    def matrix(self) -> int:
        """Cycles for which the matrix units work."""
        return self.total("matrix")

    @property
    def hbm_bytes(self) -> int:
        """Copied from and to HBM."""
        return self.total("hbm_bytes")

    @property
    def spills(self) -> int:
        """Vector registers that were stored for want of room."""
        return self.total("spills")

    @property
    def unknown(self) -> list[str]:
        """What was not understood; of the frame around the kernels that is always something."""
        return sorted(
            {name for kernel, w in self.walks.items() if kernel != _FRAME for name in w.unknown}
        )


_FRAME = "TLP"  # the program at the top, which starts the kernels


class Workshop:
    """Compiles for absent TPUs.

    There is one in a process, since libtpu reads where it shall write its machine code when it is
    loaded: `Workshop.open()` returns it.

    Raises:
      RuntimeError: libtpu is not installed.
    """

    def __init__(self):
        why = missing()
        if why:
            raise RuntimeError(why)
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="gen_jax_machine_code_"))
        flags = (
            f"--xla_jf_dump_to={self._folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=.*final.*"
        )
        os.environ.update(
            LIBTPU_INIT_ARGS=f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip(),
            TPU_SKIP_MDS_QUERY="1",
            TPU_WORKER_HOSTNAMES="localhost",
            TPU_ACCELERATOR_TYPE=CHIPS["v5e"].accelerator,
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        )

    @classmethod
    @functools.cache
    def open(cls) -> "Workshop":
        """The one of this process."""
        return cls()

    @functools.cache  # noqa: B019  there is one workshop
    def devices(self, chip: Chip, number: int = 1) -> tuple[jax.Device, ...]:
        """One device of this kind, or the four of a host.

        Raises:
          ValueError: another number.
        """
        from jax.experimental import topologies

        if number == 1:
            shape, options = "1x1x1", {"chips_per_host_bounds": [1, 1, 1]}
        elif number == _MESH:
            shape, options = "2x2", {}
        else:
            raise ValueError(f"{number} devices: there are topologies of 1 and {_MESH}")
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.name}:{shape}", **options
        )
        return tuple(topology.devices)

    def compile(
        self,
        function: Callable,
        *arguments: Any,
        chip: Chip,
        sharding: jax.sharding.Sharding | None = None,
        donate: tuple[int, ...] = (),
        scalar: int | None = None,
        count: bool = True,
    ) -> Program:
        """Compiles a function of arrays.

        Args:
          function: to be jitted.
          *arguments: trees of arrays, or of what has a shape and a dtype.
          chip: that the program is for.
          sharding: of all arguments that have none; None for one device.
          donate: places of the arguments whose memory the results may take.
          scalar: the value of numbers among the arguments that decide what a kernel does; see
            `walk`.
          count: whether cycles are counted, which takes seconds for long programs.

        Raises:
          jax.errors.JaxRuntimeError: the compiler refuses, for want of memory, say.
          RuntimeError: cycles are to be counted, and libtpu had been loaded by something else.
        """
        if sharding is None:
            sharding = jax.sharding.SingleDeviceSharding(self.devices(chip)[0])
        arguments = jax.tree.map(lambda leaf: described(leaf, sharding), arguments)
        before = set(self._folder.iterdir())
        try:
            # A function of its own, so that nothing is left of how the same one was traced before.
            fresh = jax.jit(lambda *arguments: function(*arguments), donate_argnums=donate)
            compiled = fresh.lower(*arguments).compile()
            made = sorted(set(self._folder.iterdir()) - before)
            memory, text = compiled.memory_analysis(), compiled.as_text()
            walks = _walks(made, chip, scalar) if count else {}
            if count and not walks:
                raise RuntimeError(
                    "libtpu wrote no machine code: it was loaded before the workshop was opened; "
                    "set JAX_PLATFORMS=cpu, so that nothing else loads it"
                )
            calls, strange = _calls(made, text, walks)
            return Program(
                chip=chip,
                text=text,
                walks=walks,
                calls=calls,
                strange=strange,
                temporaries=memory.temp_size_in_bytes,
                arguments=memory.argument_size_in_bytes,
                results=memory.output_size_in_bytes,
                aliased=memory.alias_size_in_bytes,
            )
        finally:
            for path in set(self._folder.iterdir()) - before:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()

    def close(self) -> None:
        """Removes the folder of machine code."""
        shutil.rmtree(self._folder, ignore_errors=True)


def described(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, with this sharding where it has none of its own."""
    own = getattr(leaf, "sharding", None)
    kept = isinstance(leaf, jax.ShapeDtypeStruct) and own is not None
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own if kept else sharding)


def _calls(paths, text, walks):
    frames = [path for path in paths if re.search(rf"-{_FRAME}-\d+-final_bundles", path.name)]
    if len(frames) != 1 or not walks:
        return {}, 0
    return count_calls(frames[0].read_text(encoding="utf-8", errors="replace"), text, set(walks))


def _walks(paths, chip, scalar):
    walks = {}
    for path in paths:
        match = re.match(r"\d+-(.*)-\d+-final_bundles\.txt", path.name)
        if not match or "schedule-analysis" in path.name or match[1].startswith("<late"):
            continue
        walks[match[1]] = walk(path, chip, None if match[1] == _FRAME else scalar)
    return walks
