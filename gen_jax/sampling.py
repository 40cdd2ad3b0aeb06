"""The Sampler protocol, and the only sampling loop.

Sample i of a seed hangs on (seed, i) alone: every random number that it uses comes from a key of
its own (see `sample_keys`), so that the batch it is drawn in and the devices it is drawn on do
not change it.
"""

import dataclasses
import functools
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from gen_jax import keys as key_streams


class Sampler(Protocol):
    """One strategy of generation: a frozen, hashable dataclass of static choices.

    Attributes:
      nfe: sequential evaluations of the network for one sample.
      steps: trips of the sampling loop (equal to `nfe` when a step evaluates the network once).
    """

    nfe: int
    steps: int

    def prepare(self, params) -> Any:
        """What the other methods get as `params`: casts and layouts, done once before the loop."""

    def init(self, params, keys, cond) -> Any:
        """The state before the first step, for keys [B] and a condition tree [B, ...] or None."""

    def step(self, params, state, i) -> Any:
        """The state after step i (traced int32); pure."""

    def finish(self, params, state) -> Any:
        """The samples [B, ...]."""


class Stoppable(Protocol):
    """What a sampler has besides when it may need fewer than `steps` trips."""

    def stopped(self, state) -> jax.Array | None:
        """Bool []: whether further steps would change nothing; None where all steps are needed."""


@functools.partial(jax.jit, static_argnames=("sampler", "trajectory"))
def generate(sampler: Sampler, params, keys: jax.Array, cond=None, *, trajectory: bool = False):
    """Draws one sample per key, in one compiled loop with a fixed number of trips.

    Args:
      sampler: the strategy; static, so that an equal sampler does not compile again.
      params: what the sampler's networks need.
      keys: [B] PRNG keys, one per sample (see `sample_keys`).
      cond: tree of arrays [B, ...] that the sampler understands, or None.
      trajectory: also return the state after every step.

    Returns:
      The samples [B, ...], or (samples, states) with states a tree of arrays [steps, B, ...].
    """
    return _loop(sampler, sampler.prepare(params), keys, cond, trajectory)


def _loop(sampler, params, keys, cond, trajectory=False):
    state = sampler.init(params, keys, cond)
    if not trajectory:
        state = _advance(sampler, params, state, 0, sampler.steps)
        return sampler.finish(params, state)

    def record(state, i):
        state = sampler.step(params, state, i)
        return state, state

    state, states = jax.lax.scan(record, state, jax.numpy.arange(sampler.steps))
    return sampler.finish(params, state), states


def _advance(sampler, params, state, first, last):
    """The state after the steps from `first` to before `last`, in one loop."""
    if not hasattr(sampler, "stopped") or sampler.stopped(state) is None:
        body = lambda i, state: sampler.step(params, state, i)  # noqa: E731
        return jax.lax.fori_loop(first, last, body, state)

    def going_on(carry):
        i, state = carry
        return (i < last) & ~sampler.stopped(state)

    def body(carry):
        i, state = carry
        return i + 1, sampler.step(params, state, i)

    return jax.lax.while_loop(going_on, body, (jax.numpy.int32(first), state))[1]


def stream(sampler: Sampler, params, keys: jax.Array, cond=None, *, every: int = 1) -> Iterator:
    """Draws as `generate` does, and shows the state on the way.

    Args:
      sampler, params, keys, cond: as for `generate`.
      every: steps from one state to the next, at least 1.

    Yields:
      The state after `every` steps, 2 x `every`, ..., and the last. Its memory is used again for
      the next one: read it before going on. The first comes after compiling.

    Raises:
      ValueError: `every` is below 1.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    prepared, state = _begin(sampler, params, keys, cond)
    for first in range(0, sampler.steps, every):
        last = min(first + every, sampler.steps)
        state = _advance_in_place(sampler, prepared, state, first, last)
        yield state


@functools.partial(jax.jit, static_argnums=0)
def _begin(sampler, params, keys, cond):
    prepared = sampler.prepare(params)
    return prepared, sampler.init(prepared, keys, cond)


_advance_in_place = jax.jit(_advance, static_argnums=0, donate_argnums=2)


def sample_keys(seed: int, start: int, count: int) -> jax.Array:
    """Keys [count] of the samples start, start + 1, ... of a seed."""
    return key_streams.stream(seed, "sample", start, count)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of a larger request.

    Attributes:
      start: number of its first sample.
      samples: [n, ...].
      seconds: that drawing it took, from keys to samples in host memory.
      compile_seconds: that came before, for the first chunk of each size; else 0.
    """

    start: int
    samples: np.ndarray
    seconds: float
    compile_seconds: float


def generate_many(
    sampler: Sampler,
    params,
    seed: int,
    number: int,
    *,
    cond=None,
    start: int = 0,
    micro_batch: int = 64,
    mesh: Mesh | None = None,
    progress: bool | None = None,
) -> Iterator[Chunk]:
    """Draws samples start .. start + number - 1 of a seed, a micro-batch at a time.

    Every micro-batch has the same shape (short ones are padded), so that one program serves the
    whole request and any other of the same `micro_batch`, and gives a sample the same bits in
    each. When the device runs out of memory the micro-batch is halved, with a warning, and the
    request goes on where it was.

    Args:
      sampler: the strategy.
      params: what its networks need.
      seed: of the samples.
      number: how many, at least 1.
      cond: tree of arrays [number, ...], or None.
      start: number of the first sample.
      micro_batch: samples at a time over all devices; rounded up to a multiple of them.
      mesh: devices with one axis "data" to spread each micro-batch over; None for one device.
      progress: show a bar with rate and time left; None to show it on a terminal only.

    Yields:
      Chunks in order.

    Raises:
      ValueError: `number` or `micro_batch` is below 1.
      jax.errors.JaxRuntimeError: one sample per device does not fit in memory.
    """
    if number < 1 or micro_batch < 1:
        raise ValueError(f"number and micro_batch must be at least 1, got {number}, {micro_batch}")
    devices = mesh.size if mesh is not None else 1
    size, program, done = _round_up(micro_batch, devices), None, 0
    params = jax.jit(sampler.prepare)(params)
    hidden = not sys.stderr.isatty() if progress is None else not progress
    with tqdm(total=number, desc="sampling", unit="sample", disable=hidden) as bar:
        while done < number:
            count = min(size, number - done)
            arguments = params, *_rows(seed, start, done, count, size, cond)
            try:
                began = time.perf_counter()
                if fresh := program is None:
                    program = compile_generate(sampler, *arguments, mesh=mesh)
                compiled = time.perf_counter()
                samples = np.asarray(program(*arguments))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or size <= devices:
                    raise
                size, program = _round_up(size // 2, devices), None
                warnings.warn(
                    f"out of memory: drawing {size} samples at a time instead", stacklevel=2
                )
                continue
            seconds = time.perf_counter() - compiled
            yield Chunk(start + done, samples[:count], seconds, compiled - began if fresh else 0.0)
            done += count
            bar.update(count)


def compile_generate(
    sampler: Sampler, prepared, keys: jax.Array, cond=None, *, mesh: Mesh | None = None
) -> Callable:
    """`generate` compiled ahead for arguments of these shapes: (prepared, keys, cond) -> samples.

    It takes `sampler.prepare(params)`, so that calls share the preparation. With a mesh each
    device runs the whole loop on its own share of the samples, whose number it divides; nothing
    is exchanged between devices.
    """
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
