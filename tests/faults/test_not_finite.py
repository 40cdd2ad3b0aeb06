import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import assert_same_leaves, read_leaves, records, saved_steps

from gen_jax import checkpoint, parallel, training
from gen_jax.config import TrainConfig
from gen_jax.trainables import ModelTrainable
from gen_jax.workdir import Workdir

pytestmark = pytest.mark.long

CONFIG = TrainConfig(
    steps=12,
    batch=8,
    learning_rate=1e-2,
    warmup=0,
    ema=0.9,
    seed=7,
    log_every=1,
    checkpoint_every=1,
    keep=20,
    max_skipped=3,
)


@jax.custom_vjp
def poison_gradient(x, factor):
    """x, whose gradient is multiplied by the factor."""
    del factor
    return x


poison_gradient.defvjp(
    lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor))
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A vector of three, whose loss and gradient a batch can poison."""

    def init(self, key):
        return {"w": jnp.ones(3)}

    def loss(self, params, batch, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        w = poison_gradient(params["w"], batch["gradient"].max())
        value = ((w[None] * (batch["x"] + noise)) ** 2).mean() + batch["loss"].mean()
        return value, {"loss": value}


def train(workdir, poison, config=CONFIG, kind="loss", value=np.nan):
    """Trains with these steps poisoned, in one example on the last device.

    A step is called by its number after the update.
    """

    def batch(step):
        rows = {
            "x": np.random.default_rng(step).normal(size=(config.batch, 3)).astype(np.float32),
            "loss": np.zeros(config.batch, np.float32),
            "gradient": np.ones(config.batch, np.float32),
        }
        if step + 1 in poison:
            rows[kind][-1] = value
        return rows

    trainable = ModelTrainable(Model(), config)
    return training.fit(config, trainable, batch, workdir, mesh=parallel.data_mesh())


@pytest.fixture
def workdir(tmp_path):
    return Workdir(tmp_path / "a run")


def learned(leaves):
    return {name: value for name, value in leaves.items() if not name.startswith("loop.")}


# What is poisoned, by which value, and which metric then says so.
POISONS = [
    ("loss", np.nan, "loss"),
    ("loss", np.inf, "loss"),
    ("gradient", np.inf, "gradient_norm"),
]


@pytest.mark.parametrize(("kind", "value", "metric"), POISONS)
def test_a_few_updates_are_skipped_and_change_nothing(workdir, capsys, kind, value, metric):
    trained = train(workdir, {4, 5, 6}, kind=kind, value=value)
    assert trained.step == 12
    assert int(trained.state.skipped) == 0

    before = learned(read_leaves(workdir.path, 3))
    for count, step in enumerate((4, 5, 6), start=1):
        leaves = read_leaves(workdir.path, step)
        assert leaves["loop.step"] == step
        assert leaves["loop.skipped"] == count
        after = learned(leaves)
        assert after.keys() == before.keys()
        for name, leaf in after.items():
            assert leaf.tobytes() == before[name].tobytes(), name
    healthy = read_leaves(workdir.path, 7)
    assert healthy["loop.skipped"] == 0
    assert (healthy["state.params.w"] != before["state.params.w"]).all()
    assert (healthy["ema.w"] != before["ema.w"]).all()

    skipped = [record["skipped"] for record in records(workdir.path)]
    assert skipped == [0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 0, 0]
    messages = capsys.readouterr().err.splitlines()
    assert messages == [
        f"step {step}: {metric} not finite, update skipped ({count} in a row, seed 7)"
        for count, step in enumerate((4, 5, 6), start=1)
    ]


@pytest.mark.parametrize(("kind", "value", "metric"), POISONS)
def test_one_more_stops_and_leaves_finite_parameters(workdir, kind, value, metric):
    with pytest.raises(training.NotFinite) as caught:
        train(workdir, {4, 5, 6, 7}, kind=kind, value=value)
    message = str(caught.value)
    assert "4 steps in a row, up to step 7 of seed 7" in message
    assert f"(the last in {metric})" in message
    assert str(workdir.checkpoints) in message
    assert "\n" not in message
    assert saved_steps(workdir.path) == [1, 2, 3, 4, 5, 6]
    for step in saved_steps(workdir.path):
        leaves = read_leaves(workdir.path, step)
        assert all(np.isfinite(leaf).all() for leaf in leaves.values())
    last, good = read_leaves(workdir.path, 6), read_leaves(workdir.path, 3)
    assert last["state.params.w"].tobytes() == good["state.params.w"].tobytes()


def test_the_count_is_of_steps_in_a_row(workdir):
    trained = train(workdir, {1, 2, 3, 5, 6, 7, 9, 10, 11})
    assert trained.step == 12


def test_the_count_survives_a_resume(workdir):
    """Stopping and resuming does not buy more steps that are not finite."""
    half = dataclasses.replace(CONFIG, steps=5)
    train(workdir, {4, 5, 6, 7}, half)
    with pytest.raises(training.NotFinite, match="4 steps in a row, up to step 7"):
        train(workdir, {4, 5, 6, 7})


def test_a_skipped_step_is_skipped_again_after_a_resume(workdir, tmp_path):
    whole = Workdir(tmp_path / "whole")
    train(whole, {4, 5})
    train(workdir, {4, 5}, dataclasses.replace(CONFIG, steps=4))
    train(workdir, {4, 5})
    assert_same_leaves(read_leaves(workdir.path), read_leaves(whole.path))


@pytest.mark.parametrize("every", [5, 50])
def test_the_last_steps_are_watched_too(workdir, every):
    """The metrics of a step are read one step late; those of the last steps must not be lost."""
    config = dataclasses.replace(CONFIG, checkpoint_every=every, max_skipped=0)
    with pytest.raises(training.NotFinite, match="up to step 12 of seed 7") as caught:
        train(workdir, {12}, config)
    assert saved_steps(workdir.path) == [step for step in (5, 10) if step % every == 0]
    left = "holds the last finite parameters" if every == 5 else "is still empty"
    assert f"{workdir.checkpoints} {left}" in str(caught.value)


def test_none_may_be_skipped(workdir):
    config = dataclasses.replace(CONFIG, max_skipped=0)
    with pytest.raises(training.NotFinite, match="1 steps in a row, up to step 3"):
        train(workdir, {3}, config)
    assert saved_steps(workdir.path) == [1, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path, value):
    trees = {"params": {"w": np.ones(3, np.float32)}, "ema": {"w": np.ones(3, np.float32)}}
    checkpoint.save(tmp_path / "c", 1, trees, {}, keep=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trees["ema"]["w"][1] = value
    for step in (1, 2):
        with pytest.raises(FloatingPointError, match=rf"step {step} not saved: ema\.w"):
            checkpoint.save(tmp_path / "c", step, trees, {}, keep=1)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_a_bfloat16_leaf_is_checked_too(tmp_path):
    """Its type is no NumPy type of its own."""
    tree = {"w": jnp.array([1, jnp.nan], jnp.bfloat16)}
    with pytest.raises(FloatingPointError, match=r"params\.w is not finite"):
        checkpoint.save(tmp_path / "c", 1, {"params": tree}, {}, keep=1)
    assert checkpoint.steps(tmp_path / "c") == []
