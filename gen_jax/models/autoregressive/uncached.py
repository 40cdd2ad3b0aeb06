"""Sampling without a cache: what one unit at a time costs where nothing is kept."""

from typing import Any

import jax
from jaxtyping import Array, Int, Key

from gen_jax.condition import Condition
from gen_jax.config import frozen
from gen_jax.models.autoregressive.samplers import AutoregressiveSampler, DecodingState

__all__ = ["UncachedSampler"]


@frozen
class UncachedSampler(AutoregressiveSampler):
    """Ancestral sampling that reads the whole sequence again for every token.

    Its samples are those of `AutoregressiveSampler`, up to rounding, and its evaluations are as
    many; each is a pass over all inputs. It is there to be compared with.

    Raises:
      ValueError: at construction, as `AutoregressiveSampler` does, or where first inputs and new
        tokens are longer than the context.
    """

    def __post_init__(self):
        super().__post_init__()
        if self._inputs > self._context:
            raise ValueError(
                f"{self._inputs} inputs are longer than the context of {self._context}, and "
                "nothing is kept that could be gone on from"
            )

    @property
    def nfe(self) -> int:
        """One pass per new token."""
        return self.tokens

    def init(self, params: Any, keys: Key[Array, " B"], cond: Condition) -> DecodingState:
        """Reads nothing but the source."""
        return self._before(params, keys, cond)

    def step(self, params: Any, state: DecodingState, i: Int[Array, ""] | int) -> DecodingState:
        """Reads all inputs, those to come as zeros that nothing sees, and draws the next token."""
        network, inputs = self.model.network, state.tokens[:, : self._inputs]
        caches = network.make_caches(len(inputs), self._inputs)
        hidden, _ = network.extend(params, inputs, caches, 0, state.first, **state.encoded)
        last = jax.lax.dynamic_index_in_dim(hidden, self._width - 1 + i, axis=1, keepdims=False)
        return self._join(params, state, last, i)
