"""The UNet that predicts the noise of a diffusion model.

Ho et al. 2020 (2006.11239), appendix B: residual blocks with group normalisation, self-attention
at chosen resolutions, and a sinusoidal embedding of time that is added in every block. Where we
differ: images may be folded into patches first, and an embedding of the class may be added to that
of time.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int, Key, Num

from gen_jax.config import frozen
from gen_jax.nn.blocks import (
    AttentionBlock,
    PreparedParams,
    ResidualBlock,
    downsample,
    prepare_convolutions,
    variables,
)
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.layers import Conv3x3, GroupNorm, sinusoidal_embedding, uniform_init, zeros_init

__all__ = ["UNetNetwork"]


class UNet(nn.Module):
    """The module behind `UNetNetwork.__call__`; `keys` switches dropout on."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x, t, label=None, keys=None):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        _check_input(config, x, label)
        embedding = self._embed(t, label)
        p = config.patch
        h = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
        h = Conv3x3(config.widths[0], dtype, name="conv_in")(h)
        skips = self._down(h, embedding, keys)
        h = ResidualBlock(config, config.widths[-1], name="middle_block_0")(
            skips[-1], embedding, keys
        )
        h = AttentionBlock(config, name="middle_attention")(h)
        h = ResidualBlock(config, config.widths[-1], name="middle_block_1")(h, embedding, keys)
        h = self._up(h, skips, embedding, keys)
        h = GroupNorm(config.groups, config.norm_epsilon, name="norm_out")(h)
        h = Conv3x3(p * p * config.out_channels, dtype, zeros_init, name="conv_out")(h)
        h = rearrange(h, "b h w (p q c) -> b (h p) (w q) c", p=p, q=p)
        return h.astype(jnp.float32)

    def _down(self, h, embedding, keys):
        """The feature maps on the way down, of which the way up reads the last one first."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        skips = [h]
        for level, width in enumerate(config.widths):
            for i in range(config.blocks):
                name = f"down_{level}_block_{i}"
                h = ResidualBlock(config, width, name=name)(h, embedding, keys)
                if h.shape[1] in config.attention:
                    h = AttentionBlock(config, name=f"down_{level}_attention_{i}")(h)
                skips.append(h)
            if level != len(config.widths) - 1:
                both = config.downsampling == "both"
                h = downsample(width, dtype, both_sides=both, name=f"down_{level}_conv")(h)
                skips.append(h)
        return skips

    def _up(self, h, skips, embedding, keys):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        skips = list(skips)
        for level, width in reversed(list(enumerate(config.widths))):
            for i in range(config.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                name = f"up_{level}_block_{i}"
                h = ResidualBlock(config, width, name=name)(h, embedding, keys)
                if h.shape[1] in config.attention:
                    h = AttentionBlock(config, name=f"up_{level}_attention_{i}")(h)
            if level != 0:
                h = Conv3x3(width, dtype, upsample=True, name=f"up_{level}_conv")(h)
        return h

    def _embed(self, t, label):  # [B], [B] -> [B, 4 x the first width], after SiLU
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width = config.widths[0]

        def dense(name):
            return nn.Dense(4 * width, dtype=dtype, kernel_init=uniform_init, name=name)

        time = sinusoidal_embedding(t, width, shift=config.time_shift, order=config.time_order)
        embedding = dense("time_0")(time)
        embedding = dense("time_1")(nn.silu(embedding))
        if config.classes:
            if config.null_class:
                label = jnp.full(t.shape, -1) if label is None else label
                label = jnp.where(label < 0, config.classes, label)
            entries = config.classes + config.null_class
            table = nn.Embed(entries, 4 * width, dtype=dtype, name="class")
            embedding = embedding + table(label)
        return nn.silu(embedding)


def _check_input(config, x, label):
    if x.shape[-1] != config.channels:
        raise ValueError(f"the network takes {config.channels} channels, got shape {x.shape}")
    if x.shape[1] % config.stride or x.shape[2] % config.stride:
        raise ValueError(
            f"height and width must be multiples of {config.stride} (patch x 2 per level), "
            f"got {x.shape[1]} x {x.shape[2]}"
        )
    if label is not None and not config.classes:
        raise ValueError("a label was given to a network without classes")
    if label is None and config.classes and not config.null_class:
        raise ValueError("a network without null_class needs a label for each image")


@frozen
class UNetNetwork:
    """The UNet as pure functions of a tree of parameters; hashable by its sizes."""

    config: UNetConfig

    def init(self, key: Key[Array, ""], height: int, width: int) -> dict:
        """Fresh float32 parameters for images of this size."""
        x = jnp.zeros((1, height, width, self.config.channels))
        label = jnp.zeros(1, jnp.int32) if self.config.classes else None
        return jax.jit(UNet(self.config).init)(key, x, jnp.zeros((1,)), label)["params"]

    def prepare(self, params: Any) -> PreparedParams:
        """What depends only on the parameters, computed once before many evaluations.

        Weights in the type that is computed with, and transformed weights of 3 x 3 convolutions
        where the platform reads those. The network's output does not change beyond rounding.
        """
        return prepare_convolutions(params, jnp.dtype(self.config.dtype))

    def __call__(
        self,
        params: Any,
        x: Float[Array | np.ndarray, "B height width C"],
        t: Num[Array | np.ndarray, " B"],
        label: Int[Array | np.ndarray, " B"] | None = None,
        keys: Key[Array, " B"] | None = None,
    ) -> Float32[Array, "B height width Cout"]:
        """Predicts from noisy images.

        Args:
          params: of `init`, or of `prepare`.
          x: images; C is `config.channels`, height and width are multiples of `config.stride`.
          t: the time step of each image.
          label: in [0, classes), or -1 for no class; None for no class anywhere. A network without
            `null_class` takes classes alone.
          keys: for dropout; None for none.

        Returns:
          Of `config.out_channels` channels.

        Raises:
          ValueError: the image does not fit the network, a label was given without classes, or none
            where one is needed.
        """
        return UNet(self.config).apply(variables(params), x, t, label, keys)
