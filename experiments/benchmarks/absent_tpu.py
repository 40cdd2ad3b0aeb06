"""Compares one step of sampling loops with and without our kernels, on TPUs that are not there.

    python -m experiments.benchmarks.absent_tpu

Needs the extra `tpu` (libtpu), and runs on a CPU: each program is compiled by the real compiler of
the chip, and the cycles of its machine code are counted. The figures are estimated from machine
code, not timed; see `python -m kernels.estimate`, which does the same for single operations. A
step is one trip of the loop at batch sizes of papers, in bfloat16, with random shapes of weights
only. The side without kernels is what XLA makes of the references, with all of the cache read. The
last line is one JSON object.
"""

import dataclasses
import sys
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.benchmarks import timing
from gen_jax.condition import Condition
from gen_jax.models.autoregressive import (
    AutoregressiveModel,
    AutoregressiveSampler,
    SamplingOptions,
)
from gen_jax.models.masked import MaskedModel, MaskGIT
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from kernels import dispatch
from kernels.machine.chips import CHIPS
from kernels.machine.compiling import Program, Workshop, missing

# What stands for XLA's own program: its choice by a branch cannot be counted.
_WITHOUT = ("tpu", "buckets")


def check_names(what: str, names: Collection[str], known: Collection[str]) -> None:
    """Refuses a name that is not known.

    Raises:
      ValueError: one is not.
    """
    unknown = set(names) - set(known)
    if unknown:
        raise ValueError(f"there is no {what} {min(unknown)}; there are {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile."""

    chips: tuple[str, ...] = tuple(CHIPS)
    """Names of chips."""
    steps: tuple[str, ...] = ()
    """Which of the steps; empty for all."""

    def __post_init__(self):
        check_names("chip", self.chips, CHIPS)
        check_names("step", self.steps, STEPS)


@dataclasses.dataclass(frozen=True)
class Step:
    """One trip of a loop as a function of shapes.

    Attributes:
      run: of the arguments.
      arguments: trees of shapes and types.
      donated: places of the arguments that the result takes the place of.
      scalar: what numbers that decide the work of a kernel count as; see `Workshop.compile`.
    """

    run: Callable
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    scalar: int | None = None


def _of_sampler(sampler, model, batch, condition, scalar=None):
    """A step of a sampler, from parameters and a state of which only the shapes are made."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.eval_shape(sampler.prepare, params)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    state = jax.eval_shape(lambda params, keys: sampler.init(params, keys, condition), params, keys)
    place = jax.ShapeDtypeStruct((), jnp.int32)
    return Step(sampler.step, (params, state, place), donated=(1,), scalar=scalar)


def gpt2(batch: int, weights: Literal["own", "int8"] = "own") -> Step:
    """A token of GPT-2 small, among the 50 most probable, at the last of 1,024 places."""
    model = AutoregressiveModel(TokenNetwork(TransformerConfig(vocabulary=50257, dtype="bfloat16")))
    sampler = AutoregressiveSampler(model, 1, 1024, SamplingOptions(top_k=50, weights=weights))
    prompt = Condition(prompt=jnp.zeros((batch, 1), jnp.int32))
    return _of_sampler(sampler, model, batch, prompt, scalar=1023)


# Of MaskGIT: 24 blocks of width 768, 256 places of 1,024 codes.
CODES = TransformerConfig(
    vocabulary=1024,
    context=256,
    layers=24,
    heads=16,
    width=768,
    extra_inputs=1,
    dtype="bfloat16",
)


def maskgit(batch: int) -> Step:
    """A round of MaskGIT."""
    model = MaskedModel(TokenNetwork(dataclasses.replace(CODES, causal=False)))
    return _of_sampler(MaskGIT(model, 256, 8), model, batch, Condition())


def code(batch: int) -> Step:
    """A code of an autoregressive prior of the same sizes, at the last of 256 places."""
    model = AutoregressiveModel(TokenNetwork(CODES))
    sampler = AutoregressiveSampler(model, 0, 256)
    return _of_sampler(sampler, model, batch, Condition(), scalar=255)


STEPS: dict[str, Callable[[], Step]] = {
    "gpt2_1": lambda: gpt2(1),
    "gpt2_64": lambda: gpt2(64),
    "gpt2_1_int8": lambda: gpt2(1, "int8"),
    "gpt2_64_int8": lambda: gpt2(64, "int8"),
    "maskgit_1": lambda: maskgit(1),
    "maskgit_64": lambda: maskgit(64),
    "code_1": lambda: code(1),
    "code_64": lambda: code(64),
}


def compiled(step: Step, chip: str, without: tuple[str, ...] = ()) -> Program:
    """The program of a step for a chip, in which implementations of these names have no part."""
    with dispatch.leave_out(*without):
        return Workshop.open().compile(
            step.run, *step.arguments, chip=CHIPS[chip], donate=step.donated, scalar=step.scalar
        )


def benchmark(config: Config) -> dict[str, Any]:
    """Prints a table, and returns all numbers.

    Raises:
      ValueError: libtpu is not installed.
    """
    if missing():
        raise ValueError(missing())
    rows = []
    print("| step | chip | XLA us | with kernels us | ratio | kernels | temporaries MB |")
    print("|---|---|---|---|---|---|---|")
    for name in config.steps or STEPS:
        step = STEPS[name]()
        for chip in config.chips:
            plain, ours = compiled(step, chip, _WITHOUT), compiled(step, chip)
            times = [CHIPS[chip].microseconds(program.cycles) for program in (plain, ours)]
            names = {kernel.split(".")[0] for kernel in ours.walks}
            made = sorted(names & dispatch.operations().keys())
            temporaries = [program.temporaries / 1e6 for program in (plain, ours)]
            rows.append(
                {
                    "step": name,
                    "chip": chip,
                    "xla_us": times[0],
                    "kernels_us": times[1],
                    "kernels": made,
                    "repeats": [plain.repeats, ours.repeats],
                    "temporaries": [plain.temporaries, ours.temporaries],
                }
            )
            print(
                f"| {name} | {chip} | {times[0]:.1f} | {times[1]:.1f} | {times[0] / times[1]:.2f} "
                f"| {', '.join(made)} | {temporaries[0]:.1f}, {temporaries[1]:.1f} |",
                flush=True,
            )
    Workshop.open().close()
    return {"machine": timing.machine(), "steps": rows}


if __name__ == "__main__":
    sys.exit(timing.main(Config, benchmark, __doc__))
