"""The best possible network for a known set of images, in closed form."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gen_jax.config import frozen
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.process import noise_between, target
from gen_jax.models.diffusion.schedule import Schedule

__all__ = ["ExactNetwork"]


@frozen
class ExactNetwork:
    """Predicts from the mean of clean images given x_t, where these are uniform over a known set.

    This mean minimises the loss of `DiffusionModel`, so that a solver run with it shows what the
    solver alone loses. The parameters are {"images": float32 [N, height, width, C]}. It is a
    `Network` without labels.

    Attributes:
      process: that the network reverses, and what it predicts.
      number: N, of the images.
      channels: C.

    Raises:
      ValueError: at construction, where the variance is learned or a number is below 1.
    """

    process: DiffusionConfig
    number: int
    channels: int = 3

    def __post_init__(self):
        if self.process.variance == "learned":
            raise ValueError("the exact network predicts the mean alone: choose a fixed variance")
        if min(self.number, self.channels) < 1:
            raise ValueError("number and channels must be at least 1")

    def init(self, key: Key[Array, ""], height: int, width: int) -> Any:
        """Black images, in the place of those that the network is to know."""
        return {"images": jnp.zeros((self.number, height, width, self.channels))}

    def __call__(
        self,
        params: Any,
        x: Float[Array, "B height width C"],
        t: Int[Array, " B"],
        label: Int[Array, " B"] | None = None,
        keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B height width C"]:
        """The best prediction from x_t; see `Network`."""
        schedule, images = Schedule(self.process), params["images"]
        flat, set_of = (values.reshape(len(values), -1) for values in (x, images))
        alpha_bar = jnp.asarray(schedule.alpha_bar, jnp.float32)[t][:, None]
        products = jnp.einsum("bd,nd->bn", flat, set_of, precision="highest")
        squares = jnp.square(set_of).sum(axis=1)[None]
        logits = (jnp.sqrt(alpha_bar) * products - 0.5 * alpha_bar * squares) / (1 - alpha_bar)
        weights = jax.nn.softmax(logits, axis=1)
        mean = jnp.einsum("bn,nd->bd", weights, set_of, precision="highest").reshape(x.shape)
        return target(schedule, mean, t, noise_between(schedule, mean, x, t))
