"""The autoencoder as a model: encoder, quantiser, decoder, and the loss of all three."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Key

from gen_jax.condition import is_concrete
from gen_jax.config import frozen, resolve
from gen_jax.models.diffusion.process import to_signal
from gen_jax.models.vq.config import AutoencoderOptions, QuantiserOptions
from gen_jax.models.vq.contract import Quantised, Quantiser
from gen_jax.models.vq.perceptual import LaplacianPyramid, Perceptual, perceptual_distance
from gen_jax.nn.autoencoder import AutoencoderNetwork
from gen_jax.nn.config import AutoencoderConfig
from kernels.threefry import split_each

__all__ = ["Autoencoder", "CodingNetwork", "Losses", "make_autoencoder"]

_PYRAMID = LaplacianPyramid()


@runtime_checkable
class CodingNetwork(Protocol):
    """An encoder and a decoder: frozen and hashable. `nn.autoencoder.AutoencoderNetwork` is one.

    It may also have `prepare(params)`, which computes once, before a loop, what its calls read, and
    `last_layer`, the path in the parameters to the weights of the decoder's last layer, which
    training against a critic asks for.
    """

    def init(self, key: Key[Array, ""], height: int, width: int) -> dict[str, Any]:
        """Fresh float32 parameters for images of this size."""

    def check(self, height: int, width: int, channels: int) -> None:
        """Raises a ValueError where images of this size do not fit."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, D) of an image of this size."""

    def encode(
        self, params: Any, x: Float[Array, "B height width C"], keys: Key[Array, " B"] | None
    ) -> Float[Array, "B h w inputs"]:
        """Images in [-1, 1] to what the quantiser reads; keys switch dropout on."""

    def decode(
        self, params: Any, z: Float[Array, "B h w D"], keys: Key[Array, " B"] | None
    ) -> Float[Array, "B height width C"]:
        """What the quantiser gives to images, about in [-1, 1]."""


class Losses(NamedTuple):
    """What one evaluation of the autoencoder gives.

    Attributes:
      total: the loss, [].
      reconstruction: its first part, [], a mean over the values of the images.
      perceptual: the distance of features, [], before its weight; 0 where that is 0.
      error: the sum of both, weighted, [], which is the total without the quantiser's terms.
      latents: what the quantiser read, [B, h, w, inputs].
      quantised: what it made of them.
      images: decoded, [B, height, width, C].
    """

    total: Any
    reconstruction: Any
    perceptual: Any
    error: Any
    latents: Any
    quantised: Quantised
    images: Any


@frozen
class Autoencoder:
    """Encoder, quantiser and decoder; see `gen_jax.models.contract.Model`.

    Parameters: {"network": {"encoder", "decoder"}, "quantiser": ..., "deviation": []}. The last one
    is the standard deviation of all values of the latents, before they are quantised, as a moving
    average of training; a prior over latents divides by it (2112.10752, appendix G).

    Attributes:
      network: encoder and decoder.
      quantiser: what stands between them.
      options: the loss.
      shape: (height, width, C) of the images.
      perceptual: the features of the perceptual term, where `options.perceptual` weighs one.

    Raises:
      ValueError: at construction, where the network does not fit the images.
    """

    network: CodingNetwork
    quantiser: Quantiser
    options: AutoencoderOptions
    shape: tuple[int, int, int]
    perceptual: Perceptual = _PYRAMID

    def __post_init__(self):
        self.network.check(*self.shape)
        if self.quantiser.discrete:
            self.quantiser.code_shape(*self.latent_shape[:2])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, D) of what the decoder reads."""
        return self.network.latent_shape(*self.shape[:2])

    @functools.cached_property
    def code_shape(self) -> tuple[int, ...]:
        """The shape of the code of one image."""
        return self.quantiser.code_shape(*self.latent_shape[:2])

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh float32 parameters."""
        network_key, quantiser_key = jax.random.split(key)
        return {
            "network": self.network.init(network_key, *self.shape[:2]),
            "quantiser": self.quantiser.init(quantiser_key),
            "deviation": jnp.float32(1),
        }

    def losses(
        self, params: dict[str, Any], batch: Mapping[str, Any], keys: Key[Array, " B"]
    ) -> Losses:
        """One evaluation of everything, with dropout and the noise of a continuous latent.

        Args:
          params: of `init`.
          batch: "image" uint8 [B, height, width, C].
          keys: one per image.
        """
        x = to_signal(jnp.asarray(batch["image"]))
        encoder_keys, noise_keys, decoder_keys = split_each(keys, 3)
        latents = self.network.encode(params["network"], x, encoder_keys)
        quantised = self.quantiser.quantise(params["quantiser"], latents, noise_keys)
        images = self.network.decode(params["network"], quantised.value, decoder_keys)
        error = jnp.abs(images - x) if self.options.loss == "l1" else jnp.square(images - x)
        own = quantised.loss
        if not self.quantiser.discrete:  # a sum over the latent, where ours is a mean over values
            own = own / x[0].size
        reconstruction = whole = error.mean()
        distance, weight = jnp.float32(0), self.options.perceptual
        if weight:
            distance = perceptual_distance(self.perceptual, x, images)
            whole = whole + weight * distance
        return Losses(whole + own, reconstruction, distance, whole, latents, quantised, images)

    def loss(
        self, params: dict[str, Any], batch: Mapping[str, Any], keys: Key[Array, " B"]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The error of reconstruction, and perceptual and the quantiser's terms; see `losses`.

        Entries that are moving averages have no gradient; `trainable.AutoencoderTrainable` moves
        them.
        """
        parts = self.losses(params, batch, keys)
        return parts.total, self.metrics(parts)

    def metrics(self, parts: Losses) -> dict[str, Float[Array, ""]]:
        """Metrics of an evaluation: "reconstruction", and "perceptual" where there is a term."""
        measured = {"reconstruction": parts.reconstruction}
        return measured | ({"perceptual": parts.perceptual} if self.options.perceptual else {})

    def encode(
        self, params: dict[str, Any], x: Float[Array | np.ndarray, "B height width C"]
    ) -> Quantised:
        """Images in [-1, 1] to their code, and to what the decoder reads; without randomness.

        Raises:
          ValueError: values are known, and one of them is not finite.
        """
        if is_concrete(x) and not np.isfinite(x).all():
            raise ValueError("images to be encoded hold values that are not finite")
        latents = self.network.encode(params["network"], x, None)
        return self.quantiser.quantise(params["quantiser"], latents)

    def lookup(
        self, params: dict[str, Any], code: Int32[Array | np.ndarray, "B ..."]
    ) -> Float[Array, "B h w D"]:
        """What the decoder reads for a code.

        Raises:
          ValueError: the code has another shape, or, where its values are known, is not in [0, K).
        """
        if code.shape[1:] != self.code_shape:
            raise ValueError(
                f"the code of an image has the shape {list(self.code_shape)}, got "
                f"{list(code.shape[1:])}"
            )
        if is_concrete(code) and bool(((code < 0) | (code >= self.quantiser.codes)).any()):
            raise ValueError(
                f"codes must be in 0 to {self.quantiser.codes - 1}, got {int(code.min())} to "
                f"{int(code.max())}"
            )
        return self.quantiser.lookup(params["quantiser"], code)

    def decode(
        self, params: dict[str, Any], z: Float[Array, "B h w D"]
    ) -> Float32[Array, "B height width C"]:
        """What the quantiser gives to images, about in [-1, 1]; without randomness."""
        return self.network.decode(params["network"], z, None)

    def decode_code(
        self, params: dict[str, Any], code: Int32[Array | np.ndarray, "B ..."]
    ) -> Float32[Array, "B height width C"]:
        """`decode` of `lookup`; it raises what that does."""
        return self.decode(params, self.lookup(params, code))

    def prepare(self, params: dict[str, Any]) -> dict[str, Any]:
        """What depends only on the parameters, computed once before many evaluations."""
        prepare = getattr(self.network, "prepare", None)
        network = params["network"] if prepare is None else prepare(params["network"])
        return {**params, "network": network}


def make_autoencoder(
    network: AutoencoderConfig,
    quantiser: QuantiserOptions,
    options: AutoencoderOptions,
    shape: tuple[int, int, int],
    perceptual: Perceptual = _PYRAMID,
) -> Autoencoder:
    """The convolutional autoencoder of these sizes for images (height, width, C).

    The features of a perceptual term are those of a Laplacian pyramid unless others are given.
    """
    between = resolve(quantiser.make)(quantiser)
    coder = AutoencoderNetwork(network, between.inputs, between.width)
    return Autoencoder(coder, between, options, shape, perceptual)
