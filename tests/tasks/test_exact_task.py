import dataclasses
import json
import signal

import numpy as np
import pytest
from PIL import Image

from experiments.multimodality import EXPERIMENT, TINY
from gen_jax import cli
from gen_jax.metrics import gaps
from gen_jax.models.masked import ExactDenoiser
from gen_jax.models.masked.schedules import SCHEDULES, Optimal
from gen_jax.parts import Parts
from gen_jax.tasks.exact import facts, measure, report, task
from refusals import refused_in

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.long]

MINUTE = dataclasses.replace(
    TINY,
    length=3,
    samples=2000,
    network_samples=200,
    orders=2,
    train=dataclasses.replace(TINY.train, steps=2, batch=8, checkpoint_every=2, log_every=1),
    model=dataclasses.replace(TINY.model, width=8, heads=1, mlp_dim=8, layers=1),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    """The report of a run that is as short as can be, and was stopped while it evaluated.

    Returns:
      The work directory, gaps.json, and the names of the parts that were kept.
    """
    path = tmp_path_factory.mktemp("multimodality") / "my run"
    patch, keep, names = pytest.MonkeyPatch(), Parts.keep, []

    def stop(self, name, *others):
        keep(self, name, *others)
        names.append(name)
        if len(names) == 3:
            signal.raise_signal(signal.SIGINT)

    with patch.context() as context:
        context.setattr(task, "_SCHEDULES", ("cosine",))
        context.setattr(measure, "_ROUNDS", (2,))
        context.setattr(facts, "facts", lambda config: [])
        context.setattr(Parts, "keep", stop)
        experiment = dataclasses.replace(EXPERIMENT, presets={"minute": MINUTE})
        assert cli.main(experiment, ["--workdir", str(path)]) == 130
        assert cli.main(experiment, ["--workdir", str(path)]) == 0
    return path, json.loads((path / "gaps.json").read_text()), names


def test_rows_that_were_measured_are_not_measured_again(finished):
    _, found, names = finished
    rows = sum(len(table["rows"]) for table in found["tables"].values())
    assert names == [f"{number:03d}" for number in range(1, rows + len(found["tables"]) + 1)]


def test_a_run_leaves_numbers_and_a_figure(finished):
    path, found, _ = finished
    assert list(found["tables"]) == list(measure.known_sets(MINUTE))
    with Image.open(path / "gaps.png") as figure:
        assert figure.size[0] > 1000
    assert any("at once loses" in line for line in found["findings"])
    assert any(
        "repair at random, one position a round, reaches" in line for line in found["findings"]
    )


def test_samplers_have_the_gaps_that_are_known(finished):
    _, found, _ = finished
    for table in found["tables"].values():
        for row in table["rows"]:
            for kind in ("kl", "tv"):
                if kind in row and f"drawn_{kind}" in row:
                    error = 5 * row[f"drawn_{kind}_error"] + 1e-5
                    assert abs(row[f"drawn_{kind}"] - row[kind]) < error, row


def test_no_trained_network_is_better_than_what_it_can_be(finished):
    _, found, _ = finished
    for table in found["tables"].values():
        rows = {row["strategy"]: row for row in table["rows"]}
        assert rows["all at once"]["network_kl"] >= table["total_correlation"] - 1e-4
        for row in rows.values():
            assert row.get("network_kl", 0) >= -1e-4


def test_strategies_cost_what_they_say():
    schedules = {"cosine": SCHEDULES["cosine"]}
    for strategy in measure.strategies(9, schedules):
        if strategy.groups is not None:
            assert sum(map(len, strategy.groups)) == 9
            assert len(strategy.groups) == strategy.nfe
        if strategy.sizes is not None:
            assert (sum(strategy.sizes), len(strategy.sizes)) == (9, strategy.nfe)
        assert strategy.make(ExactDenoiser(2), 9).nfe == strategy.nfe


def test_no_schedule_is_best_everywhere():
    table = {}
    for name, dist in measure.known_sets(TINY).items():
        profile = tuple(map(float, dist.entropy_profile))
        schedules = {s: SCHEDULES[s] for s in task._SCHEDULES} | {"optimal": Optimal(profile)}
        for rounds in (2, 3, 4):
            found = {
                s: gaps.random_order_gap(dist.entropy_profile, schedule.sizes(9, rounds))
                for s, schedule in schedules.items()
            }
            assert found["optimal"] <= min(found.values()) + 1e-12
            table[name, rounds] = found
    for name in ("modes behind noise", "Markov chain"):
        for rounds in (2, 3, 4):
            found = table[name, rounds]
            assert found["cosine"] < found["linear"] < found["square_root"]
    parity = table["even parity", 3]
    assert parity["square_root"] < 1e-12 < 0.6 < parity["cosine"]


def test_findings_say_which_schedule_wins():
    rows = [
        {"schedule": name, "nfe": 2, "kl": kl}
        for name, kl in (("linear", 0.2), ("cosine", 0.1), ("optimal", 0.1))
    ]
    lines = report._schedules("set", rows)
    assert lines == ["set, 2 rounds in a random order: cosine = optimal < linear."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "8"], "length must be 3, 5 or 9"),
        (["--noise", "1"], "noise and stay must be in"),
        (["--train.clip-norm", "1"], "set it to 0"),
        (["--samples", "3"], "at least 100 samples"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, options, message):
    assert cli.main(EXPERIMENT, ["--workdir", str(tmp_path / "run"), *options]) == 2
    assert message in refused_in(capsys)


def test_no_samples_are_shown(tmp_path, capsys):
    options = ["--workdir", str(tmp_path / "run"), "--train.preview-every", "2"]
    assert cli.main(EXPERIMENT, options) == 2
    message = "error: this experiment shows no samples while it trains: leave preview_every"
    assert capsys.readouterr().err.splitlines() == [message]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_facts_agree_with_what_was_run():
    known = facts.facts(dataclasses.replace(TINY, samples=5000))
    for fact in known:
        if "run" in fact:
            tolerance = 5 * fact["error"] if fact["error"] else 2e-3
            assert abs(fact["run"] - fact["exact"]) < tolerance, fact
    exact = {fact["claim"]: fact["exact"] for fact in known}
    np.testing.assert_allclose(exact["permutations of 4, at once: KL"], 2.367124, atol=1e-6)


@pytest.mark.slow
def test_the_default_job_closes_the_gaps(tmp_path):
    assert EXPERIMENT.commands == ("all", "train", "evaluate")
    assert cli.main(EXPERIMENT, ["--workdir", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "gaps.json").read_text())
    for name in ("two modes", "modes behind noise"):
        table = found["tables"][name]
        rows = {row["strategy"]: row for row in table["rows"]}
        gap = table["total_correlation"]
        np.testing.assert_allclose(rows["all at once"]["network_kl"], gap, rtol=0.02)
        assert rows["one by one"]["network_kl"] < 0.02 * gap
        assert rows["shared latent"]["network_kl"] < 0.02 * gap
