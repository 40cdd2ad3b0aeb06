"""The training loop against closed forms, and its laws over devices, slices and resumes."""

import dataclasses
import json
import re
import signal
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gen_jax import checkpoint, keys, parallel, signals, trainables, training
from gen_jax.config import TrainConfig
from gen_jax.trainables import ModelTrainable
from gen_jax.workdir import MetricsLog, Workdir

pytestmark = pytest.mark.usefixtures("optimised")

CONFIG = TrainConfig(
    steps=12, batch=16, learning_rate=0.05, warmup=1, ema=0.9, log_every=1, checkpoint_every=6
)
PARAMS = {"w": np.ones((4, 3), np.float32), "b": np.zeros(3, np.float32)}


@dataclasses.dataclass(frozen=True)
class Regression:
    """A linear regression with noise on the targets, drawn from the keys."""

    def init(self, key):
        return jax.tree.map(jnp.asarray, PARAMS)

    def loss(self, params, batch, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        error = batch["x"] @ params["w"] + params["b"][None] + 0.1 * noise - 1
        value = jnp.square(error).mean()
        return value, {"loss": value}


def batch(step):
    return {"x": np.random.default_rng(step).normal(size=(16, 4)).astype(np.float32)}


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), (parallel.AXIS,))


def fit(path, config=CONFIG, devices=1, **options):
    trainable = ModelTrainable(Regression(), config)
    return training.fit(config, trainable, batch, Workdir(path), mesh=mesh_of(devices), **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on one device that nothing interrupts: (its directory, what it ended with)."""
    path = tmp_path_factory.mktemp("whole")
    return path, fit(path)


def same(a, b, **tolerance):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, **tolerance)


def records(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_the_update_is_adam_with_clipping_and_warm_up(tmp_path):
    config = dataclasses.replace(CONFIG, clip_norm=0.3, warmup=4)
    trained = fit(tmp_path, config)
    params, average = PARAMS, PARAMS
    first, second = (jax.tree.map(np.zeros_like, PARAMS) for _ in range(2))
    for step in range(12):
        gradients = gradient(params, step)
        norm = float(optax.tree.norm(gradients))
        gradients = jax.tree.map(lambda g: g * min(1, 0.3 / norm), gradients)  # noqa: B023
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, gradients)
        rate, t = 0.05 * min(step / 4, 1), step + 1
        params = jax.tree.map(
            lambda p, m, v: p - rate * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8),  # noqa: B023
            params,
            first,
            second,
        )
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, params)
    same(trained.state.state["params"], params, rtol=1e-4, atol=1e-6)
    same(trained.averaged, average, rtol=1e-4, atol=1e-6)


@jax.jit
def gradient(params, step):
    """Of the loss on the batch of a step, with the keys that training gives to its examples."""
    root = jax.random.fold_in(keys.root(0, "train"), step)
    examples = jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.arange(16))
    return jax.grad(lambda params: Regression().loss(params, {"x": X[step]}, examples)[0])(params)


X = jnp.stack([batch(step)["x"] for step in range(12)])


def test_previews_come_when_they_are_due(tmp_path):
    config = dataclasses.replace(CONFIG, preview_every=5)
    seen = {}

    def preview(step, averaged):
        seen[step] = jax.device_get(averaged)
        return "text"

    trained = fit(tmp_path, config, devices=2, preview=preview)
    assert list(seen) == [5, 10]
    shorter = fit(tmp_path / "5", dataclasses.replace(config, steps=5), devices=2)
    same(seen[5], shorter.averaged)
    same(trained.averaged, fit(tmp_path / "none", devices=2).averaged)


def events(path):
    """What a folder of event files holds: {(tag, step): value}."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        while content:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                found[value.tag, event.step] = value
    return found


def test_tensorboard_has_the_records_and_the_previews(tmp_path):
    config = dataclasses.replace(CONFIG, preview_every=6, log_every=3, tensorboard=True, steps=6)
    picture = np.zeros((4, 6, 3), np.uint8)
    shown = {6: picture, 12: "two\nlines"}

    def preview(step, averaged):
        return shown[step]

    fit(tmp_path, config, preview=preview)
    fit(tmp_path, dataclasses.replace(config, steps=12), preview=preview)
    found = events(tmp_path / "tensorboard")
    losses = {line["step"]: line["loss"] for line in records(tmp_path) if "loss" in line}
    assert {step for tag, step in found if tag == "loss"} == set(losses) == {3, 6, 9, 12}
    for step, loss in losses.items():
        assert found["loss", step].simple_value == pytest.approx(loss)
    image = found["samples", 6].image
    assert (image.height, image.width) == (4, 6)
    (text,) = found["samples/text_summary", 12].tensor.string_val
    assert text.decode() == "    two\n    lines\n"


def test_tensorboard_has_the_counts_of_an_evaluation(tmp_path):
    """Of which metrics.jsonl has the figures alone."""
    config = dataclasses.replace(CONFIG, evaluate_every=4, tensorboard=True, steps=4)
    report = {"used": 0.5, "usage": np.array([3, 0, 7])}
    fit(tmp_path, config, evaluate=lambda averaged: report)
    (line,) = (line for line in records(tmp_path) if "eval/used" in line)
    assert line == {"step": 4, "eval/used": 0.5}
    histogram = events(tmp_path / "tensorboard")["eval/usage", 4].histo
    assert list(histogram.bucket) == [3, 0, 7]
    assert list(histogram.bucket_limit) == [0.5, 1.5, 2.5]
    assert (histogram.num, histogram.sum, histogram.sum_squares) == (10, 14, 28)
    assert (histogram.min, histogram.max) == (0, 2)


def test_tensorboard_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"install gen_jax\[tensorboard\]"):
        fit(tmp_path / "run", dataclasses.replace(CONFIG, tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_a_signal_during_the_last_save_is_not_forgotten(tmp_path, monkeypatch):
    save = checkpoint.save

    def save_and_signal(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        save(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", save_and_signal)
    config = dataclasses.replace(CONFIG, steps=2, checkpoint_every=2)
    with pytest.raises(training.Interrupted, match="stopped by SIGTERM after step 2"):
        fit(tmp_path, config)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]


def test_records_are_on_disk_before_a_checkpoint_is_and_at_the_end(tmp_path, monkeypatch):
    """Those of the evaluation after the last step, too, which no resume makes again."""
    events = []

    def sync(log):
        events.append(("records", len(records(tmp_path))))

    def save(directory, step, *arguments, **options):
        events.append(("checkpoint", step))

    monkeypatch.setattr(MetricsLog, "sync", sync)
    monkeypatch.setattr(checkpoint, "save", save)
    config = dataclasses.replace(CONFIG, evaluate_every=12)
    fit(tmp_path, config, evaluate=lambda average: {"figure": 1.0})
    assert events == [
        *[("records", 6), ("checkpoint", 6)],
        *[("records", 12), ("checkpoint", 12)],
        ("records", 13),
    ]


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.finishing("the test") as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signum is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_average_with_warm_up_starts_at_the_parameters(tmp_path):
    config = dataclasses.replace(CONFIG, steps=1, warmup=0, ema=0.9999, ema_warmup=True)
    trained = fit(tmp_path, config)
    # At the first step the decay is 1 / 10.
    expected = jax.tree.map(
        lambda new, old: 0.9 * new + 0.1 * old, trained.state.state["params"], PARAMS
    )
    same(trained.averaged, expected, rtol=1e-5)


def rates(config, number):
    """The steps that the optimiser takes: for a constant gradient Adam's step is the rate."""
    optimizer = trainables.make_optimizer(config)

    def step(state, _):
        update, state = optimizer.update(jnp.ones(()), state)
        return state, -update

    return np.asarray(jax.lax.scan(step, optimizer.init(jnp.ones(())), length=number)[1])


def test_learning_rates():
    config = dataclasses.replace(CONFIG, steps=100, warmup=10, clip_norm=0.0)
    constant, cosine = (
        rates(dataclasses.replace(config, decay=decay), 100) for decay in ("constant", "cosine")
    )
    np.testing.assert_allclose(constant[:11], 0.05 * np.arange(11) / 10, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(constant[10:], 0.05, rtol=1e-4)
    np.testing.assert_allclose(cosine[:11], constant[:11], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(
        cosine[10:], 0.025 * (1 + np.cos(np.pi * np.arange(90) / 90)), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("final_rate", [0.0, 0.1, 1.0])
def test_the_cosine_ends_at_the_share_of_the_peak_asked_for(final_rate):
    config = dataclasses.replace(
        CONFIG, steps=101, warmup=11, clip_norm=0.0, decay="cosine", final_rate=final_rate
    )
    taken = rates(config, 102)
    peak, least = 0.05, 0.05 * final_rate

    def closed_form(step):
        ratio = (step - 11) / (101 - 11)
        return least + 0.5 * (1 + np.cos(np.pi * ratio)) * (peak - least)

    assert taken[0] == 0
    assert taken[11] == pytest.approx(peak, rel=1e-4)
    for step in (11, 56, 100, 101):  # 56 is the middle, 100 the last update, 101 the end
        assert taken[step] == pytest.approx(closed_form(step), rel=1e-3, abs=1e-6)
    assert closed_form(56) == pytest.approx((peak + least) / 2)
    assert closed_form(101) == pytest.approx(least)


def test_weights_decay_apart_from_the_gradient_and_vectors_do_not():
    config = dataclasses.replace(
        CONFIG, warmup=0, clip_norm=0.0, beta1=0.8, beta2=0.95, weight_decay=0.3
    )
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3), "b": (3,), "s": ()}
    params, *gradients = (
        {name: np.array(rng.normal(size=shape)) for name, shape in shapes.items()} for _ in range(3)
    )
    optimizer = trainables.make_optimizer(config)
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


def test_muon_steps_are_orthogonal_and_as_large_as_those_of_adam():
    config = dataclasses.replace(
        CONFIG, optimizer="muon", warmup=0, clip_norm=0.0, weight_decay=0.5
    )
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((6, 4)), "b": jnp.ones(3), "stack": jnp.ones((3, 2, 2))}
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    optimizer = trainables.make_optimizer(config)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    nadam = optax.nadam(0.05, config.beta1, config.beta2)
    others, _ = nadam.update(gradients, nadam.init(params), params)
    for name in ("b", "stack"):
        np.testing.assert_allclose(updates[name], others[name], rtol=1e-4)
    singular = np.linalg.svd(updates["w"], compute_uv=False)
    expected = 0.05 * 0.2 * 6**0.5  # 0.05 the rate; all alike would be a root mean square of 0.2
    np.testing.assert_allclose(singular, expected, rtol=0.35)
    decayed, _ = optimizer.update(
        gradients, optimizer.init(params), params | {"w": params["w"] + 1}
    )
    np.testing.assert_allclose(decayed["w"] - updates["w"], -0.05 * 0.5, rtol=1e-5)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_with_the_defaults_the_state_is_that_of_adam(decay):
    """So that options that are off cost nothing, and no checkpoint depends on them."""
    config = dataclasses.replace(CONFIG, decay=decay)
    rate = optax.constant_schedule(0.0)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    state = trainables.make_optimizer(config).init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(adam.init(PARAMS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"weight_decay": np.nan}, "weight_decay must be finite"),
        ({"decay": "cosine", "final_rate": 1.1}, r"final_rate must be in \[0, 1\], got 1.1"),
        ({"decay": "cosine", "final_rate": np.nan}, "final_rate must be finite"),
        ({"final_rate": 0.1}, "final_rate is for decay=cosine; decay is constant"),
    ],
)
def test_rates_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_without_an_average_it_is_the_parameters(tmp_path, whole):
    config = dataclasses.replace(CONFIG, ema=0.0, evaluate_every=5)
    seen = []
    trained = fit(tmp_path / "none", config, evaluate=lambda average: seen.append(average) or {})
    params = trained.state.state["params"]
    assert [jax.tree.structure(tree) for tree in seen] == [jax.tree.structure(PARAMS)] * 2
    same(params, whole[1].state.state["params"], rtol=0)
    same(trained.averaged, params, rtol=0)
    saved = checkpoint.restore(tmp_path / "none" / "checkpoints", {"ema": PARAMS}).trees
    same(saved["ema"], params, rtol=0)
    fit(tmp_path / "parts", dataclasses.replace(config, steps=7))
    same(fit(tmp_path / "parts", config).state, trained.state, rtol=0)


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_do_not_change_the_curve(tmp_path, whole, devices):
    many = fit(tmp_path, devices=devices)
    same(whole[1].state, many.state, rtol=1e-5, atol=1e-6)
    for left, right in zip(records(whole[0]), records(tmp_path), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_slices_do_not_change_the_update(tmp_path, whole, devices):
    sliced = dataclasses.replace(CONFIG, accumulate=4)
    same(whole[1].state, fit(tmp_path, sliced, devices).state, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path, whole):
    fit(tmp_path, dataclasses.replace(CONFIG, steps=7))
    parts = fit(tmp_path)
    same(whole[1].state, parts.state, rtol=0)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 13))


def test_what_is_done_is_not_done_again(whole):
    again = fit(whole[0])
    assert (again.start, again.step, again.examples_per_second) == (12, 12, 0.0)
    same(again.averaged, whole[1].averaged, rtol=0)


def test_checkpoints_and_evaluations_come_when_asked_and_old_checkpoints_go(tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_every=5, keep=2, evaluate_every=4)
    fit(tmp_path, config, evaluate=lambda average: {"norm": float(optax.tree.norm(average))})
    assert checkpoint.steps(tmp_path / "checkpoints") == [10, 12]
    evaluated = {r["step"]: r["eval/norm"] for r in records(tmp_path) if "eval/norm" in r}
    assert sorted(evaluated) == [4, 8, 12]
    final = checkpoint.restore(tmp_path / "checkpoints", {"ema": PARAMS}).trees["ema"]
    assert evaluated[12] == pytest.approx(float(optax.tree.norm(final)))


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, batch=12, accumulate=3)
    with pytest.raises(ValueError, match="does not divide over 8 devices and 3 slices"):
        fit(tmp_path, config, devices=8)


def test_training_starts_from_given_values_once(tmp_path):
    """In the place of fresh parameters, with a fresh optimiser; not after a checkpoint."""
    given = jax.tree.map(lambda leaf: leaf + np.float32(2), PARAMS)
    config = dataclasses.replace(CONFIG, steps=1, warmup=0, clip_norm=0.0, ema=0.0)
    trained = fit(tmp_path, config, initial=given)
    step = jax.tree.map(lambda new, old: np.sign(np.asarray(new) - old), trained.averaged, given)
    same(step, jax.tree.map(lambda g: -np.sign(g), gradient(given, 0)))
    moved = jax.tree.map(lambda new, old: np.abs(new - old), trained.averaged, given)
    same(moved, jax.tree.map(lambda leaf: np.full_like(leaf, 0.05), PARAMS), rtol=1e-3)
    other = jax.tree.map(lambda leaf: leaf * 9, given)
    same(fit(tmp_path, config, initial=other).state, trained.state, rtol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"w": PARAMS["w"]}, "initial lacks b"),
        (PARAMS | {"c": PARAMS["b"]}, "initial has an unknown c"),
        (
            PARAMS | {"b": np.zeros(4, np.float32)},
            r"initial has b as float32\[4\], not float32\[3\]",
        ),
        (PARAMS | {"b": np.zeros(3, np.int32)}, r"initial has b as int32\[3\], not float32\[3\]"),
    ],
)
def test_given_values_of_another_kind_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, initial=given)


@pytest.mark.parametrize(("progress", "lines"), [(None, 12), (False, 0)])
def test_without_a_terminal_lines_show_the_progress(tmp_path, monkeypatch, capsys, progress, lines):
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_LINES", 0)
    fit(tmp_path, progress=progress)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == lines
    for number, line in enumerate(shown, 1):
        step = rf"step {number} of 12: loss \d+\.\d{{4}}, [\d.e+]+ examples/s, \d+:\d\d:\d\d left"
        assert re.fullmatch(step, line), line


def test_lines_of_progress_are_far_between(tmp_path, capsys):
    fit(tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_the_state_is_updated_in_place_where_that_pays(monkeypatch, average, in_place):
    monkeypatch.setattr(parallel, "_donation_pays", lambda mesh: in_place)
    mesh, trainable = mesh_of(1), ModelTrainable(Regression(), CONFIG)
    state = training.init_state(CONFIG, trainable)
    state = parallel.replicate(mesh, state if average else state.replace(ema=None))
    step = training.make_step(trainable, CONFIG, mesh)
    flags = parallel.split(mesh, np.zeros(1, np.int32))
    program = step.lower(state, parallel.split(mesh, batch(0)), flags).compile()
    aliased = program.as_text().splitlines()[0].count("may-alias")
    assert aliased == (len(jax.tree.leaves(state)) if in_place else 0)


def test_a_cpu_does_not_update_the_state_in_place():
    mesh = mesh_of(1)
    step = parallel.map_devices(mesh, lambda x: 2 * x, (P(),), P(), donate=(0,))
    value = parallel.replicate(mesh, np.ones(4, np.float32))
    jax.block_until_ready(step(value))
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    assert value.is_deleted() != on_cpu


def test_a_checkpoint_holds_the_average_the_state_and_the_loop(whole):
    path, trained = whole
    abstract = {
        "ema": trained.state.ema,
        "state": trained.state.state,
        "loop": {"step": trained.state.step, "skipped": trained.state.skipped},
    }
    saved = checkpoint.restore(path / "checkpoints", abstract).trees
    same(saved, abstract, rtol=0)
    assert (saved["loop"]["step"], saved["loop"]["skipped"]) == (12, 0)
