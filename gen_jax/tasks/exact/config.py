"""The configuration of the exact comparison of strategies; importing this loads no jax."""

from gen_jax.config import RunConfig, frozen
from gen_jax.nn.config import TransformerConfig

__all__ = ["ExactConfig"]


@frozen
class ExactConfig(RunConfig):
    """What to train on known distributions, and how much to draw."""

    length: int = 9
    """Positions L of the four sets: 2**m + 1, so that there are dyadic midpoints; at most 9."""
    noise: float = 0.2
    """Of the modes behind noise."""
    stay: float = 0.9
    """Probability that the Markov chain keeps its state."""
    samples: int = 10_000
    """Samples of each sampler, with exact conditionals."""
    network_samples: int = 4000
    """Samples of each sampler, with a trained network."""
    orders: int = 8
    """Random orders that the gap of a trained network is averaged over."""
    codes: int = 2
    """Codes of the latent of the trained decoder."""
    seed: int = 0
    """Of the samples."""
    model: TransformerConfig = TransformerConfig(layers=2, width=32, heads=4, mlp_dim=128)

    task = "exact"
    make_task = "gen_jax.tasks.exact.task:make"
    commands = ("train", "evaluate")
    resumable = (*RunConfig.resumable, "samples", "network_samples", "orders", "seed")

    def __post_init__(self):
        if self.length not in (3, 5, 9):
            raise ValueError(f"length must be 3, 5 or 9, got {self.length}")
        if not 0 < self.noise < 1 or not 0 < self.stay < 1:
            raise ValueError(f"noise and stay must be in (0, 1), got {self.noise}, {self.stay}")
        if min(self.samples, self.network_samples) < 100 or self.orders < 2 or self.codes < 2:
            raise ValueError("need at least 100 samples, 2 orders and 2 codes")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
        if self.model.vocabulary or self.model.extra_inputs or self.model.memory:
            raise ValueError(
                "model.vocabulary, extra_inputs and memory follow from the sets: leave them as "
                "they are"
            )
        if self.train.optimizer != "adam":
            raise ValueError(
                "the networks of the sets are stacked and have no matrices of their own: leave "
                "train.optimizer at adam"
            )
        if self.train.clip_norm:
            raise ValueError("train.clip_norm would couple the networks of the sets: set it to 0")
