"""Samplers in rounds; they differ in what a round reveals, and in what it masks again.

B batch, L length, T rounds, V vocabulary. Each takes a `Denoiser`, L and T, and is a
`sampling.Sampler` whose state is a `MaskedState`.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

import kernels
from gen_jax.config import frozen
from gen_jax.models.masked.config import HaltonOptions
from gen_jax.models.masked.denoisers import Denoiser
from gen_jax.models.masked.iterative import IterativeSampler, MaskedState
from gen_jax.models.masked.losses import MaskedModel
from gen_jax.models.masked.orders import halton_order
from gen_jax.models.masked.schedules import (
    Cosine,
    Curve,
    Fixed,
    Power,
    Schedule,
    masked_after,
)
from gen_jax.models.options import check_not_negative, check_temperature
from gen_jax.models.sequences import uniform_by_position

__all__ = ["AbsorbingDiffusion", "MaskGIT", "MaskPredict", "OrderedGroups", "Repair"]

_ROUNDING = 1e-5  # log-probabilities that differ by less are equal


@frozen
class _Scheduled(IterativeSampler):
    """A sampler whose rounds follow a schedule of how many positions are still masked."""

    schedule: Schedule = Power(1.0)

    def __post_init__(self):
        super().__post_init__()
        self.schedule.check(self.length, self.rounds)

    def _masked_after(self, state, i):
        """Editable positions [B] that are still masked after round i."""
        table = masked_after(self.schedule, self.length, self.rounds)
        return jnp.asarray(table)[state.editable.sum(-1), i]


@frozen
class MaskPredict(_Scheduled):
    """The likeliest tokens, the least sure masked again (Ghazvininejad et al. 2019, section 3.2).

    Round t predicts what is masked and then masks the n(t) tokens of the lowest probability, those
    of earlier rounds included, whose probability is the one that they were chosen with: tokens are
    revised. It is deterministic; the keys are not used.

    Attributes:
      schedule: n(t); linear in the paper.
    """

    schedule: Schedule = Power(1.0)

    def step(self, params: Any, state: MaskedState, i: Int[Array, ""] | int) -> MaskedState:
        """Predicts, and masks again."""
        tokens, log_prob, _ = self._fill(params, state, i, 0.0)
        state = self._reveal(state, tokens, log_prob, True)
        sure = jnp.where(state.editable, state.log_prob, jnp.inf)
        keep = _most_confident(sure, self.length - self._masked_after(state, i))
        return state.replace(tokens=jnp.where(keep, state.tokens, self.model.mask))


@frozen
class MaskGIT(_Scheduled):
    """Chang et al. 2022, section 3.2: drawn tokens, of which the most confident stay for good.

    Confidence is the log-probability of the drawn token plus Gumbel noise, which falls linearly to
    zero. The law of the samples is not the model's, whatever the number of rounds.

    Attributes:
      schedule: the share of positions that is still masked.
      temperature: divides the logits, 0 or at least 1e-6; 0 takes the likeliest tokens.
      choice_temperature: scale of the noise before the first round, at least 0.
    """

    schedule: Schedule = Cosine()
    temperature: float = 1.0
    choice_temperature: float = 4.5

    def __post_init__(self):
        super().__post_init__()
        check_temperature("temperature", self.temperature)
        check_not_negative("choice_temperature", self.choice_temperature)

    def step(self, params: Any, state: MaskedState, i: Int[Array, ""] | int) -> MaskedState:
        """Fills all masked positions, and keeps the most confident."""
        noise = 0.0
        if self.choice_temperature:
            noise = jnp.float32(self.choice_temperature) * (1 - (i + 1) / self.rounds)
        tokens, log_prob, confidence = self._fill(params, state, i, self.temperature, noise)
        count = self.length - self._masked_after(state, i)
        keep = _most_confident(confidence, count)
        return self._reveal(state, tokens, log_prob, keep)


@frozen
class OrderedGroups(_Scheduled):
    """A group of positions at a time, in an order that does not depend on what was drawn.

    Each group is drawn from its conditionals in parallel. In a random order with an exact denoiser
    the gap to the model's own law is known (see `schedules.Optimal`), and with as many rounds as
    positions it is zero (Uria et al. 2014, 1310.1757; Hoogeboom et al. 2021, 2110.02037). Groups of
    one from the left are autoregression; dyadic midpoints are small-to-large. In Halton's order
    (`halton`) positions of a group tell little about each other.

    Attributes:
      schedule: sizes of the groups.
      temperature: divides the logits, 0 or at least 1e-6; 0 takes the likeliest tokens.
      order: all positions, first to last; None for a random order, another for each sample.
    """

    schedule: Schedule = Cosine()
    temperature: float = 1.0
    order: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        check_temperature("temperature", self.temperature)
        if self.order is not None and sorted(self.order) != list(range(self.length)):
            raise ValueError(f"an order names each of {self.length} positions once: {self.order}")

    @classmethod
    def of_groups(
        cls, model: Denoiser, groups: tuple[tuple[int, ...], ...], temperature: float = 1.0
    ) -> "OrderedGroups":
        """The sampler of groups of positions that are written out.

        Args:
          model: fills masked positions.
          groups: all positions once; those of a group are drawn together.
          temperature: of the tokens.

        Raises:
          ValueError: a position is missing or named twice, or a group is empty.
        """
        order = tuple(position for group in groups for position in group)
        sizes = Fixed(tuple(len(group) for group in groups))
        return cls(model, len(order), len(groups), sizes, temperature, order)

    @classmethod
    def halton(cls, options: HaltonOptions, model: MaskedModel, length: int) -> "OrderedGroups":
        """The sampler of Halton's order on the grid of the model, or along a line.

        Args:
          options: rounds, of which there are at most `length`, schedule and temperature.
          model: fills masked positions.
          length: L.

        Raises:
          ValueError: the grid of the model has another number of positions.
        """
        grid = model.grid or (length,)
        if math.prod(grid) != length:
            raise ValueError(f"a grid of {grid} has not the {length} positions of the sampler")
        sampler = cls.from_options(options, model, length)
        return dataclasses.replace(sampler, order=halton_order(grid))

    def start(
        self,
        params: Any,
        keys: Key[Array, " B"],
        given: Int[Array | np.ndarray, "B L"] | None,
        is_given: Bool[Array | np.ndarray, "B L"] | None,
        length: Int[Array | np.ndarray, " B"] | None,
        context: dict,
    ) -> MaskedState:
        """Draws the order, where it is random."""
        state = super().start(params, keys, given, is_given, length, context)
        if self.order is not None:
            return state
        return state.replace(order=uniform_by_position(state.keys[-1, 1], self.length))

    def step(self, params: Any, state: MaskedState, i: Int[Array, ""] | int) -> MaskedState:
        """Draws the next group."""
        tokens, log_prob, _ = self._fill(params, state, i, self.temperature)
        if self.order is not None:  # the positions of a group are its own, whatever is given
            ends = np.cumsum(self.schedule.sizes(self.length, self.rounds))
            rank = np.argsort(self.order)[None]
            return self._reveal(state, tokens, log_prob, rank < jnp.array(ends)[i])
        order = jnp.where(state.editable, state.order, jnp.inf)
        keep = kernels.keep_most_confident(order, self.length - self._masked_after(state, i))
        return self._reveal(state, tokens, log_prob, keep)


@frozen
class AbsorbingDiffusion(_Scheduled):
    """Ancestral sampling of absorbing diffusion (Austin et al. 2021, 2107.03006).

    Each masked position is revealed on its own, so that the number of masks after a round is
    binomial with the share that the schedule says. With `remask` above 0 revealed tokens are masked
    again at the largest rate that keeps those shares, times `remask` (ReMDM: Wang et al. 2025,
    2503.00307, section 4): tokens are revised, and the marginals of the process stay.

    Attributes:
      schedule: a curve, the share of positions that is still masked.
      temperature: divides the logits, 0 or at least 1e-6; 0 takes the likeliest tokens.
      remask: share of the largest rate, in [0, 1].
    """

    schedule: Curve = Power(1.0)
    temperature: float = 1.0
    remask: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_temperature("temperature", self.temperature)
        if not 0 <= self.remask <= 1:
            raise ValueError(f"remask must be in [0, 1], got {self.remask}")

    def step(self, params: Any, state: MaskedState, i: Int[Array, ""] | int) -> MaskedState:
        """Reveals some of the masked positions, and masks some of the others."""
        tokens, log_prob, _ = self._fill(params, state, i, self.temperature)
        reveal, again = jnp.asarray(self._rates(), jnp.float32)[:, i]
        coins = self._uniform(state, i)
        masked = self._masked(state)
        state = self._reveal(state, tokens, log_prob, coins < reveal)
        if not self.remask:
            return state
        lost = state.editable & ~masked & (coins < again)
        return state.replace(tokens=jnp.where(lost, self.model.mask, state.tokens))

    def _rates(self):
        """Probabilities [2, T] that a mask is revealed, and that a revealed token is masked."""
        ratios = [i / self.rounds for i in range(1, self.rounds)]
        share = [1.0, *(self.schedule.gamma(ratio, self.length) for ratio in ratios), 0.0]
        before, after = np.array(share[:-1]), np.array(share[1:])
        known = 1 - before
        most = np.divide(after, known, out=np.zeros_like(after), where=known > 0)
        again = self.remask * np.minimum(most, 1)
        kept = (1 - again) * known  # of the tokens known before the round
        reveal = np.divide(1 - after - kept, before, out=np.zeros_like(after), where=before > 0)
        return np.stack([np.where(before > 0, reveal, 0), again])


@frozen
class Repair(IterativeSampler):
    """Erase and repair: a one-shot draft, then rounds that erase tokens and draw them anew.

    Random positions, one at a time, are Gibbs sampling: with an exact denoiser the law converges
    to the model's. Several at once, or the least likely one, are other chains, with other limits.

    Attributes:
      rounds: T after the draft, from 0 up.
      erase: "random" positions, or the one whose token is the least likely given all others. The
        latter is found by one evaluation of L sequences for each sample, which also has the
        conditional to draw from.
      count: how many random positions are erased in a round, 1 to L.
      temperature: divides the logits, 0 or at least 1e-6; 0 takes the likeliest tokens.
    """

    erase: Literal["random", "least_likely"] = "random"
    count: int = 1
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_not_negative("the number of rounds", self.rounds)
        check_temperature("temperature", self.temperature)
        if not 1 <= self.count <= self.length:
            raise ValueError(
                f"count must be in 1 .. {self.length}, the positions, got {self.count}"
            )
        if self.erase == "least_likely" and self.count > 1:
            raise ValueError("the least likely token is erased alone: set count to 1")

    @property
    def nfe(self) -> int:
        """One evaluation for the draft, and one per round."""
        return 1 + self.rounds

    def start(
        self,
        params: Any,
        keys: Key[Array, " B"],
        given: Int[Array | np.ndarray, "B L"] | None,
        is_given: Bool[Array | np.ndarray, "B L"] | None,
        length: Int[Array | np.ndarray, " B"] | None,
        context: dict,
    ) -> MaskedState:
        """Draws the draft."""
        state = super().start(params, keys, given, is_given, length, context)
        tokens, log_prob, _ = self._fill(params, state, -1, self.temperature)
        return self._reveal(state, tokens, log_prob, True)

    def step(self, params: Any, state: MaskedState, i: Int[Array, ""] | int) -> MaskedState:
        """Erases, and draws anew."""
        if self.erase == "random":
            coins = self._uniform(state, i)
            coins = jnp.where(state.editable, coins, -jnp.inf)
            erased = kernels.keep_most_confident(coins, self.count) & state.editable
            holes = jnp.where(erased, self.model.mask, state.tokens)
            logits = self.model(params, holes, state.valid, state.context)
        else:
            logits = self._leave_one_out(params, state)
            erased = _least_likely(logits, state)
        tokens, log_prob, _ = kernels.mask_scores(
            logits, state.tokens, erased, state.keys[i, 0], temperature=self.temperature
        )
        return state.replace(tokens=tokens, log_prob=jnp.where(erased, log_prob, state.log_prob))

    def _leave_one_out(self, params, state):
        """Logits [B, L, V] of each position given all others, L sequences for each sample."""
        length, mask = self.length, self.model.mask
        hole = jnp.eye(length, dtype=bool)[None]
        holes = jnp.where(hole, mask, state.tokens[:, None])  # [B, L, L]

        def copies(leaf):
            return jnp.repeat(leaf, length, axis=0)

        context = jax.tree.map(copies, state.context)
        valid = copies(state.valid)
        logits = self.model(params, holes.reshape(-1, length), valid, context)
        logits = logits.reshape(-1, length, length, logits.shape[-1])
        return jnp.einsum("blld->bld", logits)


def _least_likely(logits, state):
    """The editable position [B, L] whose token is the least likely given all others."""
    log_prob = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_prob, state.tokens[..., None], axis=-1)[..., 0]
    own = jnp.where(state.editable, own, jnp.inf)
    return _most_confident(-own, jnp.ones(own.shape[:1], jnp.int32)) & state.editable


def _most_confident(confidence, count):
    """The `count` [B] most confident positions [B, L]; of those equal up to rounding the lower.

    Equal values are common: a network whose only positions are rotary gives the same logits at all
    positions of a sequence of masks. Rounding, which changes with the batch, must not choose.
    """
    kept = kernels.keep_most_confident(confidence, count)
    last = jnp.where(kept, confidence, jnp.inf).min(-1, keepdims=True)
    sure = confidence > last + _ROUNDING
    tied = (confidence >= last - _ROUNDING) & ~sure
    left = count[:, None] - sure.sum(-1, keepdims=True)
    return sure | (tied & (jnp.cumsum(tied, axis=-1) <= left))
