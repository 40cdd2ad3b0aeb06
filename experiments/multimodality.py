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

import sys

from gen_jax import cli
from gen_jax.config import TrainConfig
from gen_jax.tasks.exact.config import ExactConfig

TINY = ExactConfig(
    workdir="runs/multimodality",
    train=TrainConfig(
        steps=600,
        batch=64,
        learning_rate=3e-3,
        warmup=50,
        decay="cosine",
        final_rate=0.01,
        beta2=0.99,
        clip_norm=0.0,
        ema=0.99,
        ema_warmup=True,
        log_every=100,
        checkpoint_every=600,
        keep=1,
    ),
)

EXPERIMENT = cli.Experiment(
    name="multimodality",
    about="The gap of generating all units at once, and of its repairs, on known distributions.",
    presets={"tiny": TINY},
)

if __name__ == "__main__":
    sys.exit(cli.main(EXPERIMENT))
