"""The UNet that predicts the noise of a diffusion model.

Ho et al. 2020 (2006.11239), appendix B: residual blocks with group normalisation, self-attention
at chosen resolutions, and a sinusoidal embedding of time that is added in every block. Where we
differ: images may be folded into patches first, and an embedding of the class may be added to that
of time.
"""

from typing import Any, no_type_check

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int, Key, Num

import kernels
from gen_jax.config import frozen
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.layers import (
    Conv3x3,
    Dropout,
    GroupNorm,
    sinusoidal_embedding,
    uniform_init,
    zeros_init,
)

__all__ = ["PreparedParams", "UNetNetwork"]


class ResidualBlock(nn.Module):
    """Two convolutions, with the embedding of time between them, and a shortcut."""

    config: UNetConfig
    width: int

    @nn.compact
    def __call__(self, x, embedding, keys):  # [B, height, width, C] -> [.., C of `self.width`]
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        h = GroupNorm(config.groups, config.norm_epsilon, name="norm_0")(x)
        h = Conv3x3(self.width, dtype, name="conv_0")(h)
        shift = nn.Dense(self.width, dtype=dtype, kernel_init=uniform_init, name="time")(embedding)
        h = h + shift[:, None, None, :]
        h = GroupNorm(config.groups, config.norm_epsilon, name="norm_1")(h)
        h = Dropout(config.dropout, name="dropout")(h, keys)
        h = Conv3x3(self.width, dtype, zeros_init, name="conv_1")(h)
        if x.shape[-1] != self.width:
            x = nn.Dense(self.width, dtype=dtype, kernel_init=uniform_init, name="shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, added to it."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x):  # [B, height, width, C] -> the same
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        channels = x.shape[-1]
        heads = channels // config.head_width if config.head_width else 1
        h = GroupNorm(config.groups, config.norm_epsilon, silu=False, name="norm")(x)
        h = rearrange(h, "b h w c -> b (h w) c")
        qkv = nn.Dense(3 * channels, dtype=dtype, kernel_init=uniform_init, name="qkv")(h)
        # Parts of the last axis: with the parts in front, the gradient would be transposed.
        parts = jnp.split(qkv, 3, axis=-1)
        q, k, v = (rearrange(part, "b l (n d) -> b l n d", n=heads) for part in parts)
        logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * (channels // heads) ** -0.5, axis=-1).astype(dtype)
        h = jnp.einsum("bnqk,bknd->bqnd", weights, v)
        h = rearrange(h, "b l n d -> b l (n d)")
        h = nn.Dense(channels, dtype=dtype, kernel_init=zeros_init, name="project")(h)
        return x + h.reshape(x.shape)


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
                halve = nn.Conv(
                    width,
                    (3, 3),
                    strides=2,
                    padding=[(int(config.downsampling == "both"), 1)] * 2,
                    dtype=dtype,
                    kernel_init=uniform_init,
                    name=f"down_{level}_conv",
                )
                h = halve(h)
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


@no_type_check  # jax also makes trees of this class whose leaves are no arrays
@flax.struct.dataclass
class PreparedParams:
    """Parameters of a UNet in the form that the loop of a sampler reads.

    Attributes:
      params: in the type that is computed with.
      prepared: transformed weights of 3 x 3 convolutions, which are read instead of some of them.
    """

    params: Any
    prepared: Any


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
        dtype = jnp.dtype(self.config.dtype)
        flat, prepared = flax.traverse_util.flatten_dict(params), {}
        for path, leaf in flat.items():
            if not path[-2].startswith("norm"):  # normalisation stays in float32
                flat[path] = leaf.astype(dtype)
            if path[-2].startswith("conv_") and path[-1] == "kernel":
                transformed = kernels.prepare_conv_3x3(flat[path])
                if transformed is not None:
                    prepared[path] = transformed
        unflatten = flax.traverse_util.unflatten_dict
        return PreparedParams(unflatten(flat), unflatten(prepared))

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
        variables = {"params": params}
        if isinstance(params, PreparedParams):
            variables = {"params": params.params, "prepared": params.prepared}
        return UNet(self.config).apply(variables, x, t, label, keys)
