"""Blocks that networks of images share, with channels last, and what a loop prepares of them.

The residual block and the attention are those of DDPM (Ho et al. 2020, appendix B), which the
autoencoders of VQGAN and latent diffusion took over without the embedding of time.
"""

from typing import Any, no_type_check

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from einops import rearrange

import kernels
from gen_jax.nn.attention import dot_product_attention
from gen_jax.nn.config import AutoencoderConfig, UNetConfig
from gen_jax.nn.layers import Conv3x3, Dropout, GroupNorm, uniform_init, zeros_init

__all__ = [
    "AttentionBlock",
    "PreparedParams",
    "ResidualBlock",
    "downsample",
    "prepare_convolutions",
    "variables",
]


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut; where there is an embedding of time, it is added between.

    Attributes:
      config: `groups`, `norm_epsilon`, `dropout` and `dtype` of the network.
      width: channels of the output.
    """

    config: UNetConfig | AutoencoderConfig
    width: int

    @nn.compact
    def __call__(self, x, embedding=None, keys=None):  # [B, h, w, C] -> [B, h, w, self.width]
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        h = GroupNorm(config.groups, config.norm_epsilon, name="norm_0")(x)
        h = Conv3x3(self.width, dtype, name="conv_0")(h)
        if embedding is not None:
            time = nn.Dense(self.width, dtype=dtype, kernel_init=uniform_init, name="time")
            h = h + time(embedding)[:, None, None, :]
        h = GroupNorm(config.groups, config.norm_epsilon, name="norm_1")(h)
        h = Dropout(config.dropout, name="dropout")(h, keys)
        h = Conv3x3(self.width, dtype, zeros_init, name="conv_1")(h)
        if x.shape[-1] != self.width:
            x = nn.Dense(self.width, dtype=dtype, kernel_init=uniform_init, name="shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, added to it.

    Attributes:
      config: `groups`, `norm_epsilon`, `head_width` and `dtype` of the network.
    """

    config: UNetConfig | AutoencoderConfig

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
        h = dot_product_attention(q, k, v)
        h = rearrange(h, "b l n d -> b l (n d)")
        h = nn.Dense(channels, dtype=dtype, kernel_init=zeros_init, name="project")(h)
        return x + h.reshape(x.shape)


def downsample(width: int, dtype: np.dtype, *, both_sides: bool, name: str) -> nn.Conv:
    """A 3 x 3 convolution of stride 2, padded at both sides of each axis or at its end alone."""
    return nn.Conv(
        width,
        (3, 3),
        strides=2,
        padding=[(int(both_sides), 1)] * 2,
        dtype=dtype,
        kernel_init=uniform_init,
        name=name,
    )


@no_type_check  # jax also makes trees of this class whose leaves are no arrays
@flax.struct.dataclass
class PreparedParams:
    """Parameters of a network in the form that the loop of a sampler reads.

    Attributes:
      params: in the type that is computed with.
      prepared: transformed weights of 3 x 3 convolutions, which are read instead of some of them.
    """

    params: Any
    prepared: Any


def prepare_convolutions(params: Any, dtype: np.dtype) -> PreparedParams:
    """Weights in the type that is computed with, and transformed where the platform reads those.

    Normalisation stays in float32. Modules named conv_... are convolutions of stride 1.
    """
    flat, prepared = flax.traverse_util.flatten_dict(params), {}
    for path, leaf in flat.items():
        if not path[-2].startswith("norm"):
            flat[path] = leaf.astype(dtype)
        if path[-2].startswith("conv_") and path[-1] == "kernel":
            transformed = kernels.prepare_conv_3x3(flat[path])
            if transformed is not None:
                prepared[path] = transformed
    unflatten = flax.traverse_util.unflatten_dict
    return PreparedParams(unflatten(flat), unflatten(prepared))


def variables(params: Any) -> dict[str, Any]:
    """What `apply` of a module takes, from parameters or prepared ones."""
    if isinstance(params, PreparedParams):
        return {"params": params.params, "prepared": params.prepared}
    return {"params": params}
