"""Finite scalar quantisation (Mentzer et al. 2023, 2309.15505, section 3.1)."""

import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from gen_jax.config import frozen
from gen_jax.models.vq.config import FSQOptions
from gen_jax.models.vq.contract import Quantised, batch_counts, straight_through, usage

__all__ = ["FSQ"]

_EDGE = 1e-3  # how much wider than its levels the range of a channel is


@frozen
class FSQ:
    """Rounds each channel to one of L_i values in [-1, 1]; see `contract.Quantiser`.

    A channel z becomes round((L - 1)(1 + e) / 2 tanh(z + shift) - offset), where an even number of
    levels has the offset 1/2, and the shift keeps 0 at 0. The code is the number whose digits in
    the mixed base of the levels are these values, counted from 0, the first channel the least.

    Attributes:
      options: the levels.
    """

    options: FSQOptions

    discrete: ClassVar[bool] = True

    @property
    def inputs(self) -> int:
        """Channels, one for each number of levels."""
        return len(self.options.levels)

    @property
    def width(self) -> int:
        """The same."""
        return self.inputs

    @property
    def codes(self) -> int:
        """K, the product of the levels."""
        return math.prod(self.options.levels)

    @property
    def _half(self):
        """Half of the levels, rounded down: the digit of the value 0."""
        return np.array(self.options.levels, np.int32) // 2

    @property
    def _bases(self):
        return np.cumprod([1, *self.options.levels[:-1]]).astype(np.int32)

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """No parameters."""
        del key
        return {}

    def init_statistics(self, params: dict[str, Any]) -> dict[str, Any]:
        """None."""
        del params
        return {}

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        """One code for each position."""
        return height, width

    def maps(self, code: Int32[Any, "B height width"]) -> tuple[Int32[Any, "B height width"], ...]:
        """The code itself."""
        return (code,)

    def centre(self, latents: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        """The latents themselves, float32."""
        return latents.astype(jnp.float32)

    def quantise(
        self,
        params: dict[str, Any],
        latents: Float[Array, "B height width D"],
        keys: Key[Array, " B"] | None = None,
    ) -> Quantised:
        """Rounds; there is no loss of its own, and no randomness."""
        del params, keys
        bounded = self._bound(latents.astype(jnp.float32))
        digits = jnp.round(bounded)
        value = straight_through(bounded, digits) / _last(self._half)
        places = digits.astype(jnp.int32) + _last(self._half)
        code = (places * _last(self._bases)).sum(axis=-1)
        return Quantised(value, code.astype(jnp.int32), jnp.float32(0))

    def _bound(self, latents):
        """Each channel within half a step of its outermost levels."""
        levels = np.array(self.options.levels)
        half = (levels - 1) * (1 + _EDGE) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        shift = np.arctanh(offset / half)
        half, offset, shift = (_last(np.float32(row)) for row in (half, offset, shift))
        return jnp.tanh(latents + shift) * half - offset

    def lookup(
        self, params: dict[str, Any], code: Int32[Array, "B height width"]
    ) -> Float[Array, "B height width D"]:
        """The digits of the code, as values in [-1, 1]."""
        del params
        levels = _last(np.array(self.options.levels, np.int32))
        digits = code[..., None] // _last(self._bases) % levels
        return (digits - _last(self._half)).astype(jnp.float32) / _last(self._half)

    def update(
        self,
        params: dict[str, Any],
        descended: dict[str, Any],
        statistics: dict[str, Any],
        latents: Float[Array, "B height width D"],
        code: Int32[Array, "B height width"],
        keys: Key[Array, " B"],
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Array]]:
        """Nothing changes; the usage of codes in the batch."""
        del params, latents, keys
        return descended, statistics, usage(batch_counts(self.maps(code), self.codes))


def _last(row):
    """A row for the channels of a map [B, height, width, D]."""
    return row[None, None, None]
