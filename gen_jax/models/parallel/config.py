"""Choices of parallel decoders, as frozen dataclasses; importing this loads nothing heavy."""

from typing import ClassVar, Literal

from gen_jax.config import Choice, frozen
from gen_jax.models.options import check_temperature

__all__ = ["CTCOptions", "LatentConfig", "OneShotOptions", "ParallelOptions"]


class ParallelOptions(Choice):
    """The choice of how a parallel decoder is sampled, where it is not decoded in rounds."""


@frozen
class OneShotOptions(ParallelOptions):
    """One evaluation at all positions, each of which is drawn from its own distribution."""

    name: ClassVar[str] = "one_shot"

    temperature: float = 0.0
    """The logits are divided by it; 0 takes the most probable tokens."""

    def __post_init__(self):
        check_temperature("temperature", self.temperature)


@frozen
class CTCOptions(ParallelOptions):
    """The most probable alignment of connectionist temporal classification."""

    name: ClassVar[str] = "ctc"


@frozen
class LatentConfig:
    """The vector that all positions of a parallel decoder share."""

    kind: Literal["none", "gaussian", "categorical"] = "none"
    """No latent; a Gaussian vector (Kingma & Welling 2014); or one of a few codes."""
    size: int = 8
    """Dimensions of the Gaussian, or number of codes K."""
    layers: int = 1
    """Blocks of the network of the posterior."""
    free_nats: float = 0.0
    """KL of the posterior from the prior that is not punished (Kingma et al. 2016)."""

    def __post_init__(self):
        if self.size < 1 or self.layers < 1:
            raise ValueError("size and layers of the latent must be at least 1")
        if self.free_nats < 0:
            raise ValueError(f"free_nats must not be negative, got {self.free_nats}")
