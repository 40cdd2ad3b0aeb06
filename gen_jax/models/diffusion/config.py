"""Choices of diffusion models, as frozen dataclasses; importing this loads nothing heavy."""

import dataclasses
import math
from typing import Literal

Prediction = Literal["epsilon", "x0", "v"]
Variance = Literal["fixed_small", "fixed_large", "learned"]
Spacing = Literal["leading", "trailing", "linspace"]
Solver = Literal["ddpm", "ddim", "dpm_solver_pp"]


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and what the network predicts; the defaults are those of DDPM."""

    timesteps: int = 1000
    """Steps T of the forward process."""
    schedule: Literal["linear", "cosine"] = "linear"
    """beta linear in t (Ho et al. 2020), or alpha_bar a squared cosine (Nichol & Dhariwal 2021)."""
    beta_start: float = 1e-4
    """First beta of the linear schedule."""
    beta_end: float = 0.02
    """Last beta of the linear schedule."""
    prediction: Prediction = "epsilon"
    """What the network predicts: the noise, the clean image, or v = alpha eps - sigma x0."""
    variance: Variance = "fixed_large"
    """Reverse variance: beta-tilde, beta, or learned between the two in the log domain."""
    bound_weight: float = 0.001
    """Weight of the variational bound in the loss when the variance is learned."""
    label_dropout: float = 0.1
    """Share of labels hidden in training, for classifier-free guidance."""

    def __post_init__(self):
        if self.timesteps < 1:
            raise ValueError(f"timesteps must be at least 1, got {self.timesteps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"need 0 < beta_start <= beta_end < 1, got {self.beta_start}, {self.beta_end}"
            )
        if not 0 <= self.bound_weight < math.inf:
            raise ValueError(f"bound_weight must be finite, not negative, got {self.bound_weight}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be in [0, 1), got {self.label_dropout}")


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """How a trained model is sampled."""

    solver: Solver = "ddpm"
    """Ancestral sampling, DDIM, or DPM-Solver++ (2M)."""
    steps: int = 1000
    """Steps, each one evaluation of the network."""
    spacing: Spacing = "leading"
    """Which of the T time steps are visited."""
    eta: float = 0.0
    """Noise of DDIM: 0 deterministic, 1 the noise of DDPM."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 for none."""
    clip: bool = True
    """Clip the predicted clean image to [-1, 1] in every step."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"sampling needs at least 1 step, got {self.steps}")
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta must be finite, not negative, got {self.eta}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")
