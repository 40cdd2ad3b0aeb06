"""A sampler made of a prior's sampler and a decoder."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.config import frozen
from gen_jax.models.contract import check_params
from gen_jax.models.vq.autoencoder import Autoencoder
from gen_jax.sampling import Sampler

__all__ = ["TwoStageSampler"]


@frozen
class TwoStageSampler:
    """Draws codes or latents with a prior, and decodes them; see `gen_jax.sampling.Sampler`.

    Its parameters are {"prior": ..., "autoencoder": ...}. Its state is that of the prior, so that
    streams and trajectories show what the prior has drawn; `decode` makes images of that.

    Attributes:
      prior: draws code sequences int32 [B, L], or latents float32 [B, h, w, D] over their
        deviation.
      autoencoder: whose decoder makes images.
      latents: whether the prior draws latents.

    Raises:
      ValueError: at construction, where the prior draws codes and the latent is continuous.
    """

    prior: Sampler
    autoencoder: Autoencoder
    latents: bool = False

    def __post_init__(self):
        if not self.latents and not self.autoencoder.quantiser.discrete:
            raise ValueError("a continuous latent has no codes: the prior must draw latents")

    @property
    def steps(self) -> int:
        """Those of the prior."""
        return self.prior.steps

    @property
    def nfe(self) -> int:
        """Those of the prior, and one of the decoder."""
        return self.prior.nfe + 1

    @property
    def conditions(self) -> tuple[str, ...]:
        """What the prior reads."""
        return self.prior.conditions

    def check(self, params: dict[str, Any], cond: Condition) -> None:
        """Refuses what does not fit the prior or the autoencoder; see `Sampler`.

        Raises:
          ValueError: the parameters are not of both, or as the prior's `check` does.
        """
        if not isinstance(params, dict) or params.keys() != {"prior", "autoencoder"}:
            raise ValueError('two stages take {"prior": ..., "autoencoder": ...} as parameters')
        check_params(self.autoencoder, params["autoencoder"])
        self.prior.check(params["prior"], cond)

    def prepare(self, params: dict[str, Any]) -> dict[str, Any]:
        """Both prepared; see `Sampler`."""
        return {
            "prior": self.prior.prepare(params["prior"]),
            "autoencoder": self.autoencoder.prepare(params["autoencoder"]),
        }

    def init(self, params: dict[str, Any], keys: Key[Array, " B"], cond: Condition) -> Any:
        """The state of the prior; see `Sampler`."""
        return self.prior.init(params["prior"], keys, cond)

    def step(self, params: dict[str, Any], state: Any, i: int | Int[Array, ""]) -> Any:
        """A step of the prior; see `Sampler`."""
        return self.prior.step(params["prior"], state, i)

    @property
    def written_out(self) -> bool:
        """Whether the prior's steps differ in shape; see `sampling.WrittenOut`."""
        return sampling.written_out(self.prior)

    def stopped(self, state: Any) -> Bool[Array, ""] | None:
        """Whether the prior has stopped; see `sampling.Stoppable`."""
        return sampling.stopped(self.prior, state)

    def finish(self, params: dict[str, Any], state: Any) -> Float[Array, "B height width C"]:
        """The images, about in [-1, 1]; see `Sampler`."""
        return self.decode(params, self.prior.finish(params["prior"], state))

    def decode(self, params: dict[str, Any], drawn: Array) -> Float[Array, "B height width C"]:
        """Images of what the prior draws.

        Latents of an autoencoder with codes are quantised first. In a code sequence that is not
        whole yet, what is no code is read as code 0.

        Args:
          params: of both, prepared or not.
          drawn: int [B, L], or float32 [B, h, w, D].
        """
        model, params = self.autoencoder, params["autoencoder"]
        if not self.latents:
            codes = model.quantiser.codes
            code = jnp.where((drawn < 0) | (drawn >= codes), 0, drawn)
            return model.decode_code(params, code.reshape(len(drawn), *model.code_shape))
        latents = drawn * params["deviation"]
        if model.quantiser.discrete:
            latents = model.quantiser.quantise(params["quantiser"], latents).value
        return model.decode(params, latents)
