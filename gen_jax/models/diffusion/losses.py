"""The diffusion model: its loss, and its variational lower bound in bits per dimension."""

import functools
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gen_jax.config import frozen
from gen_jax.keys import fold_in_each
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.process import (
    diffuse,
    noise_between,
    stable_x0,
    target,
    to_signal,
)
from gen_jax.models.diffusion.schedule import Schedule
from gen_jax.models.diffusion.vlb import vlb_prior, vlb_term
from kernels.threefry import normal_each, split_each, uniform_each

__all__ = ["DiffusionModel", "Network"]


@runtime_checkable
class Network(Protocol):
    """A network that predicts from a noisy image: frozen and hashable.

    `nn.unet.UNetNetwork` is one. A network that takes labels says how many there are in
    `config.classes`. A network may also have `prepare(params)`, which computes once, before a
    sampling loop, what its calls read.
    """

    def init(self, key: Key[Array, ""], height: int, width: int) -> Any:
        """Fresh float32 parameters for images of this size."""

    def __call__(
        self,
        params: Any,
        x: Float[Array, "B height width C"],
        t: Int[Array, " B"],
        label: Int[Array, " B"] | None = None,
        keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B height width C_out"]:
        """Predicts from x_t.

        Args:
          params: of `init`, or of `prepare`.
          x: noisy images.
          t: their time steps, 0 to T - 1.
          label: in [0, classes), or -1 for no class; None for no class anywhere.
          keys: switch dropout on.

        Returns:
          The prediction; where the variance is learned, its output v follows in C more channels.
        """


@frozen
class DiffusionModel:
    """A network, and the process that it reverses; see `gen_jax.models.contract.Model`.

    Attributes:
      network: predicts from noisy images; see `Network`.
      process: the forward process and what the network predicts.
      shape: (height, width, C) of the images.

    Raises:
      ValueError: at construction, where a size is below 1.
    """

    network: Network
    process: DiffusionConfig
    shape: tuple[int, int, int]

    def __post_init__(self):
        if min(self.shape) < 1:
            raise ValueError(f"shape must be (height, width, channels), got {self.shape}")

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Constants of the process."""
        return Schedule(self.process)

    @property
    def classes(self) -> int:
        """Number of labels that the network takes; 0 for an unconditional one."""
        return getattr(getattr(self.network, "config", None), "classes", 0)

    @property
    def shared(self) -> tuple[str, ...]:
        """Entries of a batch that every example is compared with, not one for each."""
        if not self.process.reference:
            return ()
        return ("reference", "reference_label") if self.classes else ("reference",)

    @property
    def null_class(self) -> bool:
        """Whether the network also predicts without a label."""
        return getattr(getattr(self.network, "config", None), "null_class", True)

    def init(self, key: Key[Array, ""]) -> Any:
        """Fresh float32 parameters."""
        return self.network.init(key, *self.shape[:2])

    def loss(
        self, params: Any, batch: Mapping[str, Any], keys: Key[Array, " B"]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """L_simple (2006.11239 eq. 14), plus the weighted bound when the variance is learned.

        Args:
          params: of the network.
          batch: "image" uint8 [B, height, width, C], or "latent" float32 of this shape, which is
            diffused as it is; and "label" integers [B] for a conditional network only. Where the
            process has a reference, "reference" [R, height, width, C] of the same kind and, with
            labels, "reference_label" [R], of which those of an image's class count.
          keys: one per example: time, noise, label dropout and dropout depend on them.

        Returns:
          (scalar, metrics): the mean loss over the batch. Where the variance is learned, metrics
          has its parts "simple" and "vlb" (in bits per dimension); else it is empty.

        Raises:
          ValueError: labels are to be hidden from a network that always needs one, or there is no
            reference where the process has one.
        """
        x0 = _clean(batch)
        t_keys, noise_keys, label_keys, dropout_keys = split_each(keys, 4)
        t = self._times(t_keys)
        noise = normal_each(noise_keys, x0.shape[1:])
        label = _label(batch)
        if label is not None and self.process.label_dropout:
            if not self.null_class:
                raise ValueError(
                    "label_dropout hides labels, but the network has no class for none: set it to 0"
                )
            label = _hide_labels(label, self.process.label_dropout, label_keys)

        x = diffuse(self.schedule, x0, t, noise)
        output, variance_output = self.predict(params, x, t, label, dropout_keys)
        simple = jnp.square(output - self._target(batch, x0, x, t, noise, label)).mean()
        if variance_output is None:
            return simple, {}
        # 2102.09672 eq. 16: the bound trains the variance alone; T L_t estimates the sum over t.
        output = jax.lax.stop_gradient(output)
        terms = vlb_term(self.schedule, x0, x, t, output, variance_output)
        vlb = self.process.timesteps * terms.mean()
        return simple + self.process.vlb_weight * vlb, {"simple": simple, "vlb": vlb}

    def _target(self, batch, x0, x, t, noise, label):
        """What the network should predict, with the mean of clean images where there are others."""
        if not self.process.reference:
            return target(self.schedule, x0, t, noise)
        if "reference" not in batch:
            raise ValueError('the process has a reference: the batch needs "reference" images')
        allowed = None
        if label is not None:
            allowed = (label[:, None] == batch["reference_label"][None]) | (label[:, None] < 0)
        others = batch["reference"]
        others = others if "latent" in batch else to_signal(others)
        mean = stable_x0(self.schedule, x0, x, t, others, allowed)
        return target(self.schedule, mean, t, noise_between(self.schedule, mean, x, t))

    def _times(self, keys):
        """A time step [B] for each example."""
        total, shift = self.process.timesteps, self.process.time_shift
        if shift == 1:
            return jax.vmap(lambda key: jax.random.randint(key, (), 0, total))(keys)
        u = uniform_each(keys)
        t = jnp.floor(total * shift * u / (1 + (shift - 1) * u))
        return jnp.minimum(t.astype(jnp.int32), total - 1)

    def predict(
        self,
        params: Any,
        x: Float[Array, "B height width C"],
        t: Int[Array, " B"],
        label: Int[Array, " B"] | None = None,
        keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B height width C"], Float[Array, "B height width C"] | None]:
        """What the network predicts at x_t, and its output v for the variance where it is learned.

        Args: as of `Network`.

        Raises:
          ValueError: the output of the network has another number of channels than the process
            asks for.
        """
        output = self.network(params, x, t, label, keys)
        learned = self.process.variance == "learned"
        channels = x.shape[-1] * (2 if learned else 1)
        if output.shape[-1] != channels:
            raise ValueError(
                f"with variance {self.process.variance!r} the network must predict {channels} "
                f"channels, not {output.shape[-1]}"
            )
        return tuple(jnp.split(output, 2, axis=-1)) if learned else (output, None)

    def bits_per_dim(
        self,
        params: Any,
        batch: Mapping[str, Any],
        keys: Key[Array, " B"],
        draws: int | None = None,
    ) -> dict[str, Float[Array, " B"]]:
        """The variational bound in bits per dimension of each image (2006.11239 eq. 5).

        Args:
          params: of the network.
          batch: as for `loss`.
          keys: one per image.
          draws: None for all T terms; a number, at least 1, for an unbiased estimate of the same
            sum from the decoder's term and that many stratified draws of the others.

        Returns:
          {"bits_per_dim", "prior", "rate", "decoder"}: each [B] float32; the first is the sum of
          the others.

        Raises:
          ValueError: `draws` is below 1.
        """
        if draws is not None and draws < 1:
            raise ValueError(f"draws must be at least 1, or None for all terms, got {draws}")
        x0, label, total = to_signal(batch["image"]), _label(batch), self.process.timesteps
        count = total - 1 if draws is None else draws

        def term(t, keys):
            x = diffuse(self.schedule, x0, t, normal_each(keys, x0.shape[1:]))
            output, variance_output = self.predict(params, x, t, label)
            return vlb_term(self.schedule, x0, x, t, output, variance_output, clip=True)

        def rate_term(i, carry):
            where_keys, noise_keys = split_each(fold_in_each(keys, i), 2)
            offset = 0.5 if draws is None else uniform_each(where_keys)
            t = jnp.floor((i + offset) * (total - 1) / count) + jnp.ones(x0.shape[:1])
            t = jnp.minimum(t.astype(jnp.int32), total - 1)
            return carry + term(t, noise_keys) * (total - 1) / count

        rate = jax.lax.fori_loop(0, count if total > 1 else 0, rate_term, jnp.zeros(x0.shape[:1]))
        decoder = term(jnp.zeros(x0.shape[:1], jnp.int32), fold_in_each(keys, total))
        prior = vlb_prior(self.schedule, x0)
        return {
            "bits_per_dim": prior + rate + decoder,
            "prior": prior,
            "rate": rate,
            "decoder": decoder,
        }


def _clean(batch):
    return batch["latent"] if "latent" in batch else to_signal(batch["image"])


def _label(batch):
    """Labels as int32, so that -1 stands for none whatever type the data has."""
    return None if batch.get("label") is None else jnp.asarray(batch["label"]).astype(jnp.int32)


def _hide_labels(label, rate, keys):
    return jnp.where(uniform_each(keys) < rate, -1, label)
