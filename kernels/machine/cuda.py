"""Kernels for GPUs compiled for an H100 that is not there, and what their machine code says.

XLA compiles for a GPU that is described to it, and needs neither the GPU nor its driver; the
assembler comes with the extra `cuda`. It reports registers and what did not fit into them, and the
instructions can be read. A GPU decides while it runs which warp goes next, so that no time follows
from the text: there are counts here, and no cycles.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from kernels.machine.compiling import described

__all__ = ["Kernel", "Program", "Workshop", "missing"]

_H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_LAUNCHED = re.compile(r" (?:fusion|custom-call|sort|copy|scatter)\(")
_HASH = re.compile(r'kernel_hash = "(.*?)", module')
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)")


def missing() -> str | None:
    """Why nothing can be compiled for GPUs here, or None."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None or _tools() is None:
        return "the compilers of CUDA are not installed: pip install -e '.[cuda]' (Python 3.12)"
    return None


def _tools():
    """The folder of the program that prints machine code."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for found in pathlib.Path(folder).glob("*/bin/nvdisasm"):
            return found.parent
    return None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Pallas kernel in machine code.

    Attributes:
      name: of the kernel.
      registers: of a thread.
      spills: bytes of a thread that are stored or loaded for want of registers.
      shared: bytes of shared memory.
      instructions: how often the code has each instruction, `HGMMA` (products of matrices) and
        `UTMALDG` (copies of tiles to shared memory) among them.
    """

    name: str
    registers: int
    spills: int
    shared: int
    instructions: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      kernels: those of Pallas; XLA's own are not read.
      temporaries: bytes that it needs besides arguments and results.
      text: its HLO, as it was compiled.
    """

    kernels: tuple[Kernel, ...]
    temporaries: int
    text: str

    @property
    def launches(self) -> int:
        """Instructions that are a kernel, or a few, of their own.

        Those of a loop count once, and of the branches of a choice the one with most counts.
        """
        bodies = dict(
            re.findall(r"^(?:ENTRY )?%([\w.\-]+) \(.*?\{$(.*?)^\}", self.text, re.M | re.S)
        )
        entry = re.search(r"^ENTRY %([\w.\-]+)", self.text, re.M)[1]
        return _launches(entry, bodies)

    @property
    def branches(self) -> int:
        """Choices that are made while it runs."""
        return self.text.count(" conditional(")


class Workshop:
    """Compiles for an absent H100; `Workshop.open()` returns the one of this process.

    Raises:
      RuntimeError: the extra `cuda` is not installed.
    """

    def __init__(self):
        why = missing()
        if why:
            raise RuntimeError(why)
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="gen_jax_machine_code_"))
        # XLA would tune its products on the GPU. It reads its flags once.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
        os.environ.update(XLA_FLAGS=flags.strip())
        self._known = {}
        self._environment = {
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "MOSAIC_GPU_DUMP_SASS": "1",
            "MOSAIC_GPU_DUMP_TO": str(self._folder),
            "PATH": f"{_tools()}{os.pathsep}{os.environ['PATH']}",
        }

    @classmethod
    @functools.cache
    def open(cls) -> "Workshop":
        """The one of this process."""
        return cls()

    @functools.cached_property
    def device(self) -> jax.Device:
        """The GPU that is not there."""
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=_H100
        )
        return topology.devices[0]

    def compile(self, function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> Program:
        """Compiles a function of arrays.

        Args:
          function: to be jitted.
          *arguments: trees of arrays, or of what has a shape and a dtype.
          donate: places of the arguments whose memory the results may take.

        Raises:
          jax.errors.JaxRuntimeError: the compiler refuses.
          RuntimeError: the machine code of a kernel was not written.
        """
        sharding = jax.sharding.SingleDeviceSharding(self.device)
        arguments = jax.tree.map(lambda leaf: described(leaf, sharding), arguments)
        try:
            # A function of its own, so that nothing is left of how the same one was traced before.
            fresh = jax.jit(lambda *arguments: function(*arguments), donate_argnums=donate)
            lowered = fresh.trace(*arguments).lower(lowering_platforms=("cuda",))
            os.environ.update(self._environment)
            compiled = lowered.compile()
            # A kernel that is in an earlier program as well is not assembled again.
            hashes = dict.fromkeys(_HASH.findall(lowered.as_text()))
            new = [own for own in hashes if own not in self._known]
            found = [_read(path) for path in sorted(self._folder.glob("*.ptxas"))]
            if len(found) != len(new):
                raise RuntimeError(f"the machine code of {len(found)} kernels of {len(new)} came")
            self._known.update(zip(new, found, strict=True))
            kernels = tuple(self._known[own] for own in hashes)
            temporaries = compiled.memory_analysis().temp_size_in_bytes
            return Program(kernels, temporaries, compiled.as_text())
        finally:
            for path in self._folder.iterdir():
                path.unlink()

    def close(self) -> None:
        """Removes the folder of machine code."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder)


def _launches(name, bodies):
    """Of one computation, with those that it runs."""
    number = 0
    for line in bodies[name].splitlines():
        called = re.findall(r"(?:body|to_apply)=%([\w.\-]+)", line)
        branches = re.search(r"(?:branch_computations=\{|true_computation=)([^}]*)", line)
        if _LAUNCHED.search(line):
            number += 1
        elif re.search(r" (?:while|call)\(", line):
            number += sum(_launches(inner, bodies) for inner in called)
        elif branches:
            inner = re.findall(r"%([\w.\-]+)", branches[1])
            number += max(_launches(own, bodies) for own in inner if own in bodies)
    return number


def _read(report):
    """A kernel, from what the assembler said of it and what it made."""
    text = report.read_text(encoding="utf-8", errors="replace")
    name = re.sub(r"_\d+$", "", report.stem)
    (resources,) = report.parent.glob(f"{name}_*.resources.txt")  # with a number of its own
    shared = resources.read_text(encoding="utf-8")
    code = report.with_suffix(".sass_ctrl").read_text(encoding="utf-8", errors="replace")
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    return Kernel(
        name=name,
        registers=int(re.search(r"Used (\d+) registers", text)[1]),
        spills=int(spills[1]) + int(spills[2]),
        shared=int(re.search(r"smem_scratch_bytes=(\d+)", shared)[1]),
        instructions=dict(collections.Counter(_INSTRUCTION.findall(code))),
    )
