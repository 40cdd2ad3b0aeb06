"""A run of `training.fit` that takes milliseconds a step, on a command line.

    python toy.py --workdir DIR [--train.steps N ...]

The model is a perceptron that takes noise out of random vectors, or a game of two players who take
turns; the faults are those of the machine around it, and are asked for by options.
"""

import contextlib
import dataclasses
import resource
import sys
import time

import numpy as np
import tyro

from gen_jax import cli
from gen_jax.config import DistributedConfig, TrainConfig, to_dict
from gen_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Config:
    """The run and the faults."""

    workdir: str = "runs/toy"
    """Directory of the run."""
    train: TrainConfig = TrainConfig(
        steps=12, batch=8, learning_rate=1e-2, warmup=0, ema=0.9, log_every=1, checkpoint_every=4
    )
    width: int = 64
    """Hidden units."""
    game: bool = False
    """Train a game instead."""
    pause: float = 0.0
    """Seconds that each batch takes."""
    block_at: int = -1
    """Step whose batch takes a minute."""
    largest_file: int = 0
    """Bytes above which no file can be written; 0 for no limit."""
    distributed: DistributedConfig = DistributedConfig()
    """The processes that train together."""


def train(config):
    """Trains; raises what `training.fit` raises."""
    if config.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (config.largest_file, config.largest_file))
    index, processes = config.distributed.index, config.distributed.processes
    if config.distributed.coordinator:
        from gen_jax import hosts

        hosts.start(config.distributed, f"python toy.py --workdir {config.workdir}")
    workdir = Workdir(config.workdir)
    with workdir.lock() if index == 0 else contextlib.nullcontext():
        if index == 0:
            workdir.write_config(
                to_dict(config),
                ("workdir", "train.", "pause", "block_at", "largest_file", "distributed."),
            )
        from gen_jax import parallel, training
        from gen_jax.trainables import ModelTrainable

        def batch(step):
            time.sleep(60 if step == config.block_at else config.pause)
            generator = np.random.default_rng([config.train.seed, step])
            x = generator.normal(size=(config.train.batch, 16)).astype(np.float32)
            return {"x": np.split(x, processes)[index]}

        perceptron = ModelTrainable(Perceptron(config.width), config.train)
        trainable = make_game() if config.game else perceptron
        training.fit(config.train, trainable, batch, workdir, mesh=parallel.data_mesh())


@dataclasses.dataclass(frozen=True)
class Perceptron:
    """Takes noise out of vectors [B, 16]."""

    width: int

    def init(self, key):
        """Random weights, of NumPy, which has nothing to compile."""
        generator = np.random.default_rng(0)
        return {
            "encode": generator.normal(size=(16, self.width)).astype(np.float32) / 4,
            "bias": np.zeros(self.width, np.float32),
            "decode": generator.normal(size=(self.width, 16)).astype(np.float32) / 8,
        }

    def loss(self, params, batch, keys):
        """The mean squared error."""
        import jax

        noise = jax.vmap(lambda key: jax.random.normal(key, (16,)))(keys)
        hidden = (batch["x"] + noise) @ params["encode"] + params["bias"][None]
        error = ((jax.numpy.tanh(hidden) @ params["decode"] - batch["x"]) ** 2).mean()
        return error, {"loss": error}


def make_game():
    """x [16] minimises and y [16] maximises the mean of sum c x y + x^2 / 20 - y^2 / 20."""
    import jax
    import optax

    from gen_jax.trainables import Alternating, Player

    def loss(sign, params, batch, keys):
        x, y = params["x"], params["y"]
        noise = jax.vmap(lambda key: jax.random.normal(key, (16,)))(keys)
        c = 1 + (batch["x"] + noise) / 10
        value = (c.mean(0) * x * y).sum() + (x**2 - y**2).sum() / 20
        return sign * value, {}

    def init_params(key):
        values = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
        return dict(zip("xy", values, strict=True))

    players = {
        "x": Player(lambda *arguments: loss(1, *arguments), optax.adam(0.02)),
        "y": Player(lambda *arguments: loss(-1, *arguments), optax.sgd(0.1, momentum=0.5)),
    }
    return Alternating(players, init_params, turns=("y", "x"))


def main():
    """Runs the command line; the exit code."""
    return cli.guarded(lambda: train(tyro.cli(Config)))


if __name__ == "__main__":
    sys.exit(main())
