"""Parallel decoding in rounds, from masks to tokens, on the common loop.

Every sampler takes a `masked.Denoiser` and the condition of `masked.blanks` (None: all L positions
are masked), with what the denoiser conditions on beside it. A round is one evaluation of the
network at all positions; T rounds cost T evaluations. Given tokens never change. One round of any
of them is the one-shot decoder.

B batch, L positions, T rounds.
"""

import dataclasses
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import kernels
from gen_jax import keys as key_streams
from gen_jax.models.masked.losses import Denoiser
from gen_jax.models.masked.schedules import (
    Cosine,
    Fixed,
    Power,
    Schedule,
    check_rounds,
    masked_after,
)
from gen_jax.models.sequences import existing


@flax.struct.dataclass
class MaskedState:
    """What a sampler in rounds carries.

    Attributes:
      keys: [T + 1, 2, B]: for the tokens and for the choices of each round, and of the start.
      tokens: int32 [B, L], the mask where nothing is revealed yet.
      log_prob: float32 [B, L], of each token when it was chosen; 0 where it was given.
      free: bool [B, L], positions to fill.
      exists: bool [B, L], positions of the sequence.
      order: float32 [B, L], larger is earlier, where the sampler draws an order; else None.
      context: what the denoiser has read.
    """

    keys: jax.Array
    tokens: jax.Array
    log_prob: jax.Array
    free: jax.Array
    exists: jax.Array
    order: jax.Array | None
    context: Any


@dataclasses.dataclass(frozen=True)
class Rounds:
    """What every sampler in rounds has; the subclasses say what a round does.

    Attributes:
      denoiser: fills masked positions.
      length: L.
      rounds: T.
    """

    denoiser: Denoiser
    length: int
    rounds: int

    def __post_init__(self):
        check_rounds(self.length, self.rounds)

    @property
    def steps(self) -> int:
        """One per round."""
        return self.rounds

    @property
    def nfe(self) -> int:
        """One evaluation at all positions per round."""
        return self.rounds

    def prepare(self, params):
        """See `Denoiser.prepare`."""
        return self.denoiser.prepare(params)

    def init(self, params, keys, cond) -> MaskedState:
        """All positions that are not given are masked.

        The condition may bring "context", what the denoiser would read.
        """
        cond = cond or {}
        blank = jnp.full((len(keys), self.length), self.denoiser.mask, jnp.int32)
        tokens = jnp.asarray(cond.get("tokens", blank), jnp.int32)
        if tokens.shape != blank.shape:
            raise ValueError(f"a condition of {tokens.shape}, a sampler of {blank.shape}")
        exists = existing(tokens, cond.get("length"))
        context = cond.get("context")
        return MaskedState(
            keys=key_streams.grid(keys, self.steps + 1, 2),
            tokens=jnp.where(exists, tokens, 0),
            log_prob=jnp.zeros(tokens.shape, jnp.float32),
            free=(tokens == self.denoiser.mask) & exists,
            exists=exists,
            order=None,
            context=self.denoiser.encode(params, cond) if context is None else context,
        )

    def finish(self, params, state: MaskedState) -> jax.Array:
        """The tokens, int32 [B, L], 0 beyond the length of a sequence."""
        return state.tokens

    def _masked(self, state):
        return state.free & (state.tokens == self.denoiser.mask)

    def _fill(self, params, state, i, temperature, noise=0.0):
        """Tokens, log-probabilities and confidences [B, L] of all masked positions."""
        logits = self.denoiser(params, state.tokens, state.exists, state.context)
        return kernels.mask_scores(
            logits, state.tokens, self._masked(state), state.keys[i, 0],
            temperature=temperature, noise=noise,
        )  # fmt: skip

    def _reveal(self, state, tokens, log_prob, chosen):
        """Keeps what was filled in at the chosen positions."""
        chosen = chosen & self._masked(state)
        return state.replace(
            tokens=jnp.where(chosen, tokens, state.tokens),
            log_prob=jnp.where(chosen, log_prob, state.log_prob),
        )


@dataclasses.dataclass(frozen=True)
class MaskPredict(Rounds):
    """The likeliest tokens, the least sure masked again (Ghazvininejad et al. 2019, section 3.2).

    Round t predicts what is masked and then masks the n(t) tokens of the lowest probability, those
    of earlier rounds included, whose probability is the one that they were chosen with: tokens are
    revised. Deterministic; the keys are not used.

    Attributes:
      schedule: n(t); linear in the paper.
    """

    schedule: Schedule = Power(1.0)

    def step(self, params, state: MaskedState, i) -> MaskedState:
        """Predicts, and masks again."""
        tokens, log_prob, _ = self._fill(params, state, i, 0.0)
        state = self._reveal(state, tokens, log_prob, True)
        again = _left(self, state, i)
        sure = jnp.where(state.free, state.log_prob, jnp.inf)
        keep = kernels.keep_most_confident(sure, self.length - again)
        return state.replace(tokens=jnp.where(keep, state.tokens, self.denoiser.mask))


@dataclasses.dataclass(frozen=True)
class MaskGIT(Rounds):
    """Chang et al. 2022, section 3.2: drawn tokens, of which the most confident stay for good.

    Confidence is the log-probability of the drawn token plus Gumbel noise, which falls linearly to
    zero. The law of the samples is not the model's, whatever the number of rounds.

    Attributes:
      schedule: the share that is still masked.
      temperature: of the tokens; 0 takes the most probable.
      choice_temperature: of the noise before the first round.
    """

    schedule: Schedule = Cosine()
    temperature: float = 1.0
    choice_temperature: float = 4.5

    def step(self, params, state: MaskedState, i) -> MaskedState:
        """Fills all masked positions, and keeps the most confident."""
        noise = 0.0
        if self.choice_temperature:
            noise = jnp.float32(self.choice_temperature) * (1 - (i + 1) / self.rounds)
        tokens, log_prob, confidence = self._fill(params, state, i, self.temperature, noise)
        keep = kernels.keep_most_confident(confidence, self.length - _left(self, state, i))
        return self._reveal(state, tokens, log_prob, keep)


@dataclasses.dataclass(frozen=True)
class InOrder(Rounds):
    """A group of positions at a time, in an order that does not hang on what was drawn.

    Each group is drawn from its conditionals in parallel. In a random order with an exact denoiser
    the gap to the model's own law is known (see `schedules.Optimal`), and with as many rounds as
    positions it is zero (Uria et al. 2014, 1310.1757; Hoogeboom et al. 2021, 2110.02037). Groups of
    one from the left are autoregression; dyadic midpoints are small-to-large.

    Attributes:
      schedule: sizes of the groups.
      temperature: of the tokens.
      order: all positions, first to last; None for a random order, another for each sample.
    """

    schedule: Schedule = Cosine()
    temperature: float = 1.0
    order: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.order is not None and sorted(self.order) != list(range(self.length)):
            raise ValueError(f"an order names each of {self.length} positions once: {self.order}")

    @classmethod
    def of_groups(cls, denoiser: Denoiser, groups, temperature: float = 1.0) -> "InOrder":
        """Of groups of positions that are written out."""
        order = tuple(position for group in groups for position in group)
        sizes = Fixed(tuple(len(group) for group in groups))
        return cls(denoiser, len(order), len(groups), sizes, temperature, order)

    def init(self, params, keys, cond) -> MaskedState:
        """Draws the order, where it is random."""
        state = super().init(params, keys, cond)
        if self.order is not None:
            return state
        return state.replace(order=_uniform(state.keys[-1, 1], self.length))

    def step(self, params, state: MaskedState, i) -> MaskedState:
        """Draws the next group."""
        tokens, log_prob, _ = self._fill(params, state, i, self.temperature)
        if self.order is not None:  # the positions of a group are its own, whatever is given
            ends = np.cumsum(self.schedule.sizes(self.length, self.rounds))
            return self._reveal(
                state, tokens, log_prob, np.argsort(self.order) < jnp.array(ends)[i]
            )
        order = jnp.where(state.free, state.order, jnp.inf)
        keep = kernels.keep_most_confident(order, self.length - _left(self, state, i))
        return self._reveal(state, tokens, log_prob, keep)


@dataclasses.dataclass(frozen=True)
class AbsorbingDiffusion(Rounds):
    """Ancestral sampling of absorbing diffusion (Austin et al. 2021, 2107.03006).

    Each masked position is revealed on its own, so that the number of masks after a round is
    binomial with the share that the schedule says. With `remask` above 0 revealed tokens are masked
    again at the largest rate that keeps those shares, times `remask` (ReMDM: Wang et al. 2025,
    2503.00307, section 4): tokens are revised, and the marginals of the process stay.

    Attributes:
      schedule: one with a `gamma`.
      temperature: of the tokens.
      remask: share of the largest rate, in [0, 1].
    """

    schedule: Schedule = Power(1.0)
    temperature: float = 1.0
    remask: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not hasattr(self.schedule, "gamma"):
            raise ValueError("absorbing diffusion needs a curve (see schedules.SCHEDULES)")
        if not 0 <= self.remask <= 1:
            raise ValueError(f"remask must be in [0, 1], got {self.remask}")

    def step(self, params, state: MaskedState, i) -> MaskedState:
        """Reveals some of the masked positions, and masks some of the others."""
        tokens, log_prob, _ = self._fill(params, state, i, self.temperature)
        reveal, again = jnp.asarray(self._rates(), jnp.float32)[:, i]
        coins = _uniform(state.keys[i, 1], self.length)
        masked = self._masked(state)
        state = self._reveal(state, tokens, log_prob, coins < reveal)
        if not self.remask:
            return state
        lost = state.free & ~masked & (coins < again)
        return state.replace(tokens=jnp.where(lost, self.denoiser.mask, state.tokens))

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


@dataclasses.dataclass(frozen=True)
class Repair(Rounds):
    """Erase and repair: a one-shot draft, then rounds that erase tokens and draw them anew.

    Random positions, one at a time, are Gibbs sampling: with an exact denoiser the law converges
    to the model's. Several at once, or the least likely one, are other chains, with other limits.

    Attributes:
      erase: "random" positions, or the one whose token is the least likely given all others. The
        latter is found by one evaluation of L sequences for each sample, which also has the
        conditional to draw from.
      count: how many random positions are erased in a round.
      temperature: of the tokens.
    """

    erase: Literal["random", "least_likely"] = "random"
    count: int = 1
    temperature: float = 1.0

    def __post_init__(self):
        if self.erase not in ("random", "least_likely"):
            raise ValueError(f"erase is {self.erase!r}; choose random or least_likely")
        if self.rounds < 0:
            raise ValueError(f"the number of rounds must not be negative, got {self.rounds}")
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

    def init(self, params, keys, cond) -> MaskedState:
        """Draws the draft."""
        state = super().init(params, keys, cond)
        tokens, log_prob, _ = self._fill(params, state, -1, self.temperature)
        return self._reveal(state, tokens, log_prob, True)

    def step(self, params, state: MaskedState, i) -> MaskedState:
        """Erases, and draws anew."""
        if self.erase == "random":
            coins = _uniform(state.keys[i, 1], self.length)
            coins = jnp.where(state.free, coins, -jnp.inf)
            erased = kernels.keep_most_confident(coins, self.count) & state.free
            holes = jnp.where(erased, self.denoiser.mask, state.tokens)
            logits = self.denoiser(params, holes, state.exists, state.context)
        else:
            logits = self._leave_one_out(params, state)
            own = jax.nn.log_softmax(logits)
            own = jnp.take_along_axis(own, state.tokens[..., None], axis=-1)[..., 0]
            own = jnp.where(state.free, own, jnp.inf)
            least = own <= own.min(-1, keepdims=True) + 1e-5  # the first of equals, up to rounding
            erased = kernels.keep_most_confident(least.astype(jnp.float32), 1) & state.free
        tokens, log_prob, _ = kernels.mask_scores(
            logits, state.tokens, erased, state.keys[i, 0], temperature=self.temperature
        )
        return state.replace(tokens=tokens, log_prob=jnp.where(erased, log_prob, state.log_prob))

    def _leave_one_out(self, params, state):
        """Logits [B, L, V] of each position given all others, L sequences for each sample."""
        length, mask = self.length, self.denoiser.mask
        holes = jnp.where(jnp.eye(length, dtype=bool), mask, state.tokens[:, None])  # [B, L, L]
        copies = lambda leaf: jnp.repeat(leaf, length, axis=0)  # noqa: E731
        context = jax.tree.map(copies, state.context)
        exists = copies(state.exists)
        logits = self.denoiser(params, holes.reshape(-1, length), exists, context)
        logits = logits.reshape(-1, length, length, logits.shape[-1])
        return jnp.einsum("blld->bld", logits)


def _left(sampler, state, i):
    """Free positions [B] that are still masked after round i, by the schedule."""
    table = masked_after(sampler.schedule, sampler.length, sampler.rounds)
    return jnp.asarray(table)[state.free.sum(-1), i]


def _uniform(keys, length):  # [B] -> [B, L], whose first numbers do not hang on L
    return jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
