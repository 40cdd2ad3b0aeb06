"""The configuration of one-shot decoders of pixels with a latent; importing this loads no jax."""

from gen_jax.config import frozen
from gen_jax.models.parallel.config import LatentConfig, OneShotOptions
from gen_jax.nn.config import TransformerConfig
from gen_jax.tasks.masked_pixels.config import EvaluateConfig
from gen_jax.tasks.pixels.config import PixelRunConfig

__all__ = ["LatentPixelsConfig"]


@frozen
class LatentPixelsConfig(PixelRunConfig):
    """A decoder of all tokens of an image at once, from data to samples."""

    model: TransformerConfig = TransformerConfig(causal=False, extra_inputs=1)
    latent: LatentConfig = LatentConfig(kind="gaussian", size=16)
    """What all tokens share; kind none for tokens that know nothing of each other."""
    sampler: OneShotOptions = OneShotOptions(temperature=1.0)
    """How tokens are drawn, given the latent."""
    evaluate: EvaluateConfig = EvaluateConfig()

    task = "latent_pixels"
    make_task = "gen_jax.tasks.latent_pixels.task:make"
    extra_input = "the mask"
    causal = False
    class_inputs = 1

    def __post_init__(self):
        super().__post_init__()
        if self.conditional:
            raise ValueError("one-shot decoders of pixels have no classes: leave conditional off")
