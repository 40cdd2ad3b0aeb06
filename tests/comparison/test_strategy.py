"""What a comparison consists of, and what it refuses."""

import dataclasses
import re
import types
from pathlib import Path

import pytest
from test_gates import MASKED, masked_params, masks_of, pieces

from experiments import compare_sampling
from experiments.compare_sampling import SHAPES, TEXT, cifar10
from gen_jax.comparison import gates
from gen_jax.comparison.config import CompareConfig
from gen_jax.comparison.strategy import Comparison, Strategy, with_plugin

ONE = Strategy("one", "One", "Does.", "Loses.", ("masked",))


@pytest.mark.parametrize("comparison", [SHAPES, TEXT, cifar10("DIR")], ids=lambda c: c.data)
def test_the_comparisons_are_complete(comparison, tmp_path):
    read = {run for s in comparison.strategies for run in comparison.parts(s)}
    assert read == set(comparison.runs), "a run that no strategy reads"
    placed = comparison.placed(tmp_path)
    assert {config.workdir for config in placed.values()} == {
        str(tmp_path / name) for name in comparison.runs
    }
    for strategy in comparison.strategies:  # what gen_jax.load will be asked
        dataclasses.replace(placed[strategy.runs[0]], **strategy.changes)
        assert strategy.does.endswith(".")
        assert strategy.loses.endswith(".")
    assert any(strategy.quick for strategy in comparison.strategies)


def test_an_autoencoder_of_another_run_is_placed_and_trained_before(tmp_path):
    chosen = SHAPES.chosen("code_ar", quick=False)
    assert list(chosen.runs) == ["coder", "code_ar"]
    assert chosen.placed(tmp_path)["code_ar"].autoencoder == str(tmp_path / "coder")
    assert SHAPES.parts(chosen.strategies[0]) == ("coder", "code_ar")


def test_the_quick_comparison_trains_a_quarter():
    quick = SHAPES.chosen("", quick=True)
    assert quick.runs["ar"].train.steps == round(SHAPES.runs["ar"].train.steps / 4)
    assert quick.runs["code_ar"].coder_train.steps == 150
    assert all(strategy.quick for strategy in quick.strategies)
    assert [s.name for s in SHAPES.chosen("dpm_10", quick=True).strategies] == ["dpm_10"]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="unknown strategy 'maskgit8'; did you mean maskgit_8"):
        SHAPES.chosen("ar,maskgit8", quick=False)
    with pytest.raises(ValueError, match="lower-case"):
        dataclasses.replace(ONE, name="One by one")
    with pytest.raises(ValueError, match="names no runs"):
        dataclasses.replace(ONE, runs=())
    with pytest.raises(ValueError, match="reads the run 'masked'"):
        Comparison("x", "", {}, (ONE,), "m:c")
    with pytest.raises(ValueError, match="two strategies are named 'one'"):
        dataclasses.replace(SHAPES, strategies=(ONE, ONE))
    with pytest.raises(ValueError, match="ascend from 1"):
        CompareConfig(batches=(2, 4))
    with pytest.raises(ValueError, match="data-dir"):
        CompareConfig(data="cifar10")
    with pytest.raises(ValueError, match="for --data cifar10"):
        CompareConfig(data_dir="x")


PLUGINS = {
    "there is no plugin": None,
    "cannot be imported": "1 / 0",
    "has no STRATEGIES": "STRATEGIES = (1,)",
    "has a run named 'ar'": "from comparison_plugin import *\nSTRATEGIES = ONE,\nRUNS = {'ar': 1}",
}


@pytest.mark.parametrize("message", PLUGINS)
def test_a_plugin_that_is_none_is_refused(message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    own = "from gen_jax.comparison.strategy import Strategy\n"
    own += "ONE = Strategy('one', 'One', 'Does.', 'Loses.', ('masked',))\n"
    (tmp_path / "comparison_plugin.py").write_text(own)
    file = tmp_path / "plugin.py"
    if PLUGINS[message] is not None:
        file.write_text(PLUGINS[message])
    with pytest.raises(ValueError, match=message):
        with_plugin(SHAPES, str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategies", "arr"], "did you mean ar?"),
        (["--samples", "-1"], "samples must not be negative"),
        (["--sample", "3"], "Unrecognized options: --sample"),
        (["--data", "mnist"], "mnist"),
        (["--plugin", "nowhere.py"], "there is no plugin nowhere.py"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compare_sampling.main(options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1, error
    assert not any(tmp_path.iterdir())


def test_the_plugin_of_the_readme_is_a_strategy(tmp_path):
    page = (Path(__file__).parents[2] / "README.md").read_text()
    (text,) = re.findall(r"<!-- file: my_strategy.py -->\n```python\n(.*?)```", page, re.S)
    assert len(text.splitlines()) < 30
    (tmp_path / "my_strategy.py").write_text(text)
    comparison = with_plugin(SHAPES, str(tmp_path / "my_strategy.py"))
    chosen = comparison.chosen("ar,maskgit_4,left_4", quick=False)
    assert list(chosen.runs) == ["ar", "masked"]
    made = types.SimpleNamespace(length=12)
    run = types.SimpleNamespace(model=MASKED, sampler=made, params=masked_params())
    sampler, params = chosen.strategies[-1].make({"masked": run})
    gates.check_evaluations(pieces(sampler, params))
    gates.check_schedule(sampler, masks_of(sampler, params))
