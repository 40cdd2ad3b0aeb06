"""The Sampler protocol, and the only sampling loop.

Sample i of a seed depends on (seed, i) alone: every random number that it uses comes from a key of
its own (see `sample_keys`), so that neither the batch in which it is drawn nor the devices on which
it is drawn change it.
"""

import collections
import dataclasses
import functools
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Key
from tqdm import tqdm

from gen_jax import keys as key_streams
from gen_jax import memory
from gen_jax.condition import Condition

__all__ = [
    "Chunk",
    "Sampler",
    "Stoppable",
    "WrittenOut",
    "compile_generate",
    "generate",
    "generate_many",
    "sample_keys",
    "size_for",
    "stopped",
    "stream",
    "written_out",
]

_KEPT_PROGRAMS = 32  # compiled by `generate_many`; those used least recently are dropped


@runtime_checkable
class Sampler(Protocol):
    """One strategy of generation: a frozen, hashable dataclass of static choices.

    Attributes:
      nfe: sequential evaluations of the network for one sample.
      steps: trips of the sampling loop (equal to `nfe` when a step evaluates the network once).
      conditions: names of the fields of `Condition` that the sampler reads; others are refused.
    """

    nfe: int
    steps: int
    conditions: tuple[str, ...]

    def check(self, params, cond: Condition) -> None:
        """Refuses parameters and values of the condition that do not fit, before the loop.

        It is called outside of compiled code where the arguments are there; inside of another
        program it sees shapes alone.
        """

    def prepare(self, params) -> Any:
        """What the other methods get as `params`: casts and layouts, done once before the loop."""

    def init(self, params, keys, cond: Condition) -> Any:
        """The state before the first step, for keys [B] and a condition of B rows."""

    def step(self, params, state, i) -> Any:
        """The state after step i (traced int32); pure."""

    def finish(self, params, state) -> Any:
        """The samples [B, ...]."""


@runtime_checkable
class Stoppable(Protocol):
    """What a sampler has besides when it may need fewer than `steps` trips."""

    def stopped(self, state) -> jax.Array | None:
        """Bool []: whether further steps would change nothing; None where all steps are needed."""


@runtime_checkable
class WrittenOut(Protocol):
    """What a sampler has besides when its steps may differ in shape.

    Attributes:
      written_out: whether they do. A loop of known ends is then written out, step by step, and
        `step` gets the number of each as a Python int; the one of `stream` has branches instead.
    """

    written_out: bool


def generate(
    sampler: Sampler,
    params,
    keys: Key[jax.Array, " B"],
    cond: Condition | None = None,
    *,
    trajectory: Callable[[Any], Any] | None = None,
):
    """Draws one sample per key, in one compiled loop.

    Args:
      sampler: the strategy; static, so that an equal sampler does not compile again.
      params: the parameters of the sampler's models.
      keys: one PRNG key per sample (see `sample_keys`).
      cond: what the samples are conditioned on, or None.
      trajectory: a function of the sampler's state, whose values after every step are returned too;
        static, so that a function defined anew compiles anew. It costs nothing where it is None.

    Returns:
      The samples [B, ...], or (samples, values) with values a tree of arrays [steps, B, ...].

    Raises:
      ValueError: there are no keys, or parameters or condition are not the sampler's.
      MemoryError: the loop does not fit in the memory of the CPU; see `memory.check`.
    """
    arguments = sampler, params, keys, _checked(sampler, params, keys, cond), trajectory
    memory.check_call(f"drawing {len(keys)} samples", _generate, *arguments)
    return _generate(*arguments)


def _checked(sampler, params, keys, cond):
    """The condition, after the checks of what can be known before the loop."""
    if not jax.dtypes.issubdtype(getattr(keys, "dtype", np.int32), jax.dtypes.prng_key):
        raise ValueError("keys must be PRNG keys [B], of jax.random.key or sampling.sample_keys")
    if keys.ndim != 1 or not len(keys):
        raise ValueError(
            f"keys must be [B], one for each sample and at least one, got the shape {keys.shape}; "
            "see sampling.sample_keys"
        )
    if cond is None:
        cond = Condition()
    elif not isinstance(cond, Condition):
        raise ValueError(f"the condition must be a gen_jax.Condition, not {type(cond).__name__}")
    cond.check(type(sampler).__name__, sampler.conditions, len(keys))
    sampler.check(params, cond)
    return cond


@functools.partial(jax.jit, static_argnames=("sampler", "trajectory"))
def _generate(sampler, params, keys, cond, trajectory):
    return _loop(sampler, sampler.prepare(params), keys, cond, trajectory)


def _loop(sampler, params, keys, cond, trajectory=None):
    state = sampler.init(params, keys, cond)
    if trajectory is None:
        state = _advance(sampler, params, state, 0, sampler.steps)
        return sampler.finish(params, state)

    def record(state, i):
        state = sampler.step(params, state, i)
        return state, trajectory(state)

    if written_out(sampler):
        values = []
        for i in range(sampler.steps):
            state, value = record(state, i)
            values.append(value)
        values = jax.tree.map(lambda *of_steps: jax.numpy.stack(of_steps), *values)
        return sampler.finish(params, state), values
    state, values = jax.lax.scan(record, state, jax.numpy.arange(sampler.steps))
    return sampler.finish(params, state), values


def _advance(sampler, params, state, first, last):
    """The state after the steps from `first` to before `last`, in one loop."""
    if written_out(sampler) and isinstance(first, int):
        for i in range(first, last):
            state = sampler.step(params, state, i)
        return state
    if stopped(sampler, state) is None:
        body = lambda i, state: sampler.step(params, state, i)  # noqa: E731
        return jax.lax.fori_loop(first, last, body, state)

    def going_on(carry):
        i, state = carry
        return (i < last) & ~sampler.stopped(state)

    def body(carry):
        i, state = carry
        return i + 1, sampler.step(params, state, i)

    return jax.lax.while_loop(going_on, body, (jax.numpy.int32(first), state))[1]


def stream(
    sampler: Sampler,
    params,
    keys: Key[jax.Array, " B"],
    cond: Condition | None = None,
    *,
    every: int = 1,
) -> Iterator[Any]:
    """Draws as `generate` does, and shows the state on the way.

    Args:
      sampler, params, keys, cond: as for `generate`.
      every: steps from one state to the next, at least 1.

    Yields:
      The state after `every` steps, 2 x `every`, ..., and the last. It ends earlier when all
      samples have stopped. The memory of a state is used again for the next one: read it before
      going on. The first comes after compiling.

    Raises:
      ValueError: `every` is below 1, or as `generate` does.
      MemoryError: as `generate` does.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    arguments = sampler, params, keys, _checked(sampler, params, keys, cond)
    what = f"drawing {len(keys)} samples"
    memory.check_call(what, _begin, *arguments)
    prepared, state = _begin(*arguments)
    for first in range(0, sampler.steps, every):
        arguments = sampler, prepared, state, first, min(first + every, sampler.steps)
        if first == 0:
            memory.check_call(what, _advance_in_place, *arguments)
        state, all_stopped = _advance_in_place(*arguments)
        yield state
        if all_stopped is not None and all_stopped:
            return


@functools.partial(jax.jit, static_argnums=0)
def _begin(sampler, params, keys, cond):
    prepared = sampler.prepare(params)
    return prepared, sampler.init(prepared, keys, cond)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance_in_place(sampler, params, state, first, last):
    state = _advance(sampler, params, state, first, last)
    return state, stopped(sampler, state)


def stopped(sampler: Sampler, state: Any) -> Bool[jax.Array, ""] | None:
    """Whether all samples of a state have stopped; None where they never do before the end."""
    return sampler.stopped(state) if hasattr(sampler, "stopped") else None


def written_out(sampler: Sampler) -> bool:
    """Whether the steps of a sampler differ in shape; see `WrittenOut`."""
    return getattr(sampler, "written_out", False)


def sample_keys(seed: int, start: int, count: int) -> Key[jax.Array, " count"]:
    """Keys of the samples start, start + 1, ... of a seed.

    Raises:
      ValueError: `start` is negative, or `count` is below 1.
    """
    if start < 0 or count < 1:
        raise ValueError(f"start must not be negative and count at least 1, got {start}, {count}")
    return key_streams.stream(seed, "sample", start, count)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of a larger request.

    Attributes:
      start: number of its first sample.
      samples: array [n, ...], or a tree of them.
      seconds: that drawing it took, from keys to samples in host memory.
      compile_seconds: that came before, for the first chunk of each size; else 0.
    """

    start: int
    samples: Any
    seconds: float
    compile_seconds: float


def generate_many(
    sampler: Sampler,
    params,
    seed: int,
    number: int,
    *,
    cond: Condition | None = None,
    start: int = 0,
    whole: int | None = None,
    micro_batch: int = 64,
    mesh: Mesh | None = None,
    kept: Callable[[int, int], Chunk | None] | None = None,
    progress: bool | None = None,
) -> Iterator[Chunk]:
    """Draws samples start .. start + number - 1 of a seed, a micro-batch at a time.

    All micro-batches of a request have one shape: the smallest of `micro_batch`, its half, its
    quarter and so on that holds the request. The last one is padded. Programs are kept, so that an
    equal request does not compile again. A sample has the same bits in all requests of one shape;
    between shapes it agrees in its noise, and to rounding in what a network computes. When the
    device runs out of memory the micro-batch is halved, with a warning, and the request goes on
    where it was.

    Args:
      sampler: the strategy.
      params: the parameters of its models.
      seed: of the samples.
      number: how many, at least 1.
      cond: of `number` rows, or None.
      start: number of the first sample.
      whole: samples of the request that these are a part of, whose shape they take; None where they
        are the whole.
      micro_batch: most samples at a time over all devices; rounded up to a multiple of them.
      mesh: devices with one axis "data" to spread each micro-batch over; None for one device.
      kept: kept(first, count) is a chunk that was drawn before, or None where it must be drawn.
      progress: show a bar with rate and time left; None to show it on a terminal only.

    Yields:
      Chunks in order.

    Raises:
      ValueError: `number` or `micro_batch` is below 1, or as `generate` does.
      jax.errors.JaxRuntimeError: one sample per device does not fit in memory.
      MemoryError: the same on CPUs, before it is tried.
    """
    if number < 1 or micro_batch < 1:
        raise ValueError(f"number and micro_batch must be at least 1, got {number}, {micro_batch}")
    cond = _checked(sampler, params, sample_keys(seed, start, number), cond)
    devices = mesh.size if mesh is not None else 1
    size = size_for(number if whole is None else whole, micro_batch, devices)
    return _generate_many(sampler, params, seed, number, cond, start, size, mesh, kept, progress)


def _generate_many(sampler, params, seed, number, cond, start, size, mesh, kept, progress):
    devices, done = mesh.size if mesh is not None else 1, 0
    params = _prepare(sampler, params)
    hidden = not sys.stderr.isatty() if progress is None else not progress
    with tqdm(total=number, desc="sampling", unit="sample", disable=hidden) as bar:
        while done < number:
            count = min(size, number - done)
            if kept is not None and (chunk := kept(start + done, count)) is not None:
                yield chunk
                done += count
                bar.update(count)
                continue
            arguments = params, *_rows(seed, start, done, count, size, cond)
            try:
                began = time.perf_counter()
                program, fresh = _program(sampler, arguments, mesh)
                compiled = time.perf_counter()
                samples = jax.tree.map(np.asarray, program(*arguments))
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                exhausted = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
                if not exhausted or size <= devices:
                    raise
                size = _round_up(size // 2, devices)
                warnings.warn(
                    f"out of memory: drawing {size} samples at a time instead", stacklevel=2
                )
                continue
            seconds = time.perf_counter() - compiled
            samples = jax.tree.map(lambda leaf, count=count: leaf[:count], samples)
            yield Chunk(start + done, samples, seconds, compiled - began if fresh else 0.0)
            done += count
            bar.update(count)


@functools.partial(jax.jit, static_argnums=0)
def _prepare(sampler, params):
    return sampler.prepare(params)


_programs: collections.OrderedDict = collections.OrderedDict()


def _program(sampler, arguments, mesh):
    """The compiled loop for arguments of these shapes, and whether it was compiled just now."""
    leaves, structure = jax.tree.flatten(arguments)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    key = sampler, structure, shapes, mesh
    fresh = key not in _programs
    if fresh:
        _programs[key] = compile_generate(sampler, *arguments, mesh=mesh)
        while len(_programs) > _KEPT_PROGRAMS:
            _programs.popitem(last=False)
    _programs.move_to_end(key)
    return _programs[key], fresh


def size_for(number: int, micro_batch: int, devices: int) -> int:
    """The samples of each micro-batch of a request of `generate_many`, padding counted.

    It is the smallest of `micro_batch`, its half, ... that holds `number`, a multiple of `devices`.
    """
    size = micro_batch
    while size > 1 and -(-size // 2) >= number:
        size = -(-size // 2)
    return _round_up(size, devices)


def compile_generate(
    sampler: Sampler,
    prepared,
    keys: Key[jax.Array, " B"],
    cond: Condition | None = None,
    *,
    mesh: Mesh | None = None,
) -> Callable:
    """`generate` compiled ahead for arguments of these shapes: (prepared, keys, cond) -> samples.

    It takes `sampler.prepare(params)`, so that calls share the preparation. With a mesh each
    device runs the whole loop on its own share of the samples, whose number it divides; nothing
    is exchanged between devices.

    Raises:
      MemoryError: it does not fit in the memory of the CPU; see `memory.check`.
    """
    program = _compiled(sampler, prepared, keys, Condition() if cond is None else cond, mesh)
    memory.check(f"a micro-batch of {keys.shape[0]}", program)
    return program


def _compiled(sampler, prepared, keys, cond, mesh):
    loop = functools.partial(_loop, sampler)
    if mesh is None:
        return jax.jit(loop).lower(prepared, keys, cond).compile()
    mapped = jax.shard_map(
        loop,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P("data"),
        check_vma=False,
    )
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    return (
        jax.jit(mapped, in_shardings=(whole, split, split), out_shardings=split)
        .lower(prepared, keys, cond)
        .compile()
    )


def _rows(seed, start, done, count, size, cond):
    """Keys [size] and condition of the next `count` samples; the last one pads the rest."""
    rows = np.minimum(np.arange(size), count - 1) + done
    keys = sample_keys(seed, start + done, size)
    return keys, jax.tree.map(lambda leaf: np.asarray(leaf)[rows], cond)


def _round_up(number: int, multiple: int) -> int:
    return max(-(-number // multiple) * multiple, multiple)
