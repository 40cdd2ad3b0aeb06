"""The training loop against closed forms, and its laws over devices, slices and resumes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from gen_jax import checkpoint, keys, parallel, training
from gen_jax.config import TrainConfig
from gen_jax.workdir import Workdir

CONFIG = TrainConfig(
    steps=12, batch=16, learning_rate=0.05, warmup=1, ema=0.9, log_every=1, checkpoint_every=6
)
PARAMS = {"w": np.ones((4, 3), np.float32), "b": np.zeros(3, np.float32)}


def loss(params, batch, keys):
    """A linear regression with noise on the targets, drawn from the keys."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    error = batch["x"] @ params["w"] + params["b"] + 0.1 * noise - 1
    value = jnp.square(error).mean()
    return value, {"loss": value}


def batch(step):
    return {"x": np.random.default_rng(step).normal(size=(16, 4)).astype(np.float32)}


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), (parallel.AXIS,))


def fit(path, config=CONFIG, devices=1, **kwargs):
    return training.fit(
        config, loss, PARAMS, batch, Workdir(path), mesh=mesh_of(devices), **kwargs
    ).state  # fmt: skip


def same(a, b, **tolerance):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, **tolerance)


def records(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_the_update_is_adam_with_clipping_and_warm_up(tmp_path):
    config = dataclasses.replace(CONFIG, clip_norm=0.3, warmup=4)
    state = fit(tmp_path, config)
    params, average = PARAMS, PARAMS
    first, second = (jax.tree.map(np.zeros_like, PARAMS) for _ in range(2))
    for step in range(12):
        root = jax.random.fold_in(keys.root(0, "train"), step)
        examples = jax.vmap(lambda i, root=root: jax.random.fold_in(root, i))(jnp.arange(16))
        gradients = jax.grad(lambda p: loss(p, batch(step), examples)[0])(params)  # noqa: B023
        norm = float(optax.tree.norm(gradients))
        gradients = jax.tree.map(lambda g: g * min(1, 0.3 / norm), gradients)  # noqa: B023
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, gradients)
        rate, t = 0.05 * min(step / 4, 1), step + 1
        params = jax.tree.map(
            lambda p, m, v: p - rate * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8),  # noqa: B023
            params, first, second,
        )  # fmt: skip
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, params)
    same(state.params, params, rtol=1e-4, atol=1e-6)
    same(state.ema, average, rtol=1e-4, atol=1e-6)


def test_average_with_warm_up_starts_at_the_parameters(tmp_path):
    config = dataclasses.replace(CONFIG, steps=1, warmup=0, ema=0.9999, ema_warmup=True)
    state = fit(tmp_path, config)
    # At the first step the decay is 1 / 10.
    expected = jax.tree.map(lambda new, old: 0.9 * new + 0.1 * old, state.params, PARAMS)
    same(state.ema, expected, rtol=1e-5)


def test_learning_rates():
    def rates(**changes):
        config = dataclasses.replace(CONFIG, steps=100, warmup=10, clip_norm=0, **changes)
        optimizer = training.make_optimizer(config)
        state, out = optimizer.init(jnp.ones(())), []
        for _ in range(100):  # a constant gradient makes Adam's step the rate itself
            update, state = optimizer.update(jnp.ones(()), state)
            out.append(-float(update))
        return np.array(out)

    constant = rates()
    np.testing.assert_allclose(constant[:11], 0.05 * np.arange(11) / 10, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(constant[10:], 0.05, rtol=1e-4)
    cosine = rates(decay="cosine")
    np.testing.assert_allclose(cosine[:11], constant[:11], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(
        cosine[10:], 0.025 * (1 + np.cos(np.pi * np.arange(90) / 90)), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_do_not_change_the_curve(tmp_path, devices):
    one, many = fit(tmp_path / "one"), fit(tmp_path / "many", devices=devices)
    same(one, many, rtol=1e-5, atol=1e-6)
    for left, right in zip(records(tmp_path / "one"), records(tmp_path / "many"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_slices_do_not_change_the_update(tmp_path, devices):
    sliced = dataclasses.replace(CONFIG, accumulate=4)
    same(fit(tmp_path / "a"), fit(tmp_path / "b", sliced, devices), rtol=1e-5, atol=1e-6)


def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path):
    whole = fit(tmp_path / "whole")
    fit(tmp_path / "parts", dataclasses.replace(CONFIG, steps=7))
    parts = fit(tmp_path / "parts")
    for left, right in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(left, right)
    assert [record["step"] for record in records(tmp_path / "parts")] == list(range(1, 13))


def test_what_is_done_is_not_done_again(tmp_path):
    fit(tmp_path)
    again = training.fit(CONFIG, loss, PARAMS, batch, Workdir(tmp_path), mesh=mesh_of(1))
    assert (again.start, again.examples_per_second) == (12, 0.0)


def test_checkpoints_come_when_asked_and_old_ones_go(tmp_path):
    fit(tmp_path, dataclasses.replace(CONFIG, checkpoint_every=5, keep=2))
    assert checkpoint.steps(tmp_path / "checkpoints") == [10, 12]


def test_evaluations_are_recorded(tmp_path):
    config = dataclasses.replace(CONFIG, evaluate_every=4)
    fit(tmp_path, config, evaluate=lambda state: {"norm": float(optax.tree.norm(state.ema))})
    evaluated = {r["step"]: r["eval/norm"] for r in records(tmp_path) if "eval/norm" in r}
    assert sorted(evaluated) == [4, 8, 12]
    final = checkpoint.restore(tmp_path / "checkpoints", {"ema": PARAMS}).trees["ema"]
    assert evaluated[12] == pytest.approx(float(optax.tree.norm(final)))


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, batch=12, accumulate=3)
    with pytest.raises(ValueError, match="does not divide over 8 devices and 3 slices"):
        fit(tmp_path, config, devices=8)


def test_the_state_is_updated_in_place():
    optimizer = training.make_optimizer(CONFIG)
    mesh = mesh_of(1)
    state = parallel.replicate(mesh, training.init_state(PARAMS, optimizer))
    step = training.make_step(loss, optimizer, CONFIG, mesh)
    flags = parallel.split(mesh, np.zeros(1, np.int32))
    program = step.lower(state, parallel.split(mesh, batch(0)), flags).compile()
    aliased = program.as_text().splitlines()[0].count("may-alias")
    assert aliased == len(jax.tree.leaves(state))
