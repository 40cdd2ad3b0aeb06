"""Parts of requests: what is drawn or measured once is not made again, and is the same."""

import dataclasses
import io
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax import evaluation, parts, sampling, signals
from gen_jax.condition import Condition
from gen_jax.drawing import Drawing
from gen_jax.parts import Parts

PARAMS = {"at": np.arange(3, dtype=np.float32)}


@dataclasses.dataclass(frozen=True)
class Noise:
    """Draws noise around a point, and the label besides."""

    steps: int = 2
    nfe: int = 2
    conditions = ("label",)

    def check(self, params, cond):
        assert params["at"].shape == (3,)

    def prepare(self, params):
        return params

    def init(self, params, keys, cond):
        label = jnp.zeros(len(keys)) if cond.label is None else cond.label.astype(jnp.float32)
        return jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys) + label[:, None]

    def step(self, params, state, i):
        return jnp.sin(state) + params["at"][None]

    def finish(self, params, state):
        return state


def drawing(place, cond=None, params=PARAMS, micro_batch=8, **options):
    cond = Condition() if cond is None else cond
    request = {"what": "noise"}
    make = lambda known: Parts(place, request | known, **options)  # noqa: E731
    return Drawing(Noise(), params, 7, cond, 22, micro_batch, make)


@pytest.fixture
def drawn(monkeypatch):
    """The numbers of the samples that were drawn, each time."""
    numbers, rows = [], sampling._rows

    def counting(seed, start, done, count, size, cond):
        numbers.extend(range(start + done, start + done + count))
        return rows(seed, start, done, count, size, cond)

    monkeypatch.setattr(sampling, "_rows", counting)
    return numbers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    samples, figures = drawing(tmp_path_factory.mktemp("whole")).draw(0, 22)
    assert figures["samples"] == 22
    return samples


def test_a_request_that_was_stopped_goes_on(tmp_path, monkeypatch, drawn, whole, capfd):
    keep = Parts.keep

    def stop(*arguments):
        if len(drawn) > 8:  # in the second chunk, which is finished and kept
            signal.raise_signal(signal.SIGTERM)
        keep(*arguments)

    monkeypatch.setattr(Parts, "keep", stop)
    with pytest.raises(signals.Stopped):
        drawing(tmp_path).draw(0, 22)
    assert "SIGTERM: finishing the samples at work" in capfd.readouterr().err
    monkeypatch.setattr(Parts, "keep", keep)
    samples, figures = drawing(tmp_path).draw(0, 22)
    assert samples.tobytes() == whole.tobytes()
    assert drawn == list(range(22)), "each sample once"
    assert figures["samples_per_second"] > 0
    parts.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_machines_draw_parts_of_a_request(tmp_path, drawn, whole):
    """Their ends are none of the micro-batches of the whole."""
    drawing(tmp_path / "one", lasting=True).draw(0, 9)
    drawing(tmp_path / "two", lasting=True).draw(9, 20)
    for place in ("one", "two"):
        parts.clear(tmp_path / place)
    others = [tmp_path / "one", tmp_path / "two"]
    samples, _ = drawing(tmp_path / "all", others=others).draw(0, 22)
    assert samples.tobytes() == whole.tobytes()
    # The last chunk is in no part as a whole.
    assert drawn == [*range(20), *range(16, 22)]
    assert len(list((tmp_path / "all").glob("parts/*/*.npz"))) == 1, "what was read is not copied"


@pytest.mark.parametrize(
    "change", [{"params": {"at": np.ones(3, np.float32)}}, {"micro_batch": 16}]
)
def test_parts_of_another_request_are_refused(tmp_path, change):
    drawing(tmp_path / "one", lasting=True).draw(0, 4)
    with pytest.raises(ValueError, match="one has no part of these samples: it must be"):
        drawing(tmp_path / "all", others=[tmp_path / "one"], **change)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other", "pickled"])
def test_a_damaged_part_is_made_again(tmp_path, drawn, whole, damage, capsys):
    drawing(tmp_path).draw(0, 22)
    first, *_ = sorted(tmp_path.glob("parts/*/*.npz"))
    content = bytearray(first.read_bytes())
    content[len(content) // 3] ^= 1
    np.savez(pickled := io.BytesIO(), samples=np.array([{}], object), sealed=np.array("{}"))
    damaged = {
        "flip": bytes(content),
        "cut": bytes(content[:-9]),
        "empty": b"",
        "other": np.array(1).tobytes(),
        "pickled": pickled.getvalue(),
    }
    first.write_bytes(damaged[damage])
    drawn.clear()
    samples, _ = drawing(tmp_path).draw(0, 22)
    assert samples.tobytes() == whole.tobytes()
    assert drawn == list(range(8))
    assert capsys.readouterr().err == f"{first} is damaged: that part is made again\n"
    drawing(tmp_path).draw(0, 22)
    assert capsys.readouterr().err == "", "it was written again"


def test_a_part_for_others_outlives_what_a_killed_run_left(tmp_path, whole):
    drawing(tmp_path / "one").draw(0, 22)
    drawing(tmp_path / "one", lasting=True).draw(0, 8)
    parts.clear(tmp_path / "one")
    samples, _ = drawing(tmp_path / "all", others=[tmp_path / "one"]).draw(0, 8)
    assert samples.tobytes() == whole[:8].tobytes()


def test_samples_keep_their_conditions(tmp_path, drawn):
    labels = np.arange(22, dtype=np.int32) % 5
    plain = drawing(tmp_path / "plain", cond=Condition(label=labels)).draw(0, 22)[0]
    drawing(tmp_path, cond=Condition(label=labels), lasting=True).draw(3, 19)
    drawn.clear()
    samples, _ = drawing(tmp_path, cond=Condition(label=labels)).draw(0, 22)
    assert samples.tobytes() == plain.tobytes()
    assert drawn == [*range(8), *range(16, 22)]
    labels = labels.copy()
    labels[8] = 4
    with pytest.raises(ValueError, match="drawn under other conditions: has the data changed"):
        drawing(tmp_path, cond=Condition(label=labels)).draw(0, 22)


def test_what_is_measured_of_rows_is_kept(tmp_path, monkeypatch):
    rows = {"x": np.arange(20, dtype=np.float32), "y": np.ones((20, 2), np.float32)}
    seen = []

    @jax.jit
    def measure(params, rows):
        jax.debug.callback(lambda x: seen.append(float(x)), rows["x"][0])
        return {"sum": rows["x"] + rows["y"].sum(1), "at": rows["x"][:, None] + params["at"][None]}

    def run(rows=rows):
        with evaluation.in_parts(Parts(tmp_path, {"what": "rows"})):
            results = [evaluation.map_rows(measure, PARAMS, rows, 8) for _ in range(2)]
            jax.effects_barrier()
        return results

    plain = evaluation.map_rows(measure, PARAMS, rows, 8)
    jax.effects_barrier()
    batches = len(seen)
    seen.clear()
    keep = Parts.keep

    def stop(self, name, *others):
        keep(self, name, *others)
        if name.startswith("002"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Parts, "keep", stop)
    with pytest.raises(signals.Stopped):
        run()
    monkeypatch.setattr(Parts, "keep", keep)
    for result in run():
        jax.tree.map(np.testing.assert_array_equal, result, plain)
    assert len(seen) == 2 * batches, "each batch of both calls once"
    seen.clear()
    changed = rows | {"x": rows["x"] + (np.arange(20) == 19)}
    for result in run(changed):
        assert result["sum"][19] == plain["sum"][19] + 1
    assert 0 < len(seen) < 2 * batches, "the batch that has changed, of each call"


def test_figures_and_means_of_batches_are_kept(tmp_path, monkeypatch):
    rows, made = {"x": np.arange(20, dtype=np.float32)}, []

    @jax.jit
    def mean(params, rows):
        jax.debug.callback(lambda x: made.append(float(x)), rows["x"][0])
        return {"mean": rows["x"].mean() + params["at"].sum()}

    def figures(what="score"):
        made.append(what)
        return {what: 1 / 3}

    def run(texts=("a", "b")):
        with evaluation.in_parts(Parts(tmp_path, {"what": "figures"})):
            means = evaluation.map_batches(mean, PARAMS, rows, 8)
            jax.effects_barrier()
            return means, evaluation.kept_figures(figures, [rows, *texts])

    plain = evaluation.map_batches(mean, PARAMS, rows, 8)
    assert [float(one["mean"]) for one in plain] == [6.5, 14.5, 20.5]
    jax.effects_barrier()
    made.clear()
    keep = Parts.keep

    def stop(self, name, *others):
        if name.startswith("001-000000000008"):
            signal.raise_signal(signal.SIGINT)
        keep(self, name, *others)

    monkeypatch.setattr(Parts, "keep", stop)
    with pytest.raises(signals.Stopped):
        run()
    monkeypatch.setattr(Parts, "keep", keep)
    assert made == [0, 8]
    for _ in range(2):
        means, found = run()
        jax.tree.map(np.testing.assert_array_equal, means, plain)
        assert found == {"score": 1 / 3}
        assert made == [0, 8, 16, "score"], "each once"
    run(("a", "c"))
    assert made == [0, 8, 16, "score", "score"], "of other texts"
