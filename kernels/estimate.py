"""Compares the implementations of operations on TPUs that are not there.

    python -m kernels.estimate [OP ...] [--chip v5e,v6e] [--check | --store]
    python -m kernels.estimate [OP ...] --chip h100

Every case that a suite marks for estimates is compiled by the real compiler of the chip (extra
`tpu`), once for each implementation, and the cycles of the machine code are counted
(`kernels.machine.bundles`). All figures are estimated from machine code, not timed: against the
timings of matrix products on a v5e that the documentation of JAX gives they are within 6 %; on
other chips and kernels only ratios should be trusted.

The floor is what no implementation can beat: the work of the matrix units in the one that has
least of it, or arguments and results over the bandwidth of HBM. The ratio is the cycles of the
fastest program of XLA alone over those of the kernel.

Of an H100 the table is another one, without cycles: see `kernels.inspection`.
"""

import argparse
import functools
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from kernels import dispatch, inspection, testing
from kernels.commands import Parser
from kernels.machine import cuda
from kernels.machine.chips import CHIPS, Chip
from kernels.machine.compiling import Program, Workshop, missing

__all__ = ["BUDGETS", "estimate", "exceeded", "main"]

BUDGETS = pathlib.Path(__file__).with_name("estimates.json")
_TOLERANCE = 1.05


def estimate(suite: testing.Suite, case: testing.Case, chip: Chip) -> list[dict[str, Any]]:
    """Compiles one case with every implementation that a TPU can have.

    Args:
      suite: of the operation.
      case: arrays of it are never read, only their shapes and types.
      chip: that programs are compiled for.

    Returns:
      One row for each implementation: `name`, `kernel` (whether it is one of Pallas), and either
      `refuses`, the reason, or `cycles`, `us`, `floor_us`, `matrix` (the share of the time for
      which the matrix units work), `hbm_bytes`, `spills`, `temporaries` (bytes), `copy_wait`
      (the share of the time for which it waits for copies), `slots` of the longest kernel,
      `unknown` and, where it is a kernel, `ratio`.

    Raises:
      RuntimeError: libtpu is not installed.
    """
    rows, programs = [], {}
    with dispatch.any_platform():
        for name, entry in suite.implementations().items():
            if entry.only_on is not None and "tpu" not in entry.only_on:
                continue
            row = {"name": name, "kernel": entry.only_on is not None}
            rows.append(row)
            try:
                program = compiled(suite, case, name, chip)
            except dispatch.Refusal as refusal:
                row["refuses"] = refusal.reason
                continue
            if program.repeats:
                row["refuses"] = "has a loop or a branch, whose cycles are not counted"
            else:
                programs[name] = program
    least = min(program.matrix for program in programs.values())
    plain = [row["name"] for row in rows if not row["kernel"] and row["name"] in programs]
    fastest = min(programs[name].cycles for name in plain)
    for row in rows:
        if row["name"] in programs:
            program = programs[row["name"]]
            row.update(_figures(program, least))
            if row["kernel"]:
                row["ratio"] = fastest / program.cycles
    return rows


def compiled(suite: testing.Suite, case: testing.Case, name: str, chip: Chip) -> Program:
    """The program of one implementation.

    Raises:
      Refusal: it cannot take the arguments of the case.
      RuntimeError: libtpu is not installed.
    """
    run = functools.partial(suite.call, implementation=name)
    arrays, rest = dispatch.split_static(case.arguments(0))

    def program(*arrays):
        return run(*dispatch.fill_static(arrays, rest), **case.options)

    return Workshop.open().compile(
        program, *arrays, chip=chip, donate=case.donated, scalar=case.scalar
    )


def _figures(program, least_matrix):
    chip = program.chip
    needed = program.arguments + program.results - program.aliased
    floor = max(least_matrix, needed / chip.bytes_per_cycle)
    longest = max(program.walks.values(), key=lambda walk: walk.cycles)
    return {
        "cycles": program.cycles,
        "us": chip.microseconds(program.cycles),
        "floor_us": chip.microseconds(floor),
        "matrix": program.matrix / program.cycles,
        "hbm_bytes": program.hbm_bytes,
        "spills": program.spills,
        "temporaries": program.temporaries,
        "copy_wait": program.total("copy_wait") / program.cycles,
        "slots": longest.slots,
        "unknown": program.unknown + ["a kernel without machine code"] * bool(program.strange),
    }


def exceeded(found: dict[str, int], stored: dict[str, int]) -> list[str]:
    """One line for each program that takes over 5 % more cycles than is stored, or has no figure.

    Args:
      found: cycles by the name of a program.
      stored: the same from before.
    """
    lines = []
    for name, cycles in found.items():
        if name not in stored:
            lines.append(f"{name}: no figure is stored; add it with --store")
        elif cycles > _TOLERANCE * stored[name]:
            lines.append(f"{name}: {cycles:,} cycles, and {stored[name]:,} are stored")
    return lines


_HEADER = (
    "| case | | chip | us | floor | of it | matrix units | copies waited for | HBM MB | spills "
    "| temporaries MB | against XLA |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def _line(case, chip, row):
    start = f"| {case} | {row['name']} | {chip} "
    if "refuses" in row:
        return f"{start}| {row['refuses']} |"
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
    line = (
        f"{start}| {row['us']:.1f} | {row['floor_us']:.1f} | {row['us'] / row['floor_us']:.2f} "
        f"| {row['matrix']:.0%} | {row['copy_wait']:.0%} | {row['hbm_bytes'] / 1e6:.1f} "
        f"| {row['spills']:,} | {row['temporaries'] / 1e6:.1f} | {ratio} |"
    )
    return line + "".join(f" not understood: {what}" for what in row["unknown"])


def _chips(text: str) -> list[str]:
    names, known = text.split(","), (*CHIPS, *inspection.GPUS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"there is no chip {unknown[0]!r}; there are {', '.join(known)}"
        )
    return names


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table in Markdown, and a line of JSON.

    Args:
      argv: the arguments of the command; None for those of the process.
    """
    parser = Parser(prog="python -m kernels.estimate", description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", help="operations; all that have estimates without")
    parser.add_argument("--chip", type=_chips, default=list(CHIPS), help="as v5e,v6e")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--check", action="store_true", help="exit code 1 above the stored cycles and 5 %%"
    )
    group.add_argument("--store", action="store_true", help="write the cycles of kernels")
    arguments = parser.parse_args(argv)
    for_gpus = set(arguments.chip) & set(inspection.GPUS)
    kernel = "gpu" if for_gpus else "tpu"
    suites = {op: s for op, s in testing.suites().items() if s.estimated_for(kernel)}
    for op in arguments.op:
        if op not in suites:
            parser.error(f"there are no estimates of {op!r}; there are some of {', '.join(suites)}")
    asked = {op: suites[op] for op in arguments.op or suites}
    if for_gpus and (len(arguments.chip) > 1 or arguments.check or arguments.store):
        parser.error("h100 has no cycles: ask for it alone, without --check and --store")
    why = cuda.missing() if for_gpus else missing()
    if why:
        parser.error(why)
    if jax.default_backend() != "cpu":
        parser.error("programs for absent chips are compiled on a CPU: set JAX_PLATFORMS=cpu")
    if for_gpus:
        inspection.report(asked)
        return
    version = importlib.metadata.version("libtpu")
    stored = json.loads(BUDGETS.read_text(encoding="utf-8"))
    if arguments.check and stored["libtpu"] != version:
        parser.error(f"figures of libtpu {stored['libtpu']} are stored, and this is {version}")
    print(f"Estimated from machine code, not timed; libtpu {version}, jax {jax.__version__}.\n")
    cycles, results = {}, []
    for op, suite in asked.items():
        print(f"{op}\n\n{_HEADER}")
        for case in suite.estimated:
            for chip in map(CHIPS.get, arguments.chip):
                for row in estimate(suite, case, chip):
                    print(_line(case, chip, row), flush=True)
                    results.append({"op": op, "case": str(case), "chip": chip.name, **row})
                    if row["kernel"] and "cycles" in row:
                        cycles[f"{op}, {case}, {row['name']}, {chip}"] = row["cycles"]
        print()
    print(json.dumps({"libtpu": version, "jax": jax.__version__, "results": results}))
    if arguments.store:
        kept = stored["cycles"] if stored["libtpu"] == version else {}
        text = json.dumps(
            {"libtpu": version, "cycles": dict(sorted({**kept, **cycles}.items()))}, indent=1
        )
        BUDGETS.write_text(text + "\n", encoding="utf-8")
    lines = exceeded(cycles, stored["cycles"]) if arguments.check else []
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    Workshop.open().close()
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
