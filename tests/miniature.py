"""What the tests of tasks share: how little is trained, and how the files of a run are read."""

import json

import numpy as np

from gen_jax.config import TrainConfig

__all__ = ["TRAIN", "arrays", "summary"]

# Two steps with all that a run leaves on the way.
TRAIN = TrainConfig(
    steps=2,
    batch=8,
    learning_rate=1e-2,
    warmup=0,
    log_every=1,
    checkpoint_every=2,
    evaluate_every=2,
    preview_every=2,
    preview=5,
    ema=0.5,
)


def summary(workdir) -> dict:
    """The figures in summary.json."""
    return json.loads((workdir / "summary.json").read_text())


def arrays(workdir) -> dict:
    """The arrays in samples.npz."""
    with np.load(workdir / "samples.npz") as file:
        return dict(file)
