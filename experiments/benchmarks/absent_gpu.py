"""Compares one step of sampling loops with and without our kernels, on an H100 that is not there.

    python -m experiments.benchmarks.absent_gpu

Needs the extra `cuda`, and runs on a CPU: XLA compiles for the GPU, and the kernels are assembled
for it. No time follows from that. The table has what a step needs besides arguments and results,
the kernels that it launches (fusions and calls of libraries), and the branches for which the host
or the GPU must wait. The steps are those of `experiments.benchmarks.absent_tpu` without int8; the
side without kernels is the default. The last line is one JSON object.
"""

import dataclasses
import sys
from typing import Any

from experiments.benchmarks import absent_tpu, timing
from experiments.benchmarks.absent_tpu import Step, check_names
from kernels import dispatch
from kernels.machine.cuda import Program, Workshop, missing

# In those with int8 several kernels have one name, which the reports of the assembler do not tell
# apart.
STEPS = {name: step for name, step in absent_tpu.STEPS.items() if not name.endswith("_int8")}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile."""

    steps: tuple[str, ...] = ()
    """Which of the steps; empty for all."""

    def __post_init__(self):
        check_names("step", self.steps, STEPS)


def compiled(step: Step, *preferred: str) -> Program:
    """The program of a step, in which implementations of these names are the defaults."""
    with dispatch.prefer(*preferred):
        return Workshop.open().compile(step.run, *step.arguments, donate=step.donated)


def benchmark(config: Config) -> dict[str, Any]:
    """Prints a table, and returns all numbers.

    Raises:
      ValueError: the extra `cuda` is not installed.
    """
    if missing():
        raise ValueError(missing())
    rows = []
    print("| step | kernels of Pallas | temporaries MB | launches | branches |")
    print("|---|---|---|---|---|")
    for name in config.steps or STEPS:
        step = STEPS[name]()
        plain, ours = compiled(step), compiled(step, "gpu")
        made = sorted({kernel.name for kernel in ours.kernels})
        figures = {
            "temporaries": [plain.temporaries, ours.temporaries],
            "launches": [plain.launches, ours.launches],
            "branches": [plain.branches, ours.branches],
        }
        rows.append({"step": name, "kernels": made, **figures})
        megabytes = ", ".join(f"{number / 1e6:.1f}" for number in figures["temporaries"])
        print(
            f"| {name} | {', '.join(made)} | {megabytes} "
            f"| {plain.launches}, {ours.launches} | {plain.branches}, {ours.branches} |",
            flush=True,
        )
    Workshop.open().close()
    return {"machine": timing.machine(), "steps": rows}


if __name__ == "__main__":
    sys.exit(timing.main(Config, benchmark, __doc__))
