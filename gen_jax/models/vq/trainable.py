"""Training of an autoencoder: the gradient's step, and that of the quantiser's moving averages."""

import types
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, Key

from gen_jax import parallel
from gen_jax.config import TrainConfig, frozen
from gen_jax.models.vq.autoencoder import Autoencoder
from gen_jax.trainables import descend, make_optimizer, mean_gradients

__all__ = ["AutoencoderTrainable"]

_DECAY = 0.99  # of the average of the latents' deviation


@frozen
class AutoencoderTrainable:
    """An autoencoder on the common loop; see `training_step.Trainable`.

    The state is {"params", "optimizer", "statistics"}: the parameters of the model, and what the
    quantiser carries along. Where entries of a codebook are moving averages they replace what the
    optimiser makes of them. The moving average of the loop is that of all parameters. Metrics are
    "loss", "reconstruction", "perceptual" where there is such a term, "gradient_norm", and for
    discrete codes "perplexity" and "used" of the batch. A critic that the options of the model
    describe is for `adversarial.AdversarialTrainable`.

    Attributes:
      model: the autoencoder.
      config: the optimiser, and `accumulate`.
    """

    model: Autoencoder
    config: TrainConfig

    rules = types.MappingProxyType({})

    @property
    def accumulate(self) -> int:
        """Slices that a device's share of the batch is cut into."""
        return self.config.accumulate

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh parameters, the state of the optimiser, and statistics of nothing."""
        return self._begin(self.model.init(key))

    def update(
        self, state: dict[str, Any], batch: dict[str, Array], keys: Key[Array, " B"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """One step down the gradient, and one of the quantiser."""

        def loss(params, batch, keys):
            parts = self.model.losses(params, batch, keys)
            outputs = parts.latents, parts.quantised.code
            return parts.total, (self.model.metrics(parts), outputs)

        gradients, metrics, (latents, code) = mean_gradients(
            loss, state["params"], batch, keys, self.accumulate, outputs=True
        )
        after, usage = self.moved(state, gradients, latents, code, keys)
        return after, metrics | usage

    def moved(
        self,
        state: dict[str, Any],
        gradients: dict[str, Any],
        latents: Float[Array, "B h w inputs"],
        code: Int32[Array, "B ..."] | None,
        keys: Key[Array, " B"],
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """The state after a step of the optimiser and one of the quantiser; metrics of both.

        Args:
          state: before the step; entries other than "params", "optimizer" and "statistics" stay.
          gradients: by the parameters, means over the whole batch.
          latents: what the quantiser read of this device's images.
          code: what it gave them.
          keys: one per image.
        """
        params, quantiser = state["params"], self.model.quantiser
        after = descend(make_optimizer(self.config), gradients, state)
        own, statistics, usage = quantiser.update(
            params["quantiser"],
            after["params"]["quantiser"],
            state["statistics"],
            latents,
            code,
            keys,
        )
        deviation = _moved(params["deviation"], quantiser.centre(latents))
        params = after["params"] | {"quantiser": own, "deviation": deviation}
        metrics = {"gradient_norm": optax.tree.norm(gradients), **usage}
        return state | after | {"params": params, "statistics": statistics}, metrics

    def averaged(self, state: dict[str, Any]) -> dict[str, Any]:
        """The parameters."""
        return state["params"]

    def replace_averaged(self, state: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
        """The state that begins with these parameters instead."""
        return self._begin(tree)

    def _begin(self, params):
        return {
            "params": params,
            "optimizer": make_optimizer(self.config).init(params),
            "statistics": self.model.quantiser.init_statistics(params["quantiser"]),
        }


def _moved(deviation, latents):
    """The moving average of the deviation of latents after one more batch."""
    mean, square = parallel.mean((latents.mean(), jnp.square(latents).mean()))
    batch = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 1e-12))
    return _DECAY * deviation + (1 - _DECAY) * batch
