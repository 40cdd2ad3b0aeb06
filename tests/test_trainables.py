"""State besides parameters, and players in turns, against their equations in NumPy."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from gen_jax import checkpoint, parallel, training
from gen_jax.config import TrainConfig
from gen_jax.trainables import Alternating, ModelTrainable, Player, mean_gradients
from gen_jax.workdir import Workdir

pytestmark = pytest.mark.usefixtures("optimised")

STEPS, BATCH = 6, 16
CONFIG = TrainConfig(
    steps=STEPS, batch=BATCH, ema=0.0, log_every=1, checkpoint_every=3, max_skipped=2
)


def run(path, trainable, batch, config=CONFIG, devices=1, **options):
    mesh = Mesh(np.array(jax.devices()[:devices]), (parallel.AXIS,))
    return training.fit(config, trainable, batch, Workdir(path), mesh=mesh, **options)


def assert_same(a, b):
    """Equal structures, types and bits."""
    a, b = jax.device_get((a, b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def records(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


CODES = np.array([[-8, -8], [-8, 8], [8, -8], [8, 8], [64, 64]], np.float32)  # the last is unused


@dataclasses.dataclass(frozen=True)
class Codebook:
    """The codebook of a VQ-VAE by moving average (van den Oord et al. 2017, appendix A.1).

    With n_k vectors z nearest to code k in a batch of n, N_k <- g N_k + (1 - g) n_k,
    m_k <- g m_k + (1 - g) sum of these z, and code k is m_k / N_k. With `smoothing` e, N_k is
    replaced by (N_k + e) / (N + K e) N, N the sum over k. All sums in it are exact in float32,
    since the vectors are small whole numbers and g is 1/2.
    """

    smoothing: float = 0.0
    averaged_entry: str = "codebook"
    rules = types.MappingProxyType({"statistics": "mean", "used": "sum", "seen": "sum"})

    def init(self, key):
        counts = jnp.ones(len(CODES))
        return {
            "codebook": {"codes": jnp.asarray(CODES), "counts": counts, "sums": jnp.asarray(CODES)},
            "statistics": {"mean": jnp.zeros(2), "square": jnp.zeros(2)},
            "used": jnp.zeros(len(CODES), jnp.int32),
            "seen": jnp.int32(0),
        }

    def update(self, state, batch, keys):
        codebook, z = state["codebook"], batch["z"]
        distance = jnp.square(z[:, None] - codebook["codes"][None]).sum(2)
        chosen = jax.nn.one_hot(distance.argmin(1), len(CODES))
        # Equal on every device: the sums over the whole batch.
        counts, sums = parallel.sum((chosen.sum(0), jnp.einsum("bk,bd->kd", chosen, z)))
        counts = 0.5 * codebook["counts"] + 0.5 * counts
        sums = 0.5 * codebook["sums"] + 0.5 * sums
        total = counts.sum()
        smooth = (counts + self.smoothing) / (total + len(CODES) * self.smoothing) * total
        codes = sums / (smooth if self.smoothing else counts)[:, None]
        # Each device's own, which the rules join.
        statistics = {"mean": z.mean(0), "square": jnp.square(z).mean(0)}
        statistics = jax.tree.map(lambda old, new: (old + new) / 2, state["statistics"], statistics)
        state = {
            "codebook": {"codes": codes, "counts": counts, "sums": sums},
            "statistics": statistics,
            "used": state["used"] + chosen.sum(0).astype(jnp.int32),
            "seen": state["seen"] + len(z),
        }
        return state, {"loss": distance.min(1).mean()}

    def averaged(self, state):
        return state[self.averaged_entry]


def vectors(step):
    """Whole numbers around all codes but the last."""
    generator = np.random.default_rng(step)
    code = CODES[generator.integers(0, 4, BATCH)]
    return {"z": (code + generator.integers(-3, 4, code.shape)).astype(np.float32)}


def closed_form(smoothing=0.0, steps=range(STEPS)):
    """The states after each of these steps, by NumPy in float64."""
    codes, counts, sums = CODES.astype(np.float64), np.ones(len(CODES)), CODES.astype(np.float64)
    mean, square, used, seen = np.zeros(2), np.zeros(2), np.zeros(len(CODES), np.int32), 0
    for step in steps:
        z = vectors(step)["z"].astype(np.float64)
        nearest = ((z[:, None] - codes) ** 2).sum(2).argmin(1)
        number = np.bincount(nearest, minlength=len(CODES))
        total = np.stack([z[nearest == code].sum(0) for code in range(len(CODES))])
        counts, sums = (counts + number) / 2, (sums + total) / 2
        size = counts.sum()
        smooth = (counts + smoothing) / (size + len(CODES) * smoothing) * size
        codes = sums / smooth[:, None]
        mean, square = (mean + z.mean(0)) / 2, (square + (z**2).mean(0)) / 2
        used, seen = used + number, seen + BATCH
        yield {
            "codebook": {"codes": codes, "counts": counts, "sums": sums},
            "statistics": {"mean": mean, "square": square},
            "used": used,
            "seen": seen,
        }


def assert_is(state, expected):
    """Sums and counts to the bit, quotients to rounding."""
    state = jax.device_get(state)
    for name in ("counts", "sums"):
        np.testing.assert_array_equal(state["codebook"][name], expected["codebook"][name])
    for name in ("mean", "square"):
        np.testing.assert_array_equal(state["statistics"][name], expected["statistics"][name])
    np.testing.assert_allclose(state["codebook"]["codes"], expected["codebook"]["codes"], rtol=1e-6)
    np.testing.assert_array_equal(state["used"], expected["used"])
    assert state["seen"] == expected["seen"]


@pytest.mark.parametrize(("devices", "smoothing"), [(1, 0.0), (2, 0.5), (8, 0.0), (8, 0.5)])
def test_a_codebook_and_its_statistics_are_those_of_the_whole_batch(tmp_path, devices, smoothing):
    trained = run(tmp_path, Codebook(smoothing), vectors, devices=devices)
    *_, expected = closed_form(smoothing)
    assert_is(trained.state.state, expected)
    assert (expected["used"][:4] > 0).all()  # every code but the last
    assert_same(trained.averaged, trained.state.state["codebook"])  # there is no average


def test_what_is_not_a_parameter_is_resumed_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole", Codebook(), vectors, devices=2)
    run(tmp_path / "parts", Codebook(), vectors, dataclasses.replace(CONFIG, steps=3), devices=2)
    first, *_ = list(closed_form())[2:]
    saved = checkpoint.restore(
        tmp_path / "parts" / "checkpoints", {"state": jax.eval_shape(Codebook().init, None)}
    )
    assert_is(saved.trees["state"], first)
    assert_same(run(tmp_path / "parts", Codebook(), vectors, devices=2).state, whole.state)


@pytest.mark.parametrize("entry", ["codebook", "used"])
def test_the_moving_average_is_of_what_is_asked_for(tmp_path, entry):
    """Floats are averaged from the start on; counts in whole numbers are those of the state."""
    config = dataclasses.replace(CONFIG, ema=0.5)
    trained = run(tmp_path, Codebook(averaged_entry=entry), vectors, config)
    average = {"codes": CODES, "counts": np.ones(len(CODES)), "sums": CODES}
    for state in closed_form():
        average = jax.tree.map(lambda old, new: (old + new) / 2, average, state["codebook"])
    if entry == "used":
        average = state["used"]
    for left, right in zip(*map(jax.tree.leaves, (trained.averaged, average)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_batch_that_is_not_finite_leaves_no_trace(tmp_path, capsys, devices):
    """It is as if the step had not been, in every entry of the state."""

    def poisoned(step):
        batch = vectors(step)
        if step in (1, 2):
            batch["z"][-1] = np.nan
        return batch

    trained = run(tmp_path, Codebook(), poisoned, devices=devices)
    *_, expected = closed_form(steps=(0, 3, 4, 5))
    assert_is(trained.state.state, expected)
    assert capsys.readouterr().err.count("loss not finite, update skipped") == 2
    assert [record["skipped"] for record in records(tmp_path)] == [0, 1, 2, 0, 0, 0]


@dataclasses.dataclass(frozen=True)
class Compared:
    """Every example is compared with the same further vectors of the batch."""

    shared = ("others",)

    def init(self, key):
        return {"scale": jnp.float32(2)}

    def loss(self, params, batch, keys):
        distance = jnp.square(params["scale"] * batch["z"][:, None] - batch["others"][None])
        return distance.mean(), {"number": jnp.float32(len(batch["others"]))}


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 1), (1, 4), (8, 1), (2, 2)])
def test_what_all_examples_share_is_whole_on_every_device(tmp_path, devices, accumulate):
    def batch(step):
        return vectors(step) | {"others": vectors(step + 100)["z"][:8]}

    config = dataclasses.replace(CONFIG, steps=1, accumulate=accumulate, learning_rate=0.5)
    run(tmp_path, ModelTrainable(Compared(), config), batch, config, devices)
    (line,) = records(tmp_path)
    z, others = vectors(0)["z"].astype(np.float64), vectors(100)["z"][:8].astype(np.float64)
    assert line["number"] == 8
    assert line["loss"] == pytest.approx(np.square(2 * z[:, None] - others).mean(), rel=1e-6)
    slope = (2 * (2 * z[:, None] - others) * z[:, None]).mean()
    assert line["gradient_norm"] == pytest.approx(abs(slope), rel=1e-5)


@dataclasses.dataclass(frozen=True)
class Quiet:
    """Its loss is finite, whatever becomes of the statistics."""

    rules = types.MappingProxyType({"statistics": "mean"})

    def init(self, key):
        return {"statistics": jnp.zeros(())}

    def update(self, state, batch, keys):
        return {"statistics": batch["z"].mean()}, {"loss": jnp.float32(0)}

    def averaged(self, state):
        return state


def test_an_entry_with_a_rule_is_guarded_where_the_loss_does_not_show_it(tmp_path, capsys):
    def poisoned(step):
        return {"z": np.full(BATCH, np.inf if step == STEPS - 1 else step, np.float32)}

    trained = run(tmp_path, Quiet(), poisoned)
    assert float(trained.state.state["statistics"]) == STEPS - 2
    assert "step 6: an entry of the state not finite, update skipped" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True, eq=False)
class Wrong:
    """A state of one entry, which the update makes by a function of (entry, z)."""

    change: object
    rules: dict = dataclasses.field(default_factory=dict)
    start: object = np.float32(0)
    metrics: object = lambda z: {"loss": z.mean()}

    def init(self, key):
        return {"entry": jnp.asarray(self.start)}

    def update(self, state, batch, keys):
        return self.change(state["entry"], batch["z"]), self.metrics(batch["z"])

    def averaged(self, state):
        return state


def keep(entry, z):
    return {"entry": entry}


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (Wrong(lambda old, z: {"entry": z.mean()}), "may give entry another value on each device"),
        (Wrong(keep, {"entry": "max"}), "rule of 'entry' must be 'mean', 'sum' or 'same'"),
        (Wrong(keep, {"other": "sum"}), r"rules of \['other'\], but the state has \['entry'\]"),
        (Wrong(keep, {"entry": "mean"}, np.int32(0)), "'mean' is of floats, but entry is int32"),
        (Wrong(keep, {"entry": "sum"}, np.bool_(0)), "'sum' is of numbers, but entry is bool"),
        (Wrong(lambda old, z: {}), "the state after an update lacks entry"),
        (Wrong(lambda old, z: {"entry": old, "b": old}), "has an unknown b"),
        (Wrong(lambda old, z: {"entry": z[0]}), r"entry as float32\[2\], not float32\[\]"),
        (Wrong(lambda old, z: {"entry": jnp.int32(0)}), r"entry as int32\[\], not float32\[\]"),
        (Wrong(keep, metrics=lambda z: {}), "need a 'loss'"),
        (Wrong(keep, metrics=lambda z: {"loss": z[0]}), "'loss' must be a scalar"),
        (Wrong(keep, metrics=lambda z: {"loss": z.mean(), "step": z.mean()}), "another name than"),
    ],
)
def test_an_update_that_breaks_the_contract_is_refused(tmp_path, trainable, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, trainable, vectors, devices=2)


def test_what_a_trainable_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Codebook cannot start from given values"):
        run(tmp_path, Codebook(), vectors, initial={})
    config = dataclasses.replace(CONFIG, accumulate=2)
    with pytest.raises(ValueError, match="accumulate is 2, but Codebook cuts its batch into 1"):
        run(tmp_path, Codebook(), vectors, config)


@pytest.mark.parametrize("devices", [1, 8])
def test_metrics_that_differ_among_devices_are_averaged(tmp_path, devices):
    run(tmp_path, Wrong(keep), vectors, dataclasses.replace(CONFIG, steps=2), devices=devices)
    means = [vectors(step)["z"].mean(dtype=np.float64) for step in range(2)]
    np.testing.assert_allclose([record["loss"] for record in records(tmp_path)], means, rtol=1e-6)


@pytest.mark.parametrize("slices", [1, 2])
def test_gradients_are_means_over_the_whole_batch(slices):
    """Of both kinds of values: equal on every device, and marked as varying already."""
    mesh = Mesh(np.array(jax.devices()[:4]), (parallel.AXIS,))
    z = vectors(0)["z"]

    def loss(params, batch, keys):
        return jnp.square(batch["z"] - params[None]).mean(), {"first": batch["z"][0, 0]}

    def device(params, z, keys):
        same = mean_gradients(loss, params, {"z": z}, keys, slices)
        return same, mean_gradients(loss, parallel.varying(params), {"z": z}, keys, slices)

    spec = jax.sharding.PartitionSpec
    shares = spec(parallel.AXIS)
    mapped = parallel.map_devices(mesh, device, (spec(), shares, shares), spec())
    params = np.array([1, 2], np.float32)
    for gradients, metrics in mapped(params, z, jax.random.split(jax.random.key(0), BATCH)):
        np.testing.assert_allclose(gradients, params - z.mean(0), rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"], np.square(z - params).mean(), rtol=1e-6)
        every = BATCH // 4 // slices
        np.testing.assert_allclose(metrics["first"], z[::every, 0].mean(), rtol=1e-6)


# A game of two players: x minimises and y maximises the mean over examples of
# c x y + A x^2 / 2 - B y^2 / 2. Each takes steps of its own size; y has momentum.
A, B, STEP_X, STEP_Y, MOMENTUM = 0.5, 0.25, 0.3, 0.2, 0.5


def weights(step):
    return {"c": np.random.default_rng(step).uniform(0.5, 1.5, BATCH).astype(np.float32)}


def payoff(params, batch, keys):
    x, y = params["x"]["value"], params["y"]["value"]
    return (batch["c"] * x * y).mean() + A * x**2 / 2 - B * y**2 / 2, {"x": x}


def loss_of_y(params, batch, keys):
    value, _ = payoff(params, batch, keys)
    return -value, {}


def game(turns, **options):
    players = {
        "x": Player(payoff, optax.sgd(STEP_X), metrics=("x",)),
        "y": Player(loss_of_y, optax.sgd(STEP_Y, momentum=MOMENTUM)),
    }

    def init_params(key):
        return {"x": {"value": jnp.float32(1)}, "y": {"value": jnp.float32(-1)}}

    return Alternating(players, init_params, turns, **options)


def iterates(turns, steps=range(STEPS)):
    """(x, y, velocity of y) after each of these steps: a product of matrices, in float64."""
    z = np.array([1.0, -1.0, 0.0])
    for number, step in enumerate(steps):
        c = weights(step)["c"].mean(dtype=np.float64)
        if turns[number % len(turns)] == "x":
            matrix = np.array([[1 - STEP_X * A, -STEP_X * c, 0], [0, 1, 0], [0, 0, 1]])
        else:
            force = np.array([c, -B, MOMENTUM])  # of y: the velocity that it goes on with
            matrix = np.stack([[1, 0, 0], [0, 1, 0] + STEP_Y * force, force])
        z = matrix @ z
        yield z


ROUNDS = [("x", "y"), ("y", "y", "x"), ("x", "y", "y", "x", "y")]


@pytest.mark.parametrize(("turns", "devices"), [*((turns, 1) for turns in ROUNDS), (ROUNDS[1], 8)])
def test_a_game_goes_as_its_closed_form(tmp_path, turns, devices):
    config = dataclasses.replace(CONFIG, ema=0.5)
    trained = run(tmp_path, game(turns), weights, config, devices)
    states, average = list(iterates(turns)), np.array([1.0, -1.0])
    for x, y, _ in states:
        average = (average + np.array([x, y])) / 2
    values = [trained.state.state["params"][name]["value"] for name in "xy"]
    np.testing.assert_allclose(values, states[-1][:2], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(
        [trained.averaged[n]["value"] for n in "xy"], average, rtol=2e-6, atol=1e-7
    )
    velocity = jax.tree.leaves(trained.state.state["optimizer"]["y"])
    np.testing.assert_allclose(velocity, [-states[-1][2]], rtol=2e-6, atol=1e-7)
    assert int(trained.state.state["turn"]) == STEPS % len(turns)
    for number, record in enumerate(records(tmp_path)):
        player = turns[number % len(turns)]
        assert record["loss"] == record[f"{player}_loss"]
        assert record["gradient_norm"] == record[f"{player}_gradient_norm"]


def test_metrics_are_those_of_the_latest_turns(tmp_path):
    turns = ("y", "y", "x")
    run(tmp_path, game(turns), weights)
    x, losses = 1.0, {"x": 0.0, "y": 0.0}
    before = [(1.0, -1.0), *(state[:2] for state in iterates(turns))]
    seen = 0.0
    for number, record in enumerate(records(tmp_path)):
        x, y = before[number]
        c = weights(number)["c"].mean(dtype=np.float64)
        value = c * x * y + A * x**2 / 2 - B * y**2 / 2
        player = turns[number % 3]
        losses[player] = value if player == "x" else -value
        seen = x if player == "x" else seen
        for name, loss in losses.items():
            assert record[f"{name}_loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert record["x_x"] == pytest.approx(seen, rel=1e-5)


@pytest.mark.parametrize("half", [3, 4])
def test_a_game_resumed_between_turns_is_the_whole_game_bit_for_bit(tmp_path, half):
    turns = ("y", "x")
    whole = run(tmp_path / "whole", game(turns), weights)
    run(tmp_path / "parts", game(turns), weights, dataclasses.replace(CONFIG, steps=half))
    parts = run(tmp_path / "parts", game(turns), weights)
    assert_same(parts.state, whole.state)
    logs = [records(tmp_path / name) for name in ("whole", "parts")]
    for record in [*logs[0], *logs[1]]:
        del record["examples_per_second"]
    assert logs[0] == logs[1]


def test_a_turn_that_is_not_finite_is_taken_again(tmp_path):
    turns = ("x", "y")

    def poisoned(step):
        return {"c": np.full(BATCH, np.nan, np.float32)} if step == 1 else weights(step)

    trained = run(tmp_path, game(turns), poisoned)
    *_, (x, y, _) = iterates(turns, steps=(0, 2, 3, 4, 5))
    values = [trained.state.state["params"][name]["value"] for name in "xy"]
    np.testing.assert_allclose(values, [x, y], rtol=2e-6, atol=1e-7)
    assert int(trained.state.state["turn"]) == 5 % 2


@pytest.mark.parametrize("devices", [1, 2])
def test_slices_do_not_change_a_turn(tmp_path, devices):
    config = dataclasses.replace(CONFIG, accumulate=4)
    trained = run(tmp_path, game(("x", "y"), accumulate=4), weights, config, devices)
    *_, (x, y, _) = iterates(("x", "y"))
    values = [trained.state.state["params"][name]["value"] for name in "xy"]
    np.testing.assert_allclose(values, [x, y], rtol=2e-6, atol=1e-7)


def test_a_game_starts_from_given_values(tmp_path):
    given = {"x": {"value": np.float32(3)}, "y": {"value": np.float32(0)}}
    config = dataclasses.replace(CONFIG, steps=1)
    trained = run(tmp_path, game(("x", "y")), weights, config, initial=given)
    assert float(trained.averaged["x"]["value"]) == pytest.approx(3 - STEP_X * A * 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: game(("x", "z")), "turns name 'z', but the players are x, y"),
        (lambda: game(("x",)), "every player needs a turn, but y"),
        (lambda: Alternating({}, dict, ()), "there is none"),
        (lambda: game(("x", "y"), accumulate=0), "accumulate must be at least 1"),
    ],
)
def test_players_and_turns_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parameters_and_metrics_that_are_not_those_of_the_players_are_refused(tmp_path):
    players = {"x": Player(payoff, optax.sgd(1.0))}
    for params, message in (
        ({"y": {}}, "the parameters are of y, but the players are x"),
        ({"x": {"value": 1.0}}, r"returns the metrics \['x'\], but its player names \[\]"),
    ):
        trainable = Alternating(players, lambda key, params=params: params, ("x",))
        everyone = dataclasses.replace(
            trainable,
            players={"x": Player(lambda p, b, k: (p["x"]["value"], {"x": 0.0}), optax.sgd(1.0))},
        )
        with pytest.raises(ValueError, match=message):
            run(tmp_path, everyone, weights)


def test_equal_trainables_are_traced_once():
    """Tracing the start of large networks takes seconds, and commands ask for it several times."""
    seen = []

    def begin(key):
        seen.append(key)
        return {"x": {"value": jnp.ones(3)}}

    player = Player(lambda params, batch, keys: (jnp.sum(params["x"]["value"]), {}), optax.sgd(0.1))
    first, second = (Alternating({"x": player}, begin, ("x",)) for _ in range(2))
    shapes = training.abstract_state(CONFIG, first)
    state = training.init_state(CONFIG, second)
    assert len(seen) == 1
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, shapes)


def test_a_trainable_that_is_not_hashable_is_refused_before_anything_is_written(tmp_path):
    class Changing(Alternating):
        __hash__ = None

    made = game(("x", "y"))
    changing = Changing(made.players, made.init_params, made.turns)
    with pytest.raises(ValueError, match=r"Changing is not hashable .*: make it a frozen dataclas"):
        run(tmp_path / "run", changing, weights)
    assert not (tmp_path / "run").exists()
