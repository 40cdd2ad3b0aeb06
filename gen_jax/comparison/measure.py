"""What one strategy does and takes: examined once, then timed in turns with all others."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen_jax import operations, parallel, sampling
from gen_jax.comparison import gates, laws
from gen_jax.comparison.gates import GateError, Pieces
from gen_jax.comparison.judges import Judge, drawn_so_far
from gen_jax.comparison.network import evaluations_alone
from gen_jax.comparison.strategy import Strategy
from gen_jax.condition import Condition
from gen_jax.config import resolve
from gen_jax.loading import Loaded
from gen_jax.sampling import Sampler

__all__ = ["Contestant", "examine", "make", "time_once"]

_ALONE, _SHOWN, _FRAMES = 4, 16, 48  # samples drawn one by one; in the stepwise loop; pictures
_SCORED = 32  # samples to score are drawn at least so many at a time, however long that takes
_TIMES = 7  # runs of network and loop, in turns
_GAIN, _LONG = 1.15, 2.0  # a larger batch must have been so much faster; seconds it may take


@dataclasses.dataclass
class Contestant:
    """A strategy that is ready to draw.

    Attributes:
      strategy: its entry.
      loaded: the first of its runs.
      sampler, params: what it draws with.
      prepared: the parameters, prepared for the loop.
      programs: the compiled loops by batch size.
      compile_seconds: of each.
    """

    strategy: Strategy
    loaded: Loaded
    sampler: Sampler
    params: Any
    prepared: Any
    programs: dict[int, Callable] = dataclasses.field(default_factory=dict)
    compile_seconds: dict[int, float] = dataclasses.field(default_factory=dict)

    def program(self, batch: int) -> Callable:
        """The loop for so many samples, over all devices that divide them; compiled once."""
        if batch not in self.programs:
            mesh = parallel.local_mesh()
            mesh = mesh if mesh.size > 1 and batch % mesh.size == 0 else None
            began = time.perf_counter()
            self.programs[batch] = sampling.compile_generate(
                self.sampler, self.prepared, *self.inputs(0, 0, batch), mesh=mesh
            )
            self.compile_seconds[batch] = time.perf_counter() - began
        return self.programs[batch]

    def inputs(self, seed: int, start: int, batch: int) -> tuple[jax.Array, Condition]:
        """Keys and condition of some samples."""
        cond = self.loaded.condition(start + batch)
        cond = jax.tree.map(lambda leaf: np.asarray(leaf)[start:], cond)
        return sampling.sample_keys(seed, start, batch), cond

    def draw(self, seed: int, start: int, batch: int) -> np.ndarray:
        """Samples `start` and those after it."""
        program, inputs = self.program(batch), self.inputs(seed, start, batch)
        return jax.tree.map(np.asarray, program(self.prepared, *inputs))


def make(strategy: Strategy, loaded: Mapping[str, Loaded]) -> Contestant:
    """A strategy with its sampler and parameters; `loaded` has its runs by name."""
    first = loaded[strategy.runs[0]]
    sampler, params = first.sampler, first.params
    if strategy.make is not None:
        sampler, params = resolve(strategy.make)(loaded)
    if sampler is None:
        raise GateError(f"the run {strategy.runs[0]} has no sampler")
    cond = first.condition(1)
    cond.check(type(sampler).__name__, sampler.conditions, 1)
    sampler.check(params, cond)
    prepared = jax.jit(sampler.prepare)(params)
    return Contestant(strategy, first, sampler, params, prepared)


def examine(
    contestant: Contestant, judge: Judge, number: int, batches: tuple[int, ...], seed: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Everything about a strategy but its speed, behind the gates.

    Args:
      contestant: of `make`.
      judge: of the data.
      number: samples to score.
      batches: sizes to try, ascending, from 1; a size is left out where the last one has gained
        little, or it would take more than two seconds.
      seed: of the samples.

    Returns:
      Figures, and arrays: "frames" uint8 [F, height, width, 3] or "texts" [F] of one sample on its
      way, "evaluated" int [F], the evaluations spent at each of them, and "samples" as the pictures
      or texts of some.

    Raises:
      GateError: a gate is not passed.
    """
    sampler, loaded = contestant.sampler, contestant.loaded
    few = Pieces(sampler, contestant.prepared, *contestant.inputs(seed, 0, _SHOWN))
    shape = jax.eval_shape(sampler.finish, contestant.prepared, few.state)
    judge.check(loaded, np.zeros(shape.shape, shape.dtype))
    gates.check_evaluations(few)
    gates.check_cache(few)
    stepwise, shown, counted = _stepwise(contestant, judge, few)
    swept = _sweep(contestant, batches, seed)
    samples, batch = _scored(contestant, number, swept[-1], seed)
    judge.check(loaded, samples)
    _check_equal(contestant, samples, stepwise, batch, seed)
    law = judge.law(loaded, sampler, contestant.params)
    gates.check_law(law)
    one = Pieces(sampler, contestant.prepared, *contestant.inputs(seed, 0, 1))
    figures = {
        "nfe": sampler.nfe,
        "steps": sampler.steps,
        "batches": list(swept),
        "compile_seconds": contestant.compile_seconds[1],
        "operations_per_sample": one.operations,
        **counted,
        "peak_memory_bytes": operations.peak_memory(contestant.program(swept[-1])),
        "samples": number,
        "quality": judge.score(loaded, samples),
        "network_share": _network_share(contestant, seed),
        "perfect": _perfect_quality(contestant, judge, min(number, 256), seed),
        "law": law,
        "sha256": hashlib.sha256(np.ascontiguousarray(samples).tobytes()).hexdigest(),
    }
    return figures, shown | {"samples": judge.draw(loaded, samples[:_SHOWN])}


def _stepwise(contestant, judge, pieces):
    """The loop as a Python loop over one compiled step: samples, the way to them, and its cost."""
    sampler, prepared = contestant.sampler, contestant.prepared
    state = jax.jit(sampler.init)(prepared, pieces.keys, pieces.cond)
    step, cost = _compiled_steps(sampler, prepared, state)
    moments = np.unique(np.linspace(0, sampler.steps - 1, _FRAMES).round().astype(int))
    frames, masks = [], []
    for i in range(sampler.steps):
        state = step(state, i)
        drawn = drawn_so_far(sampler, state, i)
        masks.append(None if drawn is None else drawn[1].sum(axis=1))
        ended = sampling.stopped(sampler, state)
        last = i == sampler.steps - 1 or (ended is not None and bool(ended))
        if i in moments or last:
            at = sampler.steps - 1 if last else i
            frames.append((i, judge.frame(contestant.loaded, sampler, prepared, state, at)))
        if last:
            break
    gates.check_schedule(sampler, None if masks[0] is None else np.stack(masks))
    samples = jax.tree.map(np.asarray, jax.jit(sampler.finish)(prepared, state))
    spent = [round(sampler.nfe * (i + 1) / sampler.steps) for i, _ in frames]
    spent[-1] = frames[-1][0] + 1 if sampling.stopped(sampler, state) is not None else sampler.nfe
    name = "texts" if isinstance(frames[0][1], str) else "frames"
    arrays = {
        name: np.stack([frame for _, frame in frames]),
        "evaluated": np.array(spent, np.int64),
    }
    counted = {
        "compiled_operations_per_sample": cost["operations"] / len(pieces.keys),
        "bytes_per_sample": cost["bytes"] / len(pieces.keys),
    }
    return samples, arrays, counted


def _compiled_steps(sampler, prepared, state):
    """(state, i) -> the next state, and what all steps cost, as XLA counts it."""
    if sampling.written_out(sampler):
        programs = [
            jax.jit(functools.partial(sampler.step, i=i)).lower(prepared, state).compile()
            for i in range(sampler.steps)
        ]
        each = [operations.cost(program) for program in programs]
        cost = {name: sum(one[name] for one in each) for name in each[0]}
        return lambda state, i: programs[i](prepared, state), cost
    program = jax.jit(sampler.step).lower(prepared, state, jnp.int32(0)).compile()
    cost = {name: sampler.steps * value for name, value in operations.cost(program).items()}
    return lambda state, i: program(prepared, state, jnp.int32(i)), cost


def _sweep(contestant, batches, seed):
    """The batch sizes up to the one from which on a larger one gains little or takes too long."""
    swept, rate = [], 0.0
    for batch in batches:
        if rate and batch / rate > _LONG:
            break
        contestant.draw(seed, 0, batch)  # compiles, and warms up
        began = time.perf_counter()
        contestant.draw(seed, 0, batch)
        now = batch / (time.perf_counter() - began)
        swept.append(batch)
        if now < _GAIN * rate:
            break
        rate = max(rate, now)
    return tuple(swept)


def _scored(contestant, number, timed, seed):
    """The samples to score, and how many of them were drawn at a time."""
    batch = max(timed, min(_SCORED, number))
    parts = [contestant.draw(seed, start, batch) for start in range(0, number, batch)]
    return np.concatenate(parts)[:number], batch


def _check_equal(contestant, samples, stepwise, batch, seed):
    """The same samples again, one by one, and from the Python loop over steps."""
    again = contestant.draw(seed, 0, batch)
    number = min(len(again), len(samples))
    if not np.array_equal(again[:number], samples[:number]):
        raise GateError("the same keys give other samples the second time")
    alone = np.concatenate([contestant.draw(seed, i, 1) for i in range(_ALONE)])
    gates.check_same("drawn one by one", samples[:_ALONE], alone[: len(samples)])
    number = min(len(stepwise), len(samples))
    gates.check_same("drawn step by step", samples[:number], stepwise[:number])


def _network_share(contestant, seed):
    """The part of the time of one sample alone that its evaluations take; None where not known."""
    alone = evaluations_alone(contestant.sampler)
    if alone is None:
        return None
    inputs = contestant.inputs(seed, 0, 1)
    state = _begun_or_stopped(contestant, inputs)
    program = jax.jit(alone).lower(contestant.prepared, state).compile()
    jax.block_until_ready(program(contestant.prepared, state))
    whole, network = [], []
    for _ in range(_TIMES):
        whole.append(time_once(contestant, 1, seed))
        began = time.perf_counter()
        np.asarray(program(contestant.prepared, state))
        network.append(time.perf_counter() - began)
    return min(1.0, float(np.median(network) / np.median(whole)))


def _begun_or_stopped(contestant, inputs):
    """The state before the first step, or of a sampler that may stop earlier, that at its end."""
    sampler, prepared = contestant.sampler, contestant.prepared
    state = jax.jit(sampler.init)(prepared, *inputs)
    if sampling.stopped(sampler, state) is not None:
        (state,) = sampling.stream(sampler, contestant.params, *inputs, every=sampler.steps)
    return state


def _perfect_quality(contestant, judge, number, seed):
    """Figures of the same sampler with the best possible network; empty where that is unknown."""
    given = judge, contestant.loaded, contestant.sampler, contestant.params
    samples = laws.exact_draws(*given, number, seed)
    if samples is None:
        made = laws.perfect(*given)
        if made is None:
            return {}
        chunks = sampling.generate_many(*made, seed, number, micro_batch=64, progress=False)
        samples = np.concatenate([chunk.samples for chunk in chunks])
    return judge.score(contestant.loaded, samples) | {"samples": number}


def time_once(contestant: Contestant, batch: int, seed: int) -> float:
    """Seconds from keys to samples in host memory, of a program that is compiled."""
    program, inputs = contestant.program(batch), contestant.inputs(seed, 0, batch)
    jax.block_until_ready(inputs)
    began = time.perf_counter()
    jax.tree.map(np.asarray, program(contestant.prepared, *inputs))
    return time.perf_counter() - began
