"""A whole comparison in miniature: its files, its page in a browser, and what stops and goes on."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import compare_sampling, ddpm_cifar, report, two_stage
from experiments.compare_sampling import SHAPES
from gen_jax.comparison import figures, measure, records, run
from gen_jax.comparison.config import CompareConfig
from gen_jax.comparison.strategy import with_plugin

pytestmark = pytest.mark.long

PLUGIN = Path(__file__).with_name("miniature_plugin.py")
NAMES = "ar,one_shot,random_order_2,code_ar"
CODER = {"widths": (8,), "patch": 4, "middle_attention": False}
FEW = {"steps": 2, "batch": 8, "checkpoint_every": 2, "log_every": 1, "keep": 1}


def miniature():
    """The comparison of shapes with the least of networks and training."""
    runs = {}
    for name, config in SHAPES.runs.items():
        changes = {"train": dataclasses.replace(config.train, **FEW)}
        if name in ("ar", "masked"):
            changes["model"] = dataclasses.replace(config.model, layers=1, width=16, heads=2)
        elif name == "coder":
            changes["model"] = dataclasses.replace(config.model, **CODER)
        elif name == "code_ar":
            changes["coder"] = dataclasses.replace(config.coder, **CODER)
            small = {"layers": 1, "width": 16, "heads": 2, "mlp_dim": 16}
            changes["model"] = dataclasses.replace(config.model, **small)
        else:
            continue
        runs[name] = dataclasses.replace(config, **changes)
    kept = tuple(s for s in SHAPES.strategies if s.name in NAMES.split(","))
    return dataclasses.replace(SHAPES, runs=runs, strategies=kept)


def compare(place, **options):
    """Runs the miniature with the plugin; whether all passed."""
    config = CompareConfig(
        workdir=str(place), samples=8, batches=(1, 4), rounds=2, plugin=str(PLUGIN), **options
    )
    return run.compare(config, with_plugin(miniature(), str(PLUGIN)).chosen("", False))


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_device):
    """A comparison that was stopped while its second strategy was examined, and went on."""
    place = tmp_path_factory.mktemp("comparison") / "a b"
    examined, whole = [], measure.examine

    def stopping(contestant, *arguments):
        examined.append(contestant.strategy.name)
        if len(examined) == 2:
            raise KeyboardInterrupt
        return whole(contestant, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "examine", stopping)
        with pytest.raises(KeyboardInterrupt):
            compare(place)
        assert not (place / "results.json").exists()
        assert not compare(place), "two strategies of the plugin must fail"
    names = [*NAMES.split(","), "left", "short"]
    assert examined == ["ar", "one_shot", *names[1:]], "what was done is not done again"
    return place


@pytest.fixture(scope="module")
def results(place):
    return records.read(place / "results.json")


def test_a_strategy_that_fails_fails_alone(results):
    failed = {s["name"]: s["failed"] for s in results["strategies"] if s["failed"]}
    assert failed == {
        "short": "samples are int32[16, 8], and should be tokens [B, 16] below 595",
        "broken": "RuntimeError: this plugin has a defect",
    }
    assert all("rates" not in s for s in results["strategies"] if s["failed"])


def test_results_have_every_figure(results):
    passed = {s["name"]: s for s in results["strategies"] if not s["failed"]}
    assert set(passed) == {*NAMES.split(","), "left"}
    assert {name: s["nfe"] for name, s in passed.items()} == {
        "ar": 16, "one_shot": 1, "random_order_2": 2, "code_ar": 17, "left": 2,
    }  # fmt: skip
    for strategy in passed.values():
        assert next(rate["batch"] for rate in strategy["rates"]) == 1
        for rate in strategy["rates"]:
            assert 0 < rate["seconds"]["low"] <= rate["seconds"]["median"]
            assert rate["repeats"] == 2
        assert strategy["operations_per_sample"] > 0
        assert strategy["bytes_per_sample"] > 0
        assert len(strategy["sha256"]) == 64
        assert 0 <= strategy["quality"]["validity"] <= 1
    for name in ("ar", "one_shot", "random_order_2", "code_ar"):
        law = passed[name]["law"]
        assert law["kl"] >= law["kl_perfect"] - 1e-6, name
    # Exact conditionals: one by one is exact, and at once is not.
    assert passed["ar"]["perfect"]["validity"] == 1
    assert passed["one_shot"]["perfect"]["validity"] < 0.05
    assert results["runs"]["ar"]["parameters"] == passed["ar"]["parameters"]
    assert results["entropy"] == pytest.approx(np.log(648))
    both = [results["runs"][name]["parameters"] for name in ("coder", "code_ar")]
    assert passed["code_ar"]["parameters"] == sum(both)


def test_figures_and_table_are_written(place, results):
    table = (place / "results.md").read_text()
    assert table.count("\n| ") == 6
    assert "**broken** failed" in table
    for name in figures.charts(results):
        assert (place / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (place / "figures" / f"{name}.svg").read_text().startswith("<svg")


def test_a_finished_comparison_does_nothing_again(place, results, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "copy", copy_function=shutil.copy2)
    monkeypatch.setattr(measure, "examine", lambda *_: pytest.fail("examined again"))
    monkeypatch.setattr(measure, "time_once", lambda *_: pytest.fail("timed again"))
    copy = with_plugin(miniature(), str(PLUGIN)).chosen("ar,left", False)
    config = CompareConfig(workdir=str(tmp_path / "copy"), samples=8, batches=(1, 4), rounds=2)
    assert run.compare(config, copy)
    again = records.read(tmp_path / "copy" / "results.json")["strategies"]
    assert again == [s for s in results["strategies"] if s["name"] in ("ar", "left")]


def test_runs_that_were_trained_elsewhere(place, tmp_path, one_device):
    chosen = miniature().chosen("one_shot", False)
    config = CompareConfig(
        workdir=str(tmp_path / "other"), runs=str(place / "runs"), samples=8, batches=(1,), rounds=1
    )
    assert run.compare(config, chosen)
    assert not (tmp_path / "other" / "runs").exists()
    wrong = dataclasses.replace(chosen.runs["masked"], patch=4)
    wrong = dataclasses.replace(wrong, data=dataclasses.replace(wrong.data, size=32))
    wrong = dataclasses.replace(wrong, model=dataclasses.replace(wrong.model, context=64))
    other = dataclasses.replace(chosen, runs={"masked": wrong})
    elsewhere = dataclasses.replace(config, workdir=str(tmp_path / "third"))
    with pytest.raises(ValueError, match="is of another data"):
        run.compare(elsewhere, other)
    missing = dataclasses.replace(elsewhere, runs=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no run masked in"):
        run.compare(missing, chosen)
    assert not (tmp_path / "third").exists()


def test_a_comparison_may_be_moved(place, tmp_path, monkeypatch, one_device):
    shutil.copytree(place, tmp_path / "moved", copy_function=shutil.copy2)
    away = place.with_name("away")
    place.rename(away)  # nothing may be read from where it was
    try:
        monkeypatch.setattr(measure, "examine", lambda *_: pytest.fail("examined again"))
        chosen = miniature().chosen("code_ar", False)
        config = CompareConfig(workdir=str(tmp_path / "moved"), samples=8, batches=(1, 4), rounds=2)
        assert run.compare(config, chosen)
    finally:
        away.rename(place)


def test_damaged_arrays_are_named_before_any_work(tmp_path):
    """Those of a strategy that was examined: of a run of which nothing else is there."""
    config = CompareConfig(workdir=str(tmp_path), samples=8)
    comparing = run._Comparing(config, miniature().chosen("", False))
    comparing.workdir.write_json("comparison.json", comparing._identity())
    comparing.workdir.write_json("examined/ar.json", {})
    arrays = tmp_path / "examined" / "ar.npz"
    np.savez(arrays, frames=np.array([{}], object))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"ar\.npz is damaged .*; remove .*ar\.json"):
        comparing.all()
    assert sorted(tmp_path.rglob("*")) == before
    arrays.unlink()
    with pytest.raises(ValueError, match=r"ar\.npz is not there; remove .*ar\.json"):
        comparing.all()


def test_another_comparison_in_its_place_is_refused(place, tmp_path):
    with pytest.raises(ValueError, match="holds a comparison with seed 0, not 1"):
        compare(place, seed=1)
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(place / "comparison.json", copy)
    (copy / "results.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="is of schema 99, this version reads 1"):
        compare(copy)
    (copy / "results.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        compare(copy)


def entry(name, nfe, **law):
    strategy = {"name": name, "title": name, "group": "rounds", "failed": "", "nfe": nfe}
    rate = {"batch": 1, "seconds": {"median": 0.01}, "samples_per_second": 100.0}
    return strategy | {"quality": {"known_words": 0.5}, "rates": [rate], "law": law}


@pytest.mark.parametrize(
    ("laws", "unit", "points"),
    [
        (({"kl": 3.0, "kl_perfect": 1.0}, {}), "nats lost", [("trained", 3.0), ("perfect", 1.0)]),
        (({"bits": 1.7}, {"bits": 3.0}), "bits per unit", [("trained", 1.7), ("trained", 3.0)]),
        (({}, {}), None, None),
    ],
)
def test_what_is_lost_is_drawn_where_it_is_known(laws, unit, points):
    strategies = [entry(f"of {nfe}", nfe, **law) for nfe, law in enumerate(laws, 1)]
    charts = figures.charts({"strategies": strategies, "headline": "known_words"})
    words = charts["quality_nfe"][1].to_dict()["data"]["values"]
    assert [row["known words"] for row in words] == [0.5, 0.5]
    if unit is None:
        assert "loss_nfe" not in charts
        return
    rows = charts["loss_nfe"][1].to_dict()["data"]["values"]
    assert [(row["network"], row[unit]) for row in rows] == points


def test_a_group_has_the_same_colour_in_every_figure():
    groups = {"of a law": "rounds", "of none": "at once", "of none again": "codes"}
    laws = {"of a law": {"kl": 3.0, "kl_perfect": 1.0}}
    strategies = [entry(name, 2, **laws.get(name, {})) for name in groups]
    for strategy in strategies:
        strategy["group"] = groups[strategy["title"]]
    charts = figures.charts({"strategies": strategies, "headline": "known_words"})
    charts.pop("latency")  # of parts, not of groups
    assert len(charts) == 4
    for _, chart in charts.values():
        described = chart.to_dict()
        layers = [one["encoding"] for one in described.get("layer", [described])]
        domains = [one["color"]["scale"]["domain"] for one in layers if "color" in one]
        assert domains
        assert all(domain == sorted(groups.values()) for domain in domains)


@pytest.mark.parametrize(
    ("number", "timed", "parts"),
    [(40, 1, [(0, 32), (32, 32)]), (12, 1, [(0, 12)]), (40, 64, [(0, 64)])],
)
def test_samples_to_score_are_drawn_together_though_slow_ones_are_timed_alone(number, timed, parts):
    drawn = []

    class Contestant:
        def draw(self, seed, start, batch):
            drawn.append((start, batch))
            return np.arange(start, start + batch)

    samples, batch = measure._scored(Contestant(), number, timed, 0)
    assert (drawn, batch) == (parts, parts[0][1])
    np.testing.assert_array_equal(samples, np.arange(number))


def test_crossings_and_the_pareto_front():
    ours, others = [(1, 10), (8, 80), (64, 640)], [(1, 40), (8, 40), (64, 40)]
    ((batch, rate),) = figures.crossings(ours, others)
    assert batch == pytest.approx(4)
    assert rate == pytest.approx(40)
    assert figures.crossings(ours, [(1, 11), (8, 81), (64, 641)]) == []
    assert figures.pareto([(1, 5), (2, 4), (3, 6), (4, 1)]) == [2, 3]


def test_the_page_says_whether_budgets_are_equal(results):
    assert "NOT equal within a tenth" in records.budgets(results)  # of the miniature
    one = {"failed": None, "parameters": 9, "training_operations": 10}
    same = {"strategies": [one, one | {"parameters": 11}]}
    assert records.budgets(same).endswith("equal within a tenth of their middle.")
    apart = {"strategies": [one, one | {"training_operations": 13}]}
    assert "NOT equal" in records.budgets(apart)


def test_the_page_works_in_a_browser(place, results, browser):
    browser.get((place / "index.html").as_uri())
    rows = browser.find_elements("css selector", "table.sortable tbody tr")
    assert len(rows) == 7
    head = browser.find_elements("css selector", "table.sortable thead th")[1]
    head.find_element("tag name", "button").click()
    first = [row.find_elements("tag name", "td") for row in _rows(browser)]
    values = [float(row[1].get_attribute("data-value")) for row in first if len(row) > 2]
    assert values == sorted(values, reverse=True)
    assert head.get_attribute("aria-sort")
    head.find_element("tag name", "button").click()
    first = [row.find_elements("tag name", "td") for row in _rows(browser)]
    values = [float(row[1].get_attribute("data-value")) for row in first if len(row) > 2]
    assert values == sorted(values)
    clock = browser.find_element("id", "clock")
    card = browser.find_element("id", "card-ar")
    seen = []
    for moment in (0, 500, 1000):
        browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
            clock,
            moment,
        )
        seen.append(int(card.get_attribute("data-frame")))
    assert seen == sorted(seen)
    assert seen[0] == -1
    assert seen[-1] == 15
    browser.find_element("id", "play").click()  # from the beginning again
    _until(lambda: 0 < int(clock.get_attribute("value")) < 1000)
    browser.execute_script("document.querySelector('input[value=time]').click()")
    assert "ms" in browser.find_element("id", "shown").text
    drawn = len(figures.charts(results))
    _until(lambda: len(browser.find_elements("css selector", "[data-drawn=yes]")) == drawn)
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= browser.execute_script("return window.innerWidth"), "it scrolls sideways"
    assert browser.get_log("browser") == []


def _rows(browser):
    return browser.find_elements("css selector", "table.sortable tbody tr")


def _until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_page_of_a_single_run(place, browser, capsys):
    folder = place / "runs" / "ar"
    assert report.main(["--workdir", str(folder)]) == 0
    browser.get((folder / "index.html").as_uri())
    _until(lambda: browser.find_elements("css selector", "[data-drawn=yes] svg"))
    assert '"task": "pixels"' in browser.find_element("css selector", "pre.config").text
    assert browser.get_log("browser") == []
    capsys.readouterr()
    assert report.main(["--workdir", str(place / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: no run in")


def test_frames_show_the_way_of_a_sample(place):
    def kept(name):
        with np.load(place / "examined" / f"{name}.npz") as file:
            return dict(file)

    ar, once, codes = kept("ar"), kept("one_shot"), kept("code_ar")
    assert ar["frames"].shape == (16, 16, 16, 3)
    assert list(ar["evaluated"]) == list(range(1, 17))
    grey = (ar["frames"] == 96).all(-1).sum((1, 2))
    assert list(grey) == [256 - 16 * i for i in range(1, 17)]
    assert len(once["frames"]) == 1
    assert codes["evaluated"][-1] == 17
    np.testing.assert_array_equal(ar["frames"][-1], ar["samples"][0])


def test_the_main_program_names_its_experiments():
    assert compare_sampling.SHAPES.runs["ddpm"].model == ddpm_cifar.TINY.model
    assert compare_sampling.SHAPES.runs["code_ar"].mask == two_stage.AR.mask
