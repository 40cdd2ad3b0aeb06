"""What generating all units at once costs, and what each repair gets back, in numbers.

    python -m experiments.multimodality
        Four known distributions over nine bits: two modes, the same behind noise, a Markov chain,
        even parity. For each strategy: sequential evaluations (NFE), the exact gap of a perfect
        network, the gap of the sampler run with exact conditionals, and the gap of a trained
        network. Two CPU cores, no network, under five minutes.

The gap of drawing all positions at once is their total correlation (Huang et al. 2022, 2206.05975);
of drawing them in S groups at random, a sum over the entropy profile (2510.25544); of erase and
repair it is that of a Markov chain. Papers of the strategies: Gu et al. 2018 (1711.02281),
Ghazvininejad et al. 2019 (1904.09324), Chang et al. 2022 (2202.04200), Austin et al. 2021
(2107.03006). What was measured is in docs/results.md.
"""

import dataclasses
import sys

from experiments import common, multimodality_run
from gen_jax.config import TrainConfig
from gen_jax.nn.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, and how much to draw."""

    workdir: str
    """Directory of the figure, the table and the networks."""
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
    train: TrainConfig = TrainConfig()

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
            raise ValueError("model.vocabulary, extra_inputs and memory follow from the sets: "
                             "leave them as they are")  # fmt: skip
        if self.train.clip_norm:
            raise ValueError("train.clip_norm would couple the networks of the sets: set it to 0")


TINY = Config(
    workdir="runs/multimodality",
    train=TrainConfig(
        steps=600, batch=64, learning_rate=3e-3, warmup=50, decay="cosine", final_rate=0.01,
        beta2=0.99, clip_norm=0.0, ema=0.99, ema_warmup=True, log_every=100,
        checkpoint_every=600, keep=1,
    ),
)  # fmt: skip

EXPERIMENT = common.Experiment(
    name="multimodality",
    about="The gap of generating all units at once, and of its repairs, on known distributions.",
    presets={"tiny": TINY},
    commands={"all": multimodality_run.run_all},
)


def main() -> int:
    """Runs the command line; the exit code."""
    return common.main(EXPERIMENT)


if __name__ == "__main__":
    sys.exit(main())
