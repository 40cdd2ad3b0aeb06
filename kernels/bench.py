"""Times the implementations of operations beside each other.

    python -m kernels.bench [OP ...] [--repeats N] [--out DIR]

For every case that its suite marks for timing, all implementations and the peers are compiled,
compared with the reference, and then run in turns: a round has one turn of each. A turn is as many
calls as last a few milliseconds. The table shows seconds of compiling, the median turn in
milliseconds a call, its quartiles, and how many times as fast as the reference it is. The last
line is JSON with all numbers and the machine. On an accelerator the cases that are estimated for
absent ones (`kernels.estimate`) are timed as well, and the calls of a turn are queued. With `--out`
the folder gets `bench.txt`, the tables, and `bench.json`.
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from kernels import testing
from kernels.commands import Parser

__all__ = ["bench", "main"]

_TURN_SECONDS = 3e-3


def bench(suite: testing.Suite, case: testing.Case, repeats: int) -> list[dict[str, Any]]:
    """Times one case.

    Args:
      suite: of the operation.
      case: any case; a larger one than the tests have.
      repeats: the number of rounds.

    Returns:
      One row for each implementation and peer: `name`, and either `refuses`, the reason, or
      `compile_s`, `ms` (the median), `low_ms` and `high_ms` (quartiles), and `speedup` over the
      reference.

    Raises:
      AssertionError: the result of one differs from that of the reference.
    """
    rows, turns = [], {}
    for name, entry in suite.implementations().items():
        reason = None
        if not entry.runs_here:
            reason = f"runs on {' and '.join(entry.only_on)} only"
        reason = reason or testing.check(suite, case, name)
        rows.append({"name": name, **({"refuses": reason} if reason else {})})
        if reason is None:
            turns[name] = functools.partial(suite.call, implementation=name)
    for name, peer in suite.peers.items():
        testing.check_peer(suite, case, name)
        rows.append({"name": name})
        turns[name] = peer
    timed = {row["name"]: row for row in rows}
    for name, run in turns.items():
        turns[name], timed[name]["compile_s"] = _compiled(run, case)
    seconds = _in_rounds(turns, repeats)
    reference = np.median(seconds["reference"]).item()
    for name, values in seconds.items():
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        timed[name].update(ms=1e3 * median, low_ms=1e3 * low, high_ms=1e3 * high)
        timed[name]["speedup"] = reference / median
    return rows


def _compiled(run, case):
    """A call with its arguments, and the seconds that compiling took."""
    jitted, arrays = testing.program(run, case)
    began = time.perf_counter()
    call = functools.partial(jitted.lower(*arrays).compile(), *arrays)
    return call, time.perf_counter() - began


def _in_rounds(turns: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of a call, one figure for each round."""
    calls, on_cpu = {}, jax.default_backend() == "cpu"
    for name, call in turns.items():
        jax.block_until_ready(call())
        began = time.perf_counter()
        jax.block_until_ready(call())
        calls[name] = max(1, round(_TURN_SECONDS / (time.perf_counter() - began)))
    seconds = {name: [] for name in turns}
    for _ in range(repeats):
        for name, call in turns.items():
            began = time.perf_counter()
            for _ in range(calls[name]):
                result = call()
                if on_cpu:
                    jax.block_until_ready(result)
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - began) / calls[name])
    return seconds


def _table(op, case_rows):
    width = max(len(str(case)) for case, _ in case_rows)
    name_width = max(len(row["name"]) for _, rows in case_rows for row in rows)
    figures = f"{'compile s':>10}{'ms':>10}{'quartiles':>20}{'speedup':>9}"
    lines = [op, f"{'case':<{width}}  {'':<{name_width}}{figures}"]
    for case, rows in case_rows:
        label = str(case)
        for row in rows:
            start, label = f"{label:<{width}}  {row['name']:<{name_width}}", ""
            if "refuses" in row:
                lines.append(f"{start}  {row['refuses']}")
                continue
            quartiles = f"{row['low_ms']:.3f}..{row['high_ms']:.3f}"
            figures = f"{row['compile_s']:>10.2f}{row['ms']:>10.3f}{quartiles:>20}"
            lines.append(f"{start}{figures}{row['speedup']:>9.2f}")
    return "\n".join(lines) + "\n"


def _machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "platform": device.platform,
        "device": device.device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each operation, and a line of JSON.

    Args:
      argv: the arguments of the command; None for those of the process.
    """
    parser = Parser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", help="operations; all when there is none")
    parser.add_argument("--repeats", type=_positive, default=15, help="rounds of each case")
    parser.add_argument("--out", type=pathlib.Path, help="a folder for the tables and the JSON")
    arguments = parser.parse_args(argv)
    suites = testing.suites()
    for op in arguments.op:
        if op not in suites:
            parser.error(f"there is no operation {op!r}; there are {', '.join(suites)}")
    if arguments.out is not None:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {arguments.out}: {error.strerror}")
    results, tables = {}, ""
    for op in arguments.op or suites:
        cases = suites[op].timed
        if jax.default_backend() != "cpu":
            cases += suites[op].estimated
        case_rows = [(case, bench(suites[op], case, arguments.repeats)) for case in cases]
        table = _table(op, case_rows)
        print(table, flush=True)
        tables += f"{table}\n"
        results[op] = [{"case": str(case), "rows": rows} for case, rows in case_rows]
    text = json.dumps({**_machine(), "repeats": arguments.repeats, "results": results})
    print(text)
    if arguments.out is not None:
        (arguments.out / "bench.txt").write_text(tables, encoding="utf-8")
        (arguments.out / "bench.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
