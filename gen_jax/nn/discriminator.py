"""The discriminator of patches of pix2pix, which VQGAN trains its decoder against.

Isola et al. 2017 (1611.07004, section 3.2 and appendix 6.1.2); Esser et al. 2021 (2012.09841).

    [conv 4 x 4, stride 2; norm but in the first; LeakyReLU 0.2] x layers
    conv 4 x 4, stride 1; norm; LeakyReLU 0.2; conv 4 x 4, stride 1, to one logit

Where we differ: the normalisation is over groups of channels of one image (Wu & He 2018,
1803.08494), where the papers normalise over the batch. Statistics of a batch would make logits of
an image depend on the others, and on how a batch is cut over devices, and would be a state of
their own beside the parameters. Convolutions have a bias everywhere, as in the original with any
norm but that of the batch; biases are zero and scales one at first.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key

from gen_jax.config import frozen
from gen_jax.nn.config import DiscriminatorConfig
from gen_jax.nn.layers import GroupNorm

__all__ = ["PatchDiscriminator"]

_EPSILON = 1e-5  # added to the variance, as in the original
_SLOPE = 0.2


class Discriminator(nn.Module):
    """Images to a map of logits."""

    config: DiscriminatorConfig

    @nn.compact
    def __call__(self, x):  # [B, height, width, C] -> [B, h, w]
        config, h = self.config, x
        for i, width in enumerate(config.widths):
            h = self._convolution(width, 2 if i < config.layers else 1, f"conv_{i}")(h)
            if i > 0:
                h = GroupNorm(config.groups, _EPSILON, silu=False, name=f"norm_{i}")(h)
            h = nn.leaky_relu(h, _SLOPE)
        return self._convolution(1, 1, "logits")(h)[..., 0].astype(jnp.float32)

    def _convolution(self, width, stride, name):
        return nn.Conv(
            width,
            (4, 4),
            strides=stride,
            padding=[(1, 1)] * 2,
            dtype=jnp.dtype(self.config.dtype),
            kernel_init=nn.initializers.normal(0.02),
            name=name,
        )


@frozen
class PatchDiscriminator:
    """The discriminator as pure functions of a tree of parameters; hashable by its sizes.

    Attributes:
      config: sizes.
    """

    config: DiscriminatorConfig

    def init(self, key: Key[Array, ""], height: int, width: int, channels: int) -> dict[str, Any]:
        """Fresh float32 parameters for images of this size.

        Raises:
          ValueError: the images are too small.
        """
        self.config.logits_shape(height, width)
        x = jnp.zeros((1, height, width, channels))
        return jax.jit(Discriminator(self.config).init)(key, x)["params"]

    def __call__(
        self, params: dict[str, Any], x: Float[Array | np.ndarray, "B height width C"]
    ) -> Float32[Array, "B h w"]:
        """The logits that patches of the images are real, one for each of h x w patches.

        Args:
          params: of `init`.
          x: images, about in [-1, 1].

        Raises:
          ValueError: the images are too small.
        """
        self.config.logits_shape(*x.shape[1:3])
        return Discriminator(self.config).apply({"params": params}, jnp.asarray(x))
