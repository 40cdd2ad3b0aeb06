"""What stands between encoder and decoder, whatever its kind."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key

from gen_jax import parallel

__all__ = ["Quantised", "Quantiser", "batch_counts", "straight_through", "usage"]


class Quantised(NamedTuple):
    """What a quantiser makes of a map of latents.

    Attributes:
      value: what the decoder reads, [B, height, width, D].
      code: what it is stored as, int32 [B, *code_shape]; None for a continuous latent.
      loss: the quantiser's own terms, a mean over the batch.
    """

    value: Any
    code: Any
    loss: Any


@runtime_checkable
class Quantiser(Protocol):
    """Frozen and hashable; its parameters are a tree of their own.

    Attributes:
      inputs: channels that the encoder gives to it.
      width: channels D that the decoder gets from it.
      codes: K, the number of values of a code; 0 for a continuous latent.
      discrete: whether there are codes.
    """

    inputs: int
    width: int
    codes: int
    discrete: ClassVar[bool]

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh parameters; empty where there are none."""

    def init_statistics(self, params: dict[str, Any]) -> dict[str, Any]:
        """What training carries along beside the parameters; empty where there is nothing."""

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of the code of one map of latents."""

    def maps(self, code: Int32[Any, "B ..."]) -> tuple[Int32[Any, "B _ _"], ...]:
        """The part of a code that each table gave, as maps; one where there is one table.

        Raises:
          ValueError: the latent is continuous.
        """

    def centre(self, latents: Float[Array, "B height width inputs"]) -> Float[Array, "B h w D"]:
        """What a prior over latents draws: the latents themselves, or their mean, float32."""

    def quantise(
        self,
        params: dict[str, Any],
        latents: Float[Array, "B height width inputs"],
        keys: Key[Array, " B"] | None = None,
    ) -> Quantised:
        """Quantises maps of latents; `keys` let a continuous latent draw noise."""

    def lookup(
        self, params: dict[str, Any], code: Int32[Array, "B ..."]
    ) -> Float[Array, "B height width D"]:
        """What the decoder reads for a code."""

    def update(
        self,
        params: dict[str, Any],
        descended: dict[str, Any],
        statistics: dict[str, Any],
        latents: Float[Array, "B height width inputs"],
        code: Int32[Array, "B ..."] | None,
        keys: Key[Array, " B"],
    ) -> tuple[dict[str, Any], dict[str, Any], Mapping[str, Float[Array, ""]]]:
        """Parameters and statistics after a step of training, and metrics of the whole batch.

        It is called inside of a program of `parallel.map_devices` with one device's share of the
        batch; what it returns is equal on every device.

        Args:
          params: that the batch was quantised with.
          descended: the same after the step of the optimiser.
          statistics: what training carries along.
          latents: of the batch.
          code: that they were given.
          keys: one per example.
        """


@jax.custom_jvp
def straight_through(
    latents: Float[Array, "*shape"], value: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`value`, whose gradient goes to `latents` unchanged (2013, 1308.3432; 1711.00937, eq. 2)."""
    del latents
    return value


@straight_through.defjvp
def _straight_through_tangent(primals, tangents):
    return primals[1], tangents[0]


def usage(counts: Float32[Array, "R K"]) -> dict[str, Float32[Array, ""]]:
    """How evenly codes are used, from how often each of K was in each of R tables.

    Returns:
      {"perplexity", "used"}: exp of the entropy of the codes, and the share of the codes that
      occur, both averaged over the tables.
    """
    share = counts / counts.sum(axis=1, keepdims=True)
    entropy = -jax.scipy.special.xlogy(share, share).sum(axis=1)
    return {"perplexity": jnp.exp(entropy).mean(), "used": (counts > 0).mean()}


def batch_counts(maps: Sequence[Int32[Array, "B _ _"]], codes: int) -> Float32[Array, "R K"]:
    """How often each code occurs in the whole batch, in the maps of each table."""
    counts = jnp.stack([jnp.bincount(each.reshape(-1), length=codes) for each in maps])
    return parallel.sum(counts.astype(jnp.float32))
