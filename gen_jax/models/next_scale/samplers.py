"""Sampling from coarse to fine, one scale per step."""

import functools
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

import kernels
from gen_jax import keys as key_streams
from gen_jax.condition import Condition
from gen_jax.config import frozen
from gen_jax.models.autoregressive.config import SamplingOptions
from gen_jax.models.contract import check_label, check_params
from gen_jax.models.next_scale.losses import NextScaleModel
from kernels import KVCache

__all__ = ["NextScaleSampler", "NextScaleState"]


@no_type_check  # jax also makes trees of this class whose leaves are no arrays
@flax.struct.dataclass
class NextScaleState:
    """What sampling carries from scale to scale.

    Attributes:
      keys: one for each scale of each sample.
      tokens: int32, those of all scales; -1 where they are still to come.
      label: int32, the class of each sample; None where none was given.
      caches: keys and values of each block, of L columns.
    """

    keys: Key[Array, "R B"]
    tokens: Int[Array, "B L"]
    label: Int[Array, " B"] | None
    caches: tuple[KVCache, ...]


@frozen
class NextScaleSampler:
    """Draws all tokens of a scale at once, given the coarser scales; see `Sampler`.

    An evaluation reads the positions of one scale alone: keys and values of those before are kept.
    The sample is int32 [B, L], the maps of all scales in turn.

    Attributes:
      model: of which the samples are.
      options: how each token is drawn.

    Raises:
      ValueError: at construction, where weights in int8 are asked for.
    """

    model: NextScaleModel
    options: SamplingOptions = SamplingOptions()

    def __post_init__(self):
        if self.options.weights != "own":
            raise ValueError("weights in int8 are for one token at a time: leave them as own")

    @property
    def conditions(self) -> tuple[str, ...]:
        """See `Sampler`."""
        return ("label",) if self.model.classes > 1 else ()

    @property
    def steps(self) -> int:
        """One for each scale."""
        return len(self.model.scales)

    @property
    def nfe(self) -> int:
        """One for each scale."""
        return len(self.model.scales)

    @property
    def written_out(self) -> bool:
        """Scales differ in shape; see `sampling.WrittenOut`."""
        return True

    def check(self, params: Any, cond: Condition) -> None:
        """See `Sampler`; a label must be one of the classes.

        Raises:
          ValueError: it is not, or the parameters do not fit.
        """
        check_params(self.model, params)
        check_label(cond, self.model.classes)

    def prepare(self, params: Any) -> Any:
        """See `TokenNetwork.prepare`."""
        return self.model.network.prepare(params)

    def init(self, params: Any, keys: Key[Array, " B"], cond: Condition) -> NextScaleState:
        """Nothing drawn yet."""
        del params
        batch, length = len(keys), self.model.length
        return NextScaleState(
            keys=key_streams.grid(keys, self.steps),
            tokens=jnp.full((batch, length), -1, jnp.int32),
            label=None if cond.label is None else jnp.asarray(cond.label, jnp.int32),
            caches=self.model.network.make_caches(batch, length),
        )

    def step(self, params: Any, state: NextScaleState, i: Int[Array, ""] | int) -> NextScaleState:
        """Draws the map of scale i; where i is traced the scales are branches of a program."""
        given = params, state.tokens, state.caches, state.label, state.keys[i]
        if isinstance(i, int):
            tokens, caches = self._draw(i, *given)
        else:
            draw = [functools.partial(self._draw, scale) for scale in range(self.steps)]
            tokens, caches = jax.lax.switch(i, draw, *given)
        return state.replace(tokens=tokens, caches=caches)

    def _draw(self, scale, params, tokens, caches, label, keys):
        model, batch = self.model, len(tokens)
        first, end = model.first[scale : scale + 2]
        inputs = model.inputs(scale, tokens, label)
        hidden, caches = model.network.extend(params, inputs, caches, first)
        rows = hidden.reshape(batch * (end - first), -1)
        keys = key_streams.grid(keys, end - first).swapaxes(0, 1).reshape(-1)
        drawn = kernels.sample_token(rows, params.head, keys, **self.options.choice)
        return tokens.at[:, first:end].set(drawn.reshape(batch, -1)), caches

    def finish(self, params: Any, state: NextScaleState) -> Int[Array, "B L"]:
        """The tokens of all scales, int32; -1 where they are still to come."""
        del params
        return state.tokens
