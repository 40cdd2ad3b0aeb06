"""A run of `training.fit` that takes milliseconds a step, on the command line of an experiment.

    python toy.py --workdir DIR [--train.steps N ...]

The model is a perceptron that takes noise out of random vectors; the faults are those of the
machine around it, and are asked for by options.
"""

import dataclasses
import resource
import sys
import time

import numpy as np

from experiments import common
from gen_jax.config import TrainConfig, to_dict
from gen_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Config:
    """The run and the faults."""

    workdir: str
    """Directory of the run."""
    train: TrainConfig = TrainConfig(
        steps=12, batch=8, learning_rate=1e-2, warmup=0, ema=0.9, log_every=1, checkpoint_every=4
    )
    width: int = 64
    """Hidden units."""
    pause: float = 0.0
    """Seconds that each batch takes."""
    block_at: int = -1
    """Step whose batch takes a minute."""
    largest_file: int = 0
    """Bytes above which no file can be written; 0 for no limit."""


def train(config):
    """Trains; raises what `training.fit` raises."""
    if config.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (config.largest_file, config.largest_file))
    workdir = Workdir(config.workdir)
    with workdir.lock():
        workdir.write_config(
            to_dict(config), ("workdir", "train.", "pause", "block_at", "largest_file")
        )
        import jax

        from gen_jax import parallel, training

        def batch(step):
            time.sleep(60 if step == config.block_at else config.pause)
            generator = np.random.default_rng([config.train.seed, step])
            return {"x": generator.normal(size=(config.train.batch, 16)).astype(np.float32)}

        def loss(params, batch, keys):
            noise = jax.vmap(lambda key: jax.random.normal(key, (16,)))(keys)
            hidden = jax.numpy.tanh((batch["x"] + noise) @ params["encode"] + params["bias"])
            error = ((hidden @ params["decode"] - batch["x"]) ** 2).mean()
            return error, {"loss": error}

        generator = np.random.default_rng(config.train.seed)
        params = {
            "encode": generator.normal(size=(16, config.width)).astype(np.float32) / 4,
            "bias": np.zeros(config.width, np.float32),
            "decode": generator.normal(size=(config.width, 16)).astype(np.float32) / 8,
        }
        try:
            training.fit(config.train, loss, params, batch, workdir, mesh=parallel.data_mesh())
        except training.Interrupted as stop:
            print(f"{stop}; saved", file=sys.stderr)
            raise SystemExit(128 + stop.signum) from None


EXPERIMENT = common.Experiment(
    name="toy",
    about="A toy.",
    presets={"toy": Config(workdir="runs/toy")},
    commands={"train": train},
)

if __name__ == "__main__":
    sys.exit(common.main(EXPERIMENT))
