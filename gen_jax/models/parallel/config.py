"""Choices of parallel decoders, as frozen dataclasses; importing this loads nothing heavy."""

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """The vector that all positions of a parallel decoder share."""

    kind: Literal["none", "gaussian", "categorical"] = "none"
    """No latent; a Gaussian vector (Kingma & Welling 2014); or one of a few codes."""
    size: int = 8
    """Dimensions of the Gaussian, or number of codes."""
    layers: int = 1
    """Blocks of the network of the posterior."""
    free_nats: float = 0.0
    """Divergence of the posterior from the prior that is not punished (Kingma et al. 2016)."""

    def __post_init__(self):
        if self.size < 1 or self.layers < 1:
            raise ValueError("size and layers of the latent must be at least 1")
        if not 0 <= self.free_nats < math.inf:
            raise ValueError(f"free_nats must be finite, not negative, got {self.free_nats}")
