"""Layers that the networks share, with channels last."""

import zlib
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key, Num

import kernels
from kernels.threefry import fold_in_each, uniform_each

__all__ = [
    "Conv3x3",
    "Dropout",
    "GroupNorm",
    "sinusoidal_embedding",
    "uniform_init",
    "zeros_init",
]

# The initialisation of Ho et al. 2020; with `zeros_init` a residual branch is closed at first.
uniform_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
zeros_init = nn.initializers.zeros_init()


def sinusoidal_embedding(
    t: Num[Array | np.ndarray, " B"],
    width: int,
    *,
    shift: float = 1.0,
    order: Literal["sin_cos", "cos_sin"] = "sin_cos",
) -> Float32[Array, "B D"]:
    """Sines and cosines of t at geometric frequencies 1e4 ** (-i / (D / 2 - shift)), i < D / 2.

    With a shift of 1 they go from 1 to 1e-4 (Ho et al. 2020); with 0 the last one is a step above
    1e-4 (Vaswani et al. 2017).

    Args:
      t: positions or time steps.
      width: the size D of the embedding.
      shift: below D / 2.
      order: whether all sines or all cosines come first.

    Raises:
      ValueError: the width is odd or below 4, or the shift is not below its half.
    """
    if width < 4 or width % 2:
        raise ValueError(f"the width of an embedding must be even and at least 4, got {width}")
    half = width // 2
    if shift >= half:
        raise ValueError(f"the shift must be below half of the width, {half}, got {shift}")
    frequencies = jnp.exp(-jnp.log(1e4) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = jnp.asarray(t, jnp.float32)[:, None] * frequencies[None]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts if order == "sin_cos" else parts[::-1], axis=-1)


class Conv3x3(nn.Module):
    """A 3 x 3 convolution that keeps the size of the feature map, or doubles it.

    Where the collection "prepared" holds its transformed weights, they may be read instead.

    Attributes:
      features: the number of channels of the output.
      dtype: of the product.
      kernel_init: of the weights; the bias is zero at first.
      upsample: whether the map is first enlarged by two, by its nearest neighbours.
    """

    features: int
    dtype: np.dtype
    kernel_init: Callable = uniform_init
    upsample: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B height width C"]) -> Float[Array, "B _ _ features"]:
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x, kernel, bias = x.astype(self.dtype), kernel.astype(self.dtype), bias.astype(self.dtype)
        if self.upsample:
            y = kernels.upsample_conv_3x3(x, kernel)
        else:
            y = kernels.conv_3x3(x, kernel, self.get_variable("prepared", "kernel"))
        return y + bias[None, None, None]


class GroupNorm(nn.Module):
    """Group normalisation, followed by SiLU.

    Attributes:
      groups: the number of groups, which divides the channels.
      epsilon: added to the variance.
      silu: whether SiLU follows.
    """

    groups: int
    epsilon: float | int
    silu: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B ... C"]) -> Float[Array, "B ... C"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        return kernels.group_norm_silu(
            x, scale, bias, groups=self.groups, epsilon=self.epsilon, silu=self.silu
        )


class Dropout(nn.Module):
    """Dropout whose mask for sample i depends only on the key of sample i.

    The mask does not change with the batch size or the number of devices. Layers have different
    masks: a hash of the layer's path in the network joins the key.

    Attributes:
      rate: the share of values that are set to zero, in [0, 1).
    """

    rate: float | int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B ..."], keys: Key[Array, " B"] | None
    ) -> Float[Array, "B ..."]:
        if keys is None or self.rate == 0:
            return x
        layer = zlib.crc32("/".join(self.path).encode())
        kept = uniform_each(fold_in_each(keys, layer), x.shape[1:]) < 1 - self.rate
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)
