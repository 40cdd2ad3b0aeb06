"""Training of an autoencoder against a critic of patches: VQGAN (Esser et al. 2021, 2012.09841).

    autoencoder   L_rec + L_quantiser - w lambda mean D(x^)                      eq. 5, 6
    lambda        |grad L_rec| / (|grad mean D(x^)| + 1e-4), in [0, 1e4]         eq. 7
    critic        (mean max(0, 1 - D(x)) + mean max(0, 1 + D(sg(x^)))) / 2

L_rec is the error of reconstruction and the perceptual term. The gradients of eq. 7 are by the
weights of the decoder's last layer. The hinge, and -mean D(x^) in the place of the logarithms of
eq. 5, the constants and the late start are those of the authors' code, taming-transformers.

Where we differ: both players take their step at the same parameters, on the same images and their
one reconstruction, where that code decodes them again for the critic once the autoencoder has
moved. The norms of eq. 7 are those of the gradients of the whole batch, over all devices and
slices. The critic and its optimiser rest before the start, where that code takes steps of gradient
zero.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from gen_jax.config import frozen
from gen_jax.models.diffusion.process import to_signal
from gen_jax.models.vq.trainable import AutoencoderTrainable
from gen_jax.nn.discriminator import PatchDiscriminator
from gen_jax.trainables import descend, make_optimizer, mean_gradients

__all__ = ["AdversarialTrainable", "adaptive_weight", "hinge_loss"]

_EPSILON, _LARGEST = 1e-4, 1e4


def hinge_loss(real: Float[Array, "B h w"], fake: Float[Array, "B h w"]) -> Float[Array, ""]:
    """What the critic descends, from its logits of images and of reconstructions."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def adaptive_weight(by_error: Any, by_critic: Any) -> Float[Array, ""]:
    """lambda of eq. 7, from the gradients of both terms by the same weights; in [0, 1e4]."""
    ratio = optax.tree.norm(by_error) / (optax.tree.norm(by_critic) + _EPSILON)
    return jnp.clip(ratio, 0, _LARGEST)


@frozen
class AdversarialTrainable(AutoencoderTrainable):
    """An autoencoder and its critic, two players with an optimiser each, in one step.

    The state is that of `AutoencoderTrainable`, with "critic", {"params", "optimizer"}, and "step",
    the number of steps taken. Samples, evaluation and the moving average are of the autoencoder
    alone. Metrics are those of `AutoencoderTrainable`, and "adversarial", -mean D(x^);
    "adaptive_weight", lambda, which is 0 before the start; "critic_loss", "critic_real" and
    "critic_fake", the mean logits of images and reconstructions, and "critic_gradient_norm".

    Attributes:
      model: the autoencoder; its options describe the critic.
      config: the optimiser of the autoencoder, and `accumulate`.

    Raises:
      ValueError: at construction, where the weight of the critic is 0, it would never start, the
        images are too small for it, or the network does not say which layer is its last.
    """

    def __post_init__(self):
        critic, network = self.model.options.critic, self.model.network
        if not critic.weight:
            raise ValueError("critic.weight is 0: train with AutoencoderTrainable, or set it")
        critic.check(self.config)
        critic.check_size(*self.model.shape[:2])
        if not hasattr(network, "last_layer"):
            raise ValueError(
                f"the adaptive weight needs the decoder's last layer: give {type(network).__name__}"
                " an attribute last_layer, the path to its weights in the parameters"
            )

    @property
    def critic(self) -> PatchDiscriminator:
        """The network of the critic."""
        return PatchDiscriminator(self.model.options.critic.network)

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh parameters and optimisers of both players; no step was taken."""
        key, critic_key = jax.random.split(key)
        params = self.critic.init(critic_key, *self.model.shape)
        critic = {"params": params, "optimizer": self._critic_optimizer().init(params)}
        return super().init(key) | {"critic": critic, "step": jnp.int32(0)}

    def replace_averaged(self, state: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
        """The state that begins with these parameters of the autoencoder, and a fresh critic."""
        return state | super().replace_averaged(state, tree)

    def update(
        self, state: dict[str, Any], batch: dict[str, Array], keys: Key[Array, " B"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """One step of the autoencoder, and one of the critic from the start on."""
        options, judge = self.model.options.critic, state["critic"]["params"]
        started = state["step"] >= options.start
        ratio = jnp.where(started, self._adaptive_weight(state, batch, keys), 0)

        def loss(params, batch, keys):
            parts = self.model.losses(params, batch, keys)
            adversarial = -self.critic(judge, parts.images).mean()
            metrics = self.model.metrics(parts) | {"adversarial": adversarial}
            outputs = parts.latents, parts.quantised.code, parts.images
            return parts.total + options.weight * ratio * adversarial, (metrics, outputs)

        gradients, metrics, (latents, code, images) = mean_gradients(
            loss, state["params"], batch, keys, self.accumulate, outputs=True
        )
        after, moved = self.moved(state, gradients, latents, code, keys)
        pair = {"image": batch["image"], "decoded": images}
        critic, judged = self._judged(state["critic"], pair, keys)
        critic = jax.tree.map(functools.partial(jnp.where, started), critic, state["critic"])
        metrics |= moved | judged | {"adaptive_weight": ratio}
        return after | {"critic": critic, "step": state["step"] + 1}, metrics

    def _adaptive_weight(self, state, batch, keys):
        """lambda of the whole batch."""
        params, path = state["params"], self.model.network.last_layer

        def apart(last, batch, keys):
            """Both terms, each a function of its own copy of the last layer."""
            by = {
                name: self.model.losses(
                    params | {"network": _replaced(params["network"], path, weights)}, batch, keys
                )
                for name, weights in last.items()
            }
            judged = self.critic(state["critic"]["params"], by["critic"].images)
            return by["error"].error - judged.mean(), {}

        # What both copies share, and what `update` computes again, is compiled once: on CPUs not so
        # with dropout, whose masks are drawn in a loop there.
        last = functools.reduce(lambda tree, name: tree[name], path, params["network"])
        copies = {"error": last, "critic": last}
        gradients, _ = mean_gradients(apart, copies, batch, keys, self.accumulate)
        return adaptive_weight(gradients["error"], gradients["critic"])

    def _judged(self, critic, pair, keys):
        """The critic after a step on images and their reconstructions, and metrics of it."""

        def loss(params, pair, keys):
            real = self.critic(params, to_signal(pair["image"]))
            fake = self.critic(params, pair["decoded"])
            return hinge_loss(real, fake), {"real": real.mean(), "fake": fake.mean()}

        gradients, metrics = mean_gradients(loss, critic["params"], pair, keys, self.accumulate)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        after = descend(self._critic_optimizer(), gradients, critic)
        return after, {f"critic_{name}": value for name, value in metrics.items()}

    def _critic_optimizer(self):
        options = self.model.options.critic
        config = dataclasses.replace(
            self.config,
            steps=self.config.steps - options.start,
            learning_rate=options.learning_rate,
            beta1=options.beta1,
            beta2=options.beta2,
        )
        return make_optimizer(config)


def _replaced(tree, path, leaf):
    """A tree of dicts with another leaf at a path."""
    if not path:
        return leaf
    name, *rest = path
    return tree | {name: _replaced(tree[name], rest, leaf)}
