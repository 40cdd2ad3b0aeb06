"""Kernels for an H100 that is not there: what their machine code says, case by case.

`python -m kernels.estimate --chip h100` prints it (extra `cuda`). There are no cycles: registers,
what did not fit into them, products of matrices, copies, and what a program needs besides its
arguments and results.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax

from kernels import dispatch, testing
from kernels.machine import cuda

__all__ = ["GPUS", "inspect", "report"]

GPUS = ("h100",)
_HEADER = (
    "| case | | registers | spilled bytes | shared KB | products (HGMMA) | copies (UTMALDG) "
    "| instructions | temporaries MB |\n|---|---|---|---|---|---|---|---|---|"
)


def inspect(suite: testing.Suite, case: testing.Case) -> list[dict[str, Any]]:
    """Compiles one case with every implementation that a GPU can have.

    Args:
      suite: of the operation.
      case: arrays of it are never read, only their shapes and types.

    Returns:
      One row for each implementation: `name`, and either `refuses`, the reason, or `temporaries`
      (bytes) and `kernels`, a list of `kernels.machine.cuda.Kernel`.

    Raises:
      RuntimeError: the extra `cuda` is not installed.
    """
    rows = []
    with dispatch.any_platform():
        for name, entry in suite.implementations().items():
            if entry.only_on is not None and "cuda" not in entry.only_on:
                continue
            run = functools.partial(suite.call, implementation=name)
            function, arrays = testing.program(run, case)
            try:
                program = cuda.Workshop.open().compile(function, *arrays, donate=case.donated)
            except dispatch.Refusal as refusal:
                rows.append({"name": name, "refuses": refusal.reason})
                continue
            found = {"temporaries": program.temporaries, "kernels": program.kernels}
            rows.append({"name": name, **found})
    return rows


def report(suites: Mapping[str, testing.Suite]) -> None:
    """Prints a table of all cases, and a line of JSON.

    Args:
      suites: by operation.
    """
    print(f"Read in machine code, nothing was run; H100, jax {jax.__version__}.\n")
    results = []
    for op, suite in suites.items():
        print(f"{op}\n\n{_HEADER}")
        for case in suite.estimated:
            for row in inspect(suite, case):
                print(_line(case, row), flush=True)
                kernels = [dataclasses.asdict(kernel) for kernel in row.get("kernels", ())]
                results.append({"op": op, "case": str(case), **row, "kernels": kernels})
        print()
    print(json.dumps({"chip": "h100", "jax": jax.__version__, "results": results}))
    cuda.Workshop.open().close()


def _line(case, row):
    start = f"| {case} | {row['name']} "
    if "refuses" in row:
        return f"{start}| {row['refuses']} |"
    cells = [""] * 6
    if row["kernels"]:
        found, counts = row["kernels"], [kernel.instructions for kernel in row["kernels"]]
        cells = [
            max(kernel.registers for kernel in found),
            sum(kernel.spills for kernel in found),
            f"{max(kernel.shared for kernel in found) / 1024:.1f}",
            sum(count.get("HGMMA", 0) for count in counts),
            sum(count.get("UTMALDG", 0) for count in counts),
            f"{sum(sum(count.values()) for count in counts):,}",
        ]
    return f"{start}| {' | '.join(map(str, cells))} | {row['temporaries'] / 1e6:.1f} |"
