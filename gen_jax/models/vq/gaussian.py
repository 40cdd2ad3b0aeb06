"""The continuous latent of latent diffusion (Rombach et al. 2022, 2112.10752, section 3.1)."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from gen_jax.config import frozen
from gen_jax.models.vq.config import GaussianOptions
from gen_jax.models.vq.contract import Quantised
from kernels.threefry import normal_each

__all__ = ["Gaussian", "kl_divergence"]

_LOG_VARIANCE = -30.0, 20.0  # that is believed of the encoder


@frozen
class Gaussian:
    """A diagonal normal posterior, drawn from in training; see `contract.Quantiser`.

    The encoder gives 2 D channels, mean and log variance. There are no codes.

    Attributes:
      options: the width D and the weight of the divergence.
    """

    options: GaussianOptions

    discrete: ClassVar[bool] = False
    codes: ClassVar[int] = 0

    @property
    def inputs(self) -> int:
        """2 D channels."""
        return 2 * self.options.width

    @property
    def width(self) -> int:
        """D channels."""
        return self.options.width

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """No parameters."""
        del key
        return {}

    def init_statistics(self, params: dict[str, Any]) -> dict[str, Any]:
        """None."""
        del params
        return {}

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Raises a ValueError: there are no codes."""
        raise ValueError("a continuous latent has no codes")

    def maps(self, code: Any) -> tuple[Array, ...]:
        """Raises a ValueError: there are no codes."""
        raise ValueError("a continuous latent has no codes")

    def centre(self, latents: Float[Array, "B h w inputs"]) -> Float[Array, "B h w D"]:
        """The mean of the posterior."""
        return moments(latents)[0]

    def quantise(
        self,
        params: dict[str, Any],
        latents: Float[Array, "B height width inputs"],
        keys: Key[Array, " B"] | None = None,
    ) -> Quantised:
        """A draw of the posterior with keys, and its mean without.

        The loss is the weighted divergence from the standard normal, in nats, a mean over the
        images; the model divides it by the values of an image.
        """
        del params
        mean, log_variance = moments(latents)
        value = mean
        if keys is not None:
            value = mean + jnp.exp(0.5 * log_variance) * normal_each(keys, mean.shape[1:])
        divergence = kl_divergence(mean, log_variance).mean()
        return Quantised(value, None, self.options.weight * divergence)

    def lookup(self, params: dict[str, Any], code: Any) -> Array:
        """Raises a ValueError: there are no codes."""
        raise ValueError("a continuous latent has no codes")

    def update(
        self,
        params: dict[str, Any],
        descended: dict[str, Any],
        statistics: dict[str, Any],
        latents: Float[Array, "B height width inputs"],
        code: None,
        keys: Key[Array, " B"],
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Array]]:
        """Nothing changes."""
        return descended, statistics, {}


def moments(latents):
    """Mean and log variance, float32, from the two halves of the channels."""
    mean, log_variance = jnp.split(latents.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(log_variance, *_LOG_VARIANCE)


def kl_divergence(
    mean: Float[Array, "B ..."], log_variance: Float[Array, "B ..."]
) -> Float[Array, " B"]:
    """KL(N(mean, variance) || N(0, 1)) of each example in nats (1312.6114, appendix B)."""
    terms = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
    return terms.reshape(terms.shape[0], -1).sum(axis=1)
