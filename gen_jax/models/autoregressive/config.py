"""Choices of autoregressive models, as frozen dataclasses; importing this loads nothing heavy."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """How the next token is drawn from its distribution; the defaults draw from it as it is."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token (greedy)."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens with this mass (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keep tokens at least this share as probable as the first one (Nguyen et al. 2024)."""

    def __post_init__(self):
        if self.temperature and not 1e-6 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0, or finite and at least 1e-6, got "
                             f"{self.temperature}")  # fmt: skip
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; 1 keeps all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}; 0 keeps all tokens")
