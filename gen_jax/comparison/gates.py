"""What must hold of a strategy before any of its times are reported.

Each gate raises a `GateError`, whose message is one line; a strategy that fails one is shown as
failed, and never timed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gen_jax import operations, sampling
from gen_jax.condition import Condition
from gen_jax.models.autoregressive import AutoregressiveSampler, UncachedSampler
from gen_jax.models.masked import AbsorbingDiffusion, masked_after
from gen_jax.models.masked.iterative import IterativeSampler
from gen_jax.models.parallel import ParallelSampler
from gen_jax.models.two_stage import TwoStageSampler
from gen_jax.sampling import Sampler
from gen_jax.testing import counting_evaluations

__all__ = [
    "GateError",
    "Pieces",
    "check_cache",
    "check_evaluations",
    "check_law",
    "check_same",
    "check_schedule",
    "evaluations",
]

_CALLBACK = "debug_callback"  # the primitive of a counted evaluation


class GateError(AssertionError):
    """A strategy is not what it says; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A sampling loop taken apart, for arguments of one batch size.

    Attributes:
      sampler: whose loop.
      prepared: of `sampler.prepare`.
      keys: [B].
      cond: of B rows.
      state: shapes of the state.
    """

    sampler: Sampler
    prepared: Any
    keys: jax.Array
    cond: Condition

    @functools.cached_property
    def state(self) -> Any:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self.sampler.init, self.prepared, self.keys, self.cond)

    def total(self, of: Callable[..., int]) -> int:
        """of(function, *arguments) of the beginning, of all steps, and of the end, summed."""
        sampler, state = self.sampler, self.state
        if sampling.written_out(sampler):
            steps = sum(
                of(functools.partial(sampler.step, i=i), self.prepared, state)
                for i in range(sampler.steps)
            )
        else:
            number = jax.ShapeDtypeStruct((), np.int32)
            steps = sampler.steps * of(sampler.step, self.prepared, state, number)
        return (
            of(sampler.init, self.prepared, self.keys, self.cond)
            + steps
            + of(sampler.finish, self.prepared, state)
        )

    @functools.cached_property
    def operations(self) -> int:
        """Of the whole loop and batch; see `operations.count`."""
        return self.total(operations.count)


def evaluations(pieces: Pieces) -> int:
    """Sequential evaluations of the network in the whole loop, counted in the traced program."""
    sampler = counting_evaluations(pieces.sampler)
    counted = dataclasses.replace(pieces, sampler=sampler)
    return counted.total(functools.partial(operations.occurrences, _CALLBACK))


def check_evaluations(pieces: Pieces) -> None:
    """NFE is the number of evaluations that the traced program has.

    Raises:
      GateError: it is not.
    """
    sampler = pieces.sampler
    latent = isinstance(sampler, ParallelSampler) and sampler.model.latent.kind != "none"
    number = evaluations(pieces) + latent  # drawing the latent counts as one
    if number != sampler.nfe:
        raise GateError(f"nfe says {sampler.nfe}, and the program has {number} evaluations")


def check_schedule(sampler: Sampler, masks: np.ndarray | None) -> None:
    """A sampler in rounds hides after each round what its schedule says.

    Args:
      sampler: of any kind; only those in rounds have a schedule.
      masks: int [rounds, B], hidden tokens after each round; None where there are none.

    Raises:
      GateError: it hides another number.
    """
    sampler = _inner(sampler)
    if masks is None or not isinstance(sampler, IterativeSampler):
        return
    if not hasattr(sampler, "schedule"):
        if masks.any():
            raise GateError("a round has left tokens hidden, and the sampler hides none")
        return
    wanted = masked_after(sampler.schedule, sampler.length, sampler.rounds)[sampler.length]
    if isinstance(sampler, AbsorbingDiffusion):  # binomial
        share = wanted / sampler.length
        error = np.sqrt(sampler.length * share * (1 - share) / masks.shape[1])
        wrong = abs(masks.mean(axis=1) - wanted) > 5 * error + 1
    else:
        wrong = (masks != np.asarray(wanted)[:, None]).any(axis=1)
    if wrong.any():
        at = int(wrong.argmax())
        raise GateError(
            f"after round {at + 1} the schedule says {int(wanted[at])} hidden tokens, and there "
            f"are {masks[at].mean():.1f}"
        )


def check_cache(pieces: Pieces) -> None:
    """A sampler with a cache does not read the sequence again for every token.

    Raises:
      GateError: its loop takes more than 1.5 times the operations of one pass over the sequence.
    """
    sampler = _inner(pieces.sampler)
    if not isinstance(sampler, AutoregressiveSampler) or isinstance(sampler, UncachedSampler):
        return
    prior = pieces.prepared
    if isinstance(pieces.sampler, TwoStageSampler):
        prior = prior["prior"]
    network, batch = sampler.model.network, len(pieces.keys)
    tokens = jax.ShapeDtypeStruct((batch, sampler.cache_length), np.int32)
    whole = operations.count(network.evaluate, prior, tokens)
    ours = dataclasses.replace(pieces, sampler=sampler, prepared=prior).operations
    if sampler.tokens > 1 and ours > 1.5 * whole:
        raise GateError(
            f"drawing takes {ours / whole:.1f} times the operations of one pass over the "
            "sequence: the cache is not used"
        )


def check_same(what: str, ours: np.ndarray, others: np.ndarray) -> None:
    """Samples of equal keys are equal, but for rounding and the choices that it tips.

    Raises:
      GateError: more than a quarter of the samples differ.
    """
    ours, others = (np.asarray(one).reshape(len(one), -1) for one in (ours, others))
    if ours.shape != others.shape or ours.dtype != others.dtype:
        raise GateError(f"{what}: {others.dtype}{list(others.shape)}, not {ours.dtype}")
    if np.issubdtype(ours.dtype, np.integer):
        equal = (ours == others).mean(axis=1) > 0.98
    else:
        equal = np.abs(ours - others).max(axis=1) < 0.05
    if equal.mean() < 0.75:
        raise GateError(f"{what}: {(~equal).sum()} of {len(equal)} samples differ")


def check_law(law: dict[str, float]) -> None:
    """A trained network loses no less than a perfect one.

    Args:
      law: "kl" and "kl_perfect", in nats; see `laws.measure`. Without them nothing is known.

    Raises:
      GateError: it loses less, so that one of the two is wrong.
    """
    if "kl_perfect" in law and law["kl"] < law["kl_perfect"] - 1e-3 * (1 + law["kl_perfect"]):
        raise GateError(
            f"it loses {law['kl']:.4f} nats, less than a perfect network does, "
            f"{law['kl_perfect']:.4f}"
        )


def _inner(sampler):
    """The sampler that draws tokens, inside of one that is made of several."""
    if isinstance(sampler, TwoStageSampler):
        return _inner(sampler.prior)
    return _inner(sampler.inner) if isinstance(sampler, ParallelSampler) else sampler
