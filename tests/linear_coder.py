"""An encoder and a decoder of one matrix each, which compile in no time."""

import jax
from einops import rearrange

from gen_jax.config import frozen

__all__ = ["LinearCoder"]


@frozen
class LinearCoder:
    """Squares of 2 x 2 pixels times a matrix, and back; see `models.vq.CodingNetwork`."""

    inputs: int
    width: int

    last_layer = ("decoder",)

    def init(self, key, height, width):
        encoder, decoder = jax.random.split(key)
        return {
            "encoder": jax.random.normal(encoder, (12, self.inputs)) / 4,
            "decoder": jax.random.normal(decoder, (self.width, 12)) / 4,
        }

    def check(self, height, width, channels):
        assert channels == 3

    def latent_shape(self, height, width):
        return height // 2, width // 2, self.width

    def encode(self, params, x, keys=None):
        return rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=2, q=2) @ params["encoder"]

    def decode(self, params, z, keys=None):
        return rearrange(z @ params["decoder"], "b h w (p q c) -> b (h p) (w q) c", p=2, q=2)
