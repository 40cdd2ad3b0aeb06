"""The laws that every sampler obeys, for the tests of this project and of its users."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.sampling import Sampler

__all__ = ["check_sampler", "counting_evaluations"]

_SAMPLES, _SEED = 6, 1
_EVALUATIONS = ("__call__", "evaluate", "extend", "decode")  # methods of networks


def check_sampler(
    sampler: Sampler,
    params: Any,
    cond: Condition | None = None,
    *,
    tolerance: float = 0.0,
    uncounted: int = 0,
) -> np.ndarray:
    """Checks the common laws of samplers; the samples, for further checks.

    1. The sampler is hashable and equal to a copy of itself, so that it is static under `jit`.
    2. The jitted loop gives what a Python loop over its steps gives.
    3. A sample depends neither on the batch that it is drawn in nor on the devices.
    4. No key is used twice, and the same keys give the same samples.
    5. The network of the sampler's model is evaluated `nfe` times, at most so many times by a
       sampler that may stop early.
    6. Values that are given stay as they are.

    Args:
      sampler: the strategy.
      params: the parameters of its models.
      cond: a condition of 6 rows, or None.
      tolerance: largest difference between samples in batches of different shapes, for the rounding
        of sums; 0 where samples are tokens, of which no more than one in fifty may then differ.
      uncounted: evaluations among `nfe` of something else than the model's network.

    Raises:
      AssertionError: a law is broken; the message names it.
    """
    keys = sampling.sample_keys(_SEED, 0, _SAMPLES)
    whole = np.asarray(sampling.generate(sampler, params, keys, cond))
    _check_static(sampler)
    _check_python_loop(sampler, params, keys, cond, whole, tolerance)
    _check_batches(sampler, params, keys, cond, whole, tolerance)
    again = np.asarray(sampling.generate(sampler, params, keys, cond))
    np.testing.assert_array_equal(again, whole, "the same keys give other samples")
    _check_nfe(sampler, params, keys, cond, uncounted)
    if cond is not None and cond.given is not None:
        given = np.where(cond.is_given, cond.given, whole)
        np.testing.assert_array_equal(whole, given, "a value that was given has changed")
    return whole


def _check_static(sampler):
    copy = dataclasses.replace(sampler)
    assert hash(copy) == hash(sampler), "equal samplers have different hashes"
    assert copy == sampler, "a copy of the sampler is not equal to it"


def _close(got, expected, tolerance, law):
    """Equal up to rounding: floats within the tolerance, tokens but for a few near ties."""
    got, expected = np.asarray(got), np.asarray(expected)
    if tolerance or np.issubdtype(expected.dtype, np.floating):
        np.testing.assert_allclose(got, expected, atol=tolerance, rtol=0, err_msg=law)
    else:
        share = np.mean(got != expected)
        assert share <= 0.02, f"{law}: {share:.0%} of the tokens differ"


def _check_python_loop(sampler, params, keys, cond, whole, tolerance):
    """Law 2, each step compiled by itself; and the first half of law 4."""
    cond = Condition() if cond is None else cond
    with jax.debug_key_reuse(True):
        samples = _python_loop(sampler, params, keys, cond)
    _close(samples, whole, tolerance, "the jitted loop and the Python loop differ")


def _python_loop(sampler, params, keys, cond):
    prepared = jax.jit(sampler.prepare)(params)
    state = jax.jit(sampler.init)(prepared, keys, cond)
    step = jax.jit(sampler.step)
    for i in range(sampler.steps):
        state = step(prepared, state, jnp.int32(i))
        stopped = sampling.stopped(sampler, state)
        if stopped is not None and stopped:
            break
    return jax.jit(sampler.finish)(prepared, state)


def _check_batches(sampler, params, keys, cond, whole, tolerance):
    """Law 3: one row alone, and all rows over two devices where there are two."""
    first = None if cond is None else jax.tree.map(lambda leaf: np.asarray(leaf)[:1], cond)
    alone = sampling.generate(sampler, params, keys[:1], first)
    _close(alone, whole[:1], tolerance, "a sample depends on its batch")
    if len(jax.devices()) > 1:
        mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
        chunks = sampling.generate_many(
            sampler, params, _SEED, _SAMPLES, cond=cond, micro_batch=_SAMPLES, mesh=mesh
        )
        split = np.concatenate([chunk.samples for chunk in chunks])
        _close(split, whole, tolerance, "a sample depends on the devices")


def _check_nfe(sampler, params, keys, cond, uncounted):
    """Law 5."""
    calls = []
    counting = _counting_inside(sampler, lambda: calls.append(1))
    first = None if cond is None else jax.tree.map(lambda leaf: np.asarray(leaf)[:1], cond)
    jax.block_until_ready(sampling.generate(counting, params, keys[:1], first))
    jax.effects_barrier()
    number = len(calls) + uncounted
    law = f"{number} evaluations of the network, and nfe says {sampler.nfe}"
    if hasattr(sampler, "stopped"):
        assert 0 < number <= sampler.nfe, law
    else:
        assert number == sampler.nfe, law


def counting_evaluations(sampler: Sampler, count: Callable[[], None] = lambda: None) -> Sampler:
    """A copy of a sampler whose networks call `count`, by `jax.debug.callback`, when evaluated.

    The network of a draft does not: its evaluations are not among `nfe`.
    """
    return _counting_inside(sampler, count)


def _counting_inside(value, count):
    """A copy of a sampler or model whose networks call `count` at each evaluation."""
    changed = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if not dataclasses.is_dataclass(inner) or field.name == "draft":
            continue
        is_network = field.name == "network" or (
            field.name == "model" and not hasattr(inner, "network")
        )
        changed[field.name] = (_counting if is_network else _counting_inside)(inner, count)
    return dataclasses.replace(value, **changed)


def _counting(network, count):
    """A network of a subclass, which calls `count` whenever compiled code evaluates it."""
    kind = type(network)

    def counted(method):
        def call(self, *arguments, **options):
            jax.debug.callback(count)
            return method(self, *arguments, **options)

        return call

    defined = {name for base in kind.__mro__ for name in base.__dict__}
    methods = {name: counted(getattr(kind, name)) for name in _EVALUATIONS if name in defined}
    fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    return type(f"Counting{kind.__name__}", (kind,), methods)(**fields)
