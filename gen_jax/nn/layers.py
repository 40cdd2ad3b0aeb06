"""Layers that the networks share, channels last."""

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp

import kernels

# Variance scaling of Ho et al. 2020; `zeros` closes each residual branch at the start.
uniform_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
zeros_init = nn.initializers.zeros_init()


def sinusoidal_embedding(t: jax.Array, width: int) -> jax.Array:
    """Sines and cosines of t at geometric frequencies from 1 to 1e-4 (Vaswani et al. 2017).

    Args:
      t: [B], any numeric dtype.
      width: even size of the embedding, at least 4.

    Returns:
      [B, width] float32, all sines first.
    """
    half = width // 2
    frequencies = jnp.exp(-jnp.log(1e4) * jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Conv3x3(nn.Module):
    """A 3 x 3 convolution that keeps the size of the feature map.

    Where the collection "prepared" holds its transformed weights, they may be read instead.
    """

    features: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = uniform_init

    @nn.compact
    def __call__(self, x):  # [B, H, W, C] -> [B, H, W, features]
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        prepared = self.get_variable("prepared", "kernel")
        x, kernel, bias = x.astype(self.dtype), kernel.astype(self.dtype), bias.astype(self.dtype)
        return kernels.conv_3x3(x, kernel, prepared) + bias


class GroupNorm(nn.Module):
    """Group normalisation, with SiLU unless told otherwise."""

    groups: int
    epsilon: float
    silu: bool = True

    @nn.compact
    def __call__(self, x):  # [B, ..., C] -> [B, ..., C]
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        return kernels.group_norm_silu(
            x, scale, bias, groups=self.groups, epsilon=self.epsilon, silu=self.silu
        )


class Dropout(nn.Module):
    """Dropout whose mask for sample i depends on the key of sample i alone.

    The mask does not change with the batch size or the number of devices. Layers tell their
    masks apart by a hash of their path in the network.
    """

    rate: float

    @nn.compact
    def __call__(self, x, keys):  # [B, ...], [B] keys or None -> [B, ...]
        if keys is None or self.rate == 0:
            return x
        layer = zlib.crc32("/".join(self.path).encode())

        def mask(key):
            key = jax.random.fold_in(key, layer)
            return jax.random.bernoulli(key, 1 - self.rate, x.shape[1:])

        return jnp.where(jax.vmap(mask)(keys), x / (1 - self.rate), 0).astype(x.dtype)
