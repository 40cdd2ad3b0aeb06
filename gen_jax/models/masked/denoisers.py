"""What fills masked positions: the protocol, and known distributions by enumeration.

B batch, L length, V vocabulary, N sequences of a known distribution.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gen_jax.condition import Condition, is_concrete
from gen_jax.config import frozen

__all__ = ["Denoiser", "ExactDenoiser"]


@runtime_checkable
class Denoiser(Protocol):
    """What fills masked positions: a frozen, hashable object.

    Attributes:
      vocabulary: tokens V.
      mask: the token that stands for a hidden one, from V up.
      conditions: names of the fields of `Condition` that it reads; "length" is among them where it
        can read sequences that are shorter than others.
    """

    vocabulary: int
    mask: int
    conditions: tuple[str, ...]

    def check(self, params, cond: Condition, length: int) -> None:
        """Refuses parameters and conditions that do not fit, for sequences of `length` positions.

        Raises:
          ValueError: one of them does not fit.
        """

    def prepare(self, params) -> Any:
        """What the other methods get as `params`, computed once before a loop."""

    def encode(self, params, cond: dict[str, Any]) -> dict:
        """What stays the same from round to round.

        Args:
          params: of `prepare`.
          cond: arrays [B, ...] by the names in `conditions`; those that are missing or not among
            them do not count.

        Returns:
          A tree of arrays [B, ...], the `context` of `__call__`.
        """

    def __call__(
        self,
        params,
        tokens: Int[Array | np.ndarray, "B L"],
        valid: Bool[Array | np.ndarray, "B L"],
        context: dict,
    ) -> Float[Array, "B L V"]:
        """Logits of every position, of tokens that may be masks.

        Args:
          params: of `prepare`.
          tokens: those that are known, and the mask where one is hidden.
          valid: the positions that a sequence has; the others are not read.
          context: of `encode`.
        """


@frozen
class ExactDenoiser:
    """The conditionals of a known distribution over few sequences, by enumeration.

    Its parameters are "support" int [N, L] and "prob" float [N], as `data.exact.Enumerated` has
    them. It reads no condition. Known tokens that cannot occur together give the uniform
    distribution.

    Attributes:
      vocabulary: tokens V.
    """

    vocabulary: int

    def __post_init__(self):
        if self.vocabulary < 1:
            raise ValueError(f"vocabulary must be at least 1, got {self.vocabulary}")

    @property
    def mask(self) -> int:
        """V."""
        return self.vocabulary

    @property
    def conditions(self) -> tuple[str, ...]:
        """None: all sequences have all positions."""
        return ()

    def check(self, params: Any, cond: Condition, length: int) -> None:
        """See `Denoiser.check`.

        Raises:
          ValueError: the parameters are not a distribution over sequences of `length` tokens.
        """
        if not isinstance(params, Mapping) or set(params) != {"support", "prob"}:
            raise ValueError('parameters of an ExactDenoiser are {"support": [N, L], "prob": [N]}')
        support, prob = params["support"], params["prob"]
        wanted = (np.shape(prob)[0] if np.ndim(prob) == 1 else None, length)
        if np.shape(support) != wanted:
            raise ValueError(
                f"support and prob must be [N, {length}] and [N], got {list(np.shape(support))} "
                f"and {list(np.shape(prob))}"
            )
        if is_concrete(support):
            support = np.asarray(support)
            if support.min() < 0 or support.max() >= self.vocabulary:
                raise ValueError(f"tokens of the support must be in 0 to {self.vocabulary - 1}")
        if is_concrete(prob):
            prob = np.asarray(prob, np.float64)
            if not (prob >= 0).all() or abs(prob.sum() - 1) > 1e-4:
                raise ValueError(f"prob must not be negative and sum to 1, not {prob.sum()}")

    def prepare(self, params: Any) -> dict:
        """The distribution in float32."""
        prob = jnp.asarray(params["prob"], jnp.float32)
        return {"support": jnp.asarray(params["support"], jnp.int32), "prob": prob}

    def encode(self, params: Any, cond: dict[str, Any]) -> dict:
        """Nothing."""
        return {}

    def __call__(
        self,
        params: dict,
        tokens: Int[Array | np.ndarray, "B L"],
        valid: Bool[Array | np.ndarray, "B L"],
        context: dict,
    ) -> Float[Array, "B L V"]:
        """See `Denoiser.__call__`; all positions are valid."""
        support = params["support"]
        fits = (tokens[:, None] == support[None]) | (tokens[:, None] == self.mask)
        weights = jnp.where(fits.all(-1), params["prob"][None], 0)  # [B, N]
        of_token = jax.nn.one_hot(support, self.vocabulary)
        prob = jnp.einsum("bn,nlv->blv", weights, of_token, precision="highest")
        possible = weights.sum(-1)[:, None, None] > 0
        return jnp.where(possible, jnp.log(prob), 0.0)
