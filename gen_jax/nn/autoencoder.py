"""The convolutional autoencoder of VQGAN and latent diffusion, without what stands in between.

Esser et al. 2021 (2012.09841, appendix A), whose blocks are those of DDPM without time; Rombach et
al. 2022 (2112.10752). Where we differ: images may be folded into patches first, and a branch of a
residual block is closed at first (its last convolution is zero).
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Key

from gen_jax.config import frozen
from gen_jax.nn.blocks import (
    AttentionBlock,
    PreparedParams,
    ResidualBlock,
    downsample,
    prepare_convolutions,
    variables,
)
from gen_jax.nn.config import AutoencoderConfig
from gen_jax.nn.layers import Conv3x3, GroupNorm, uniform_init

__all__ = ["AutoencoderNetwork"]


class Encoder(nn.Module):
    """Images to maps of latents."""

    config: AutoencoderConfig
    features: int
    outputs: int

    @nn.compact
    def __call__(self, x, keys=None):  # [B, height, width, C] -> [B, h, w, outputs]
        config, dtype, p = self.config, jnp.dtype(self.config.dtype), self.config.patch
        h = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
        h = Conv3x3(config.widths[0], dtype, name="conv_in")(h)
        for level, width in enumerate(config.widths):
            for i in range(config.blocks):
                h = ResidualBlock(config, width, name=f"down_{level}_block_{i}")(h, keys=keys)
                if level in config.attention:
                    h = AttentionBlock(config, name=f"down_{level}_attention_{i}")(h)
            if level != len(config.widths) - 1:
                h = downsample(width, dtype, both_sides=False, name=f"down_{level}_conv")(h)
        h = _middle(config, h, keys)
        h = GroupNorm(config.groups, config.norm_epsilon, name="norm_out")(h)
        h = Conv3x3(self.features, dtype, name="conv_out")(h)
        project = nn.Dense(self.outputs, dtype=dtype, kernel_init=uniform_init, name="project")
        return project(h).astype(jnp.float32)


class Decoder(nn.Module):
    """Maps of latents to images."""

    config: AutoencoderConfig
    features: int

    @nn.compact
    def __call__(self, z, keys=None):  # [B, h, w, D] -> [B, height, width, C]
        config, dtype, p = self.config, jnp.dtype(self.config.dtype), self.config.patch
        project = nn.Dense(self.features, dtype=dtype, kernel_init=uniform_init, name="project")
        h = Conv3x3(config.widths[-1], dtype, name="conv_in")(project(z.astype(dtype)))
        h = _middle(config, h, keys)
        for level, width in reversed(list(enumerate(config.widths))):
            for i in range(config.blocks + 1):
                h = ResidualBlock(config, width, name=f"up_{level}_block_{i}")(h, keys=keys)
                if level in config.attention:
                    h = AttentionBlock(config, name=f"up_{level}_attention_{i}")(h)
            if level != 0:
                h = Conv3x3(width, dtype, upsample=True, name=f"up_{level}_conv")(h)
        h = GroupNorm(config.groups, config.norm_epsilon, name="norm_out")(h)
        h = Conv3x3(p * p * config.channels, dtype, name="conv_out")(h)
        h = rearrange(h, "b h w (p q c) -> b (h p) (w q) c", p=p, q=p)
        return h.astype(jnp.float32)


def _middle(config, h, keys):
    """Two blocks at the coarsest level, and attention between them; only within a module."""
    width = config.widths[-1]
    h = ResidualBlock(config, width, name="middle_block_0")(h, keys=keys)
    if config.middle_attention:
        h = AttentionBlock(config, name="middle_attention")(h)
    return ResidualBlock(config, width, name="middle_block_1")(h, keys=keys)


@frozen
class AutoencoderNetwork:
    """Encoder and decoder as pure functions of a tree of parameters; hashable by its sizes.

    Parameters: {"encoder": ..., "decoder": ...}.

    Attributes:
      config: sizes.
      inputs: channels that the quantiser takes from the encoder.
      width: channels D that the decoder takes from the quantiser.
      last_layer: where in the parameters the weights of the decoder's last convolution are.
    """

    config: AutoencoderConfig
    inputs: int
    width: int

    last_layer: ClassVar[tuple[str, ...]] = ("decoder", "conv_out", "kernel")

    @property
    def _encoder(self):
        features = self.config.latent_channels or self.width
        return Encoder(self.config, features * self.inputs // self.width, self.inputs)

    @property
    def _decoder(self):
        return Decoder(self.config, self.config.latent_channels or self.width)

    def init(self, key: Key[Array, ""], height: int, width: int) -> dict[str, Any]:
        """Fresh float32 parameters for images of this size."""
        self.check(height, width, self.config.channels)
        encoder_key, decoder_key = jax.random.split(key)
        x = jnp.zeros((1, height, width, self.config.channels))
        z = jnp.zeros((1, *self.latent_shape(height, width)))
        return {
            "encoder": jax.jit(self._encoder.init)(encoder_key, x)["params"],
            "decoder": jax.jit(self._decoder.init)(decoder_key, z)["params"],
        }

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, D) of an image of this size."""
        stride = self.config.stride
        return height // stride, width // stride, self.width

    def check(self, height: int, width: int, channels: int) -> None:
        """Raises a ValueError where images of this size do not fit the network."""
        self.config.check_size(height, width)
        if channels != self.config.channels:
            raise ValueError(
                f"the autoencoder takes {self.config.channels} channels, the images have {channels}"
            )

    def prepare(self, params: dict[str, Any]) -> dict[str, PreparedParams]:
        """What depends only on the parameters, computed once before many evaluations."""
        dtype = jnp.dtype(self.config.dtype)
        return {name: prepare_convolutions(tree, dtype) for name, tree in params.items()}

    def encode(
        self,
        params: dict[str, Any],
        x: Float[Array | np.ndarray, "B height width C"],
        keys: Key[Array, " B"] | None = None,
    ) -> Float32[Array, "B h w inputs"]:
        """Images to what the quantiser reads.

        Args:
          params: of `init`, or of `prepare`.
          x: images in [-1, 1].
          keys: for dropout; None for none.

        Raises:
          ValueError: the images do not fit the network.
        """
        self.check(*x.shape[1:])
        x = jnp.asarray(x)
        return self._encoder.apply(variables(params["encoder"]), x, keys)

    def decode(
        self,
        params: dict[str, Any],
        z: Float[Array, "B h w D"],
        keys: Key[Array, " B"] | None = None,
    ) -> Float32[Array, "B height width C"]:
        """What the quantiser gives to images, about in [-1, 1].

        Raises:
          ValueError: the latents have another width than the decoder takes.
        """
        if z.shape[-1] != self.width:
            raise ValueError(f"the decoder takes {self.width} channels, got {z.shape[-1]}")
        return self._decoder.apply(variables(params["decoder"]), z, keys)
