"""The configuration of a diffusion process; importing this loads nothing heavy."""

from typing import Literal

from gen_jax.config import frozen

__all__ = ["DiffusionConfig", "Prediction", "Variance"]

Prediction = Literal["epsilon", "x0", "v"]
Variance = Literal["fixed_small", "fixed_large", "learned"]


@frozen
class DiffusionConfig:
    """The forward process and what the network predicts; the defaults are those of DDPM."""

    timesteps: int = 1000
    """Steps T of the forward process."""
    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"
    """beta linear in t (Ho et al. 2020), its root linear in t (Rombach et al. 2022), or alpha_bar a
    squared cosine (Nichol & Dhariwal 2021)."""
    beta_start: float = 1e-4
    """First beta of the linear schedules."""
    beta_end: float = 0.02
    """Last beta of the linear schedules."""
    prediction: Prediction = "epsilon"
    """What the network predicts: the noise, the clean image, or v = alpha eps - sigma x0."""
    variance: Variance = "fixed_large"
    """Reverse variance: beta-tilde, beta, or learned between the two in the log domain."""
    time_shift: float = 1.0
    """Training draws t / T = s u / (1 + (s - 1) u) with u uniform (Esser et al. 2024, 2403.03206,
    equation 23): above 1 more of the noisy steps, where the layout of an image is decided."""
    reference: int = 0
    """At most so many further images of the training set, drawn for every step, by which the clean
    image in the target becomes its mean given x_t (stable targets, Xu et al. 2023, 2302.00670); 0
    for the image alone. There are as many as the set has and as divide over the devices."""
    vlb_weight: float = 0.001
    """Weight of the variational lower bound in the loss when the variance is learned."""
    label_dropout: float = 0.1
    """Share of labels hidden in training, for classifier-free guidance."""

    def __post_init__(self):
        if self.timesteps < 1:
            raise ValueError(f"timesteps must be at least 1, got {self.timesteps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"need 0 < beta_start <= beta_end < 1, got {self.beta_start}, {self.beta_end}"
            )
        if self.time_shift <= 0:
            raise ValueError(f"time_shift must be positive, got {self.time_shift}")
        if self.variance == "learned" and self.time_shift != 1:
            raise ValueError(
                "time_shift must be 1 where the variance is learned: its bound needs uniform times"
            )
        if self.reference < 0:
            raise ValueError(f"reference must not be negative, got {self.reference}")
        if self.vlb_weight < 0:
            raise ValueError(f"vlb_weight must not be negative, got {self.vlb_weight}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be in [0, 1), got {self.label_dropout}")
