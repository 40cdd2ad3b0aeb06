"""A Markov chain as a source of token sequences whose entropy is known exactly."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float64, Integer

from gen_jax.data.streams import check_tokens, shard_of_step

__all__ = ["MarkovSource"]


@dataclass(frozen=True, eq=False)
class MarkovSource:
    """A Markov chain of first order over V tokens, stationary or not.

    Attributes:
      initial: the distribution of the first token, with V >= 1.
      transition: row v is the distribution of the token that follows v.

    Raises:
      ValueError: another dtype or shape, or a row that is no distribution.
    """

    initial: Float64[np.ndarray, " V"]
    transition: Float64[np.ndarray, "V V"]

    def __post_init__(self):
        size = len(self.initial)
        for name, array, shape in (
            ("initial", self.initial, (size,)),
            ("transition", self.transition, (size, size)),
        ):
            if array.dtype != np.float64 or array.shape != shape or size == 0:
                raise ValueError(
                    f"{name} must be float64 {list(shape)} with V >= 1, "
                    f"not {array.dtype} {list(array.shape)}"
                )
            # A NaN fails both comparisons.
            if not (np.all(array >= 0) and np.all(np.abs(array.sum(axis=-1) - 1) <= 1e-9)):
                raise ValueError(f"{name} holds a row that is no distribution: not >= 0 with sum 1")

    @classmethod
    def random(cls, vocabulary: int, seed: int, concentration: float = 0.5) -> "MarkovSource":
        """A stationary chain whose rows are drawn from a symmetric Dirichlet distribution.

        Args:
          vocabulary: V, from 1 up.
          seed: from 0 up.
          concentration: above 0; the smaller, the more predictable the chain.

        Raises:
          ValueError: an argument is out of range, or the concentration is so small that the
            chain falls into parts.
        """
        if vocabulary < 1 or seed < 0 or not 0 < concentration < np.inf:
            raise ValueError(
                f"vocabulary {vocabulary}, seed {seed} and concentration {concentration} must be "
                "at least 1, at least 0, and above 0"
            )
        rows = np.random.default_rng(seed).dirichlet(np.full(vocabulary, concentration), vocabulary)
        return cls(cls(rows[0], rows).stationary, rows)

    @property
    def vocabulary(self) -> int:
        """V, the number of different tokens."""
        return len(self.initial)

    @cached_property
    def stationary(self) -> Float64[np.ndarray, " V"]:
        """The one distribution that a transition leaves as it is.

        Raises:
          ValueError: there are several, as in a chain that falls into parts.
        """
        size = self.vocabulary
        equations = np.vstack([self.transition.T - np.eye(size), np.ones(size)])
        result, _, rank, _ = np.linalg.lstsq(equations, np.append(np.zeros(size), 1))
        if rank < size:
            raise ValueError("the chain has several stationary distributions; it falls into parts")
        result = np.maximum(result, 0)
        return result / result.sum()

    @cached_property
    def entropy_rate(self) -> float:
        """Nats per token of a long sequence: the entropy of a transition at stationarity.

        Raises:
          ValueError: there are several stationary distributions.
        """
        return float(self.stationary @ _entropies(self.transition))

    def entropy(self, length: int) -> float:
        """The entropy of a sequence, exactly, in nats.

        It is H(x_1) + sum over t of H(x_t | x_{t-1}), each from the marginal of x_{t-1}.

        Args:
          length: L, from 1 up.

        Raises:
          ValueError: the length is out of range.
        """
        _check_length(length)
        of_transition = _entropies(self.transition)
        marginal, total = self.initial, _entropies(self.initial)
        for _ in range(length - 1):
            total += marginal @ of_transition
            marginal = marginal @ self.transition
        return float(total)

    def log_prob(self, tokens: Integer[Any, "B L"]) -> Float64[np.ndarray, " B"]:
        """The log-probability of sequences.

        Args:
          tokens: each in [0, V), with L >= 1.

        Returns:
          In nats; -inf for a sequence that cannot occur.

        Raises:
          ValueError: another shape or dtype, or a token out of range.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not tokens.shape[1] or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                "tokens must be integers [B, L] with L >= 1, "
                f"not {tokens.dtype} {list(tokens.shape)}"
            )
        check_tokens(tokens, self.vocabulary)
        with np.errstate(divide="ignore"):
            initial, transition = np.log(self.initial), np.log(self.transition)
        return initial[tokens[:, 0]] + transition[tokens[:, :-1], tokens[:, 1:]].sum(axis=1)

    def batch(
        self, seed: int, step: int, size: int, *, length: int, shard: tuple[int, int] = (0, 1)
    ) -> dict[str, np.ndarray]:
        """This shard of a batch of independent sequences, a pure function of its arguments.

        Args:
          seed: in [0, 2**64).
          step: from 0 up.
          size: sequences per global batch, over all shards.
          length: L, from 1 up.
          shard: (index, count); the shards in order, concatenated, are the whole batch.

        Returns:
          "tokens": int32 [B, L], with B = size / count.

        Raises:
          ValueError: an argument is out of range, or count does not divide size.
        """
        _check_length(length)
        generator, mine = shard_of_step(seed, step, size, shard)
        uniform = generator.random((size, length))[mine]
        tokens = np.empty(uniform.shape, np.int32)
        tokens[:, 0] = (_cumulative(self.initial) <= uniform[:, :1]).sum(axis=1)
        cumulative = _cumulative(self.transition)
        for t in range(1, length):
            tokens[:, t] = (cumulative[tokens[:, t - 1]] <= uniform[:, t, None]).sum(axis=1)
        return {"tokens": tokens}


def _entropies(rows):
    return -(rows * np.log(np.where(rows > 0, rows, 1))).sum(axis=-1)


def _cumulative(rows: np.ndarray) -> np.ndarray:
    # The last entry is exactly 1, so that a number below 1 never falls behind the last token.
    sums = np.cumsum(rows, axis=-1)
    return sums / sums[..., -1:]


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length is {length}; give a number of tokens of at least 1")
