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


@pytest.mark.parametrize("final_rate", [0.0, 0.1, 1.0])
def test_the_cosine_ends_at_the_share_of_the_peak_asked_for(final_rate):
    config = dataclasses.replace(
        CONFIG, steps=101, warmup=11, clip_norm=0, decay="cosine", final_rate=final_rate
    )
    optimizer = training.make_optimizer(config)
    state, rates = optimizer.init(jnp.ones(())), []
    for _ in range(102):
        update, state = optimizer.update(jnp.ones(()), state)
        rates.append(-float(update))
    peak, least = 0.05, 0.05 * final_rate

    def closed_form(step):
        ratio = (step - 11) / (101 - 11)
        return least + 0.5 * (1 + np.cos(np.pi * ratio)) * (peak - least)

    assert rates[0] == 0
    assert rates[11] == pytest.approx(peak, rel=1e-4)
    for step in (11, 56, 100, 101):  # 56 is the middle, 100 the last update, 101 the end
        assert rates[step] == pytest.approx(closed_form(step), rel=1e-3, abs=1e-6)
    assert closed_form(56) == pytest.approx((peak + least) / 2)
    assert closed_form(101) == pytest.approx(least)


def test_weights_decay_apart_from_the_gradient_and_vectors_do_not():
    config = dataclasses.replace(
        CONFIG, warmup=0, clip_norm=0, beta1=0.8, beta2=0.95, weight_decay=0.3
    )
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3), "b": (3,), "s": ()}
    params, *gradients = (
        {name: np.array(rng.normal(size=shape)) for name, shape in shapes.items()} for _ in range(3)
    )
    optimizer = training.make_optimizer(config)
    state, ours = optimizer.init(params), params
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    for t, gradient in enumerate(gradients, 1):
        updates, state = optimizer.update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, decay in (("w", 0.3), ("b", 0), ("s", 0)):
            first[name] = 0.8 * first[name] + 0.2 * gradient[name]
            second[name] = 0.95 * second[name] + 0.05 * gradient[name] ** 2
            step = first[name] / (1 - 0.8**t) / (np.sqrt(second[name] / (1 - 0.95**t)) + 1e-8)
            params[name] = params[name] - 0.05 * (step + decay * params[name])
        same(ours, params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_with_the_defaults_the_state_is_that_of_adam(decay):
    """So that checkpoints from before there was a decay of weights are still read."""
    config = dataclasses.replace(CONFIG, decay=decay)
    rate = optax.constant_schedule(0.0)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    state = training.make_optimizer(config).init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(adam.init(PARAMS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be finite, not negative, got -0.1"),
        ({"weight_decay": np.nan}, "weight_decay must be finite"),
        ({"decay": "cosine", "final_rate": 1.1}, r"final_rate must be in \[0, 1\], got 1.1"),
        ({"decay": "cosine", "final_rate": np.nan}, "final_rate must be in"),
        ({"final_rate": 0.1}, "final_rate is for decay=cosine; decay is constant"),
    ],
)
def test_rates_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_without_an_average_it_is_the_parameters(tmp_path):
    config = dataclasses.replace(CONFIG, ema=0.0, evaluate_every=5)
    seen = []
    state = fit(tmp_path / "whole", config, evaluate=lambda state: seen.append(state.ema) or {})
    assert [jax.tree.structure(tree) for tree in seen] == [jax.tree.structure(PARAMS)] * 2
    same(state.params, fit(tmp_path / "with").params, rtol=0)
    same(state.ema, state.params, rtol=0)
    template = {"ema": PARAMS, "params": PARAMS}
    saved = checkpoint.restore(tmp_path / "whole" / "checkpoints", template).trees
    same(saved["ema"], state.params, rtol=0)
    fit(tmp_path / "parts", dataclasses.replace(config, steps=7))
    same(fit(tmp_path / "parts", config), state, rtol=0)


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


@pytest.mark.parametrize("average", [True, False])
def test_the_state_is_updated_in_place(average):
    optimizer = training.make_optimizer(CONFIG)
    mesh = mesh_of(1)
    state = training.init_state(PARAMS, optimizer)
    state = parallel.replicate(mesh, state if average else state.replace(ema=None))
    step = training.make_step(loss, optimizer, CONFIG, mesh)
    flags = parallel.split(mesh, np.zeros(1, np.int32))
    program = step.lower(state, parallel.split(mesh, batch(0)), flags).compile()
    aliased = program.as_text().splitlines()[0].count("may-alias")
    assert aliased == len(jax.tree.leaves(state))
