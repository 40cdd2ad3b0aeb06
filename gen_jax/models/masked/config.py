"""Choices of masked models, as frozen dataclasses; importing this loads nothing heavy."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """How a masked model is trained."""

    counts: Literal["uniform", "cosine"] = "uniform"
    """How many of L tokens are hidden: uniform over 1 .. L (Mask-Predict; the loss is then the
    bound of absorbing diffusion), or L cos(pi u / 2), rounded up, u uniform (MaskGIT)."""
