import dataclasses
import importlib.util
import json

import pytest

from experiments.benchmarks import transformers as benchmark_transformers
from experiments.benchmarks.transformers import Config

pytestmark = pytest.mark.long

TINY = Config(
    batches=(1, 3),
    prompt=4,
    tokens=6,
    top_k=5,
    repeats=2,
    compiled=False,
    layers=2,
    width=16,
    heads=2,
    vocabulary=40,
    context=16,
    threads=1,
    checked_tokens=8,
    bandwidth_bytes=2**16,
    peers=False,
)


@pytest.fixture
def torch():
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    yield torch
    torch.set_num_threads(threads)


@pytest.mark.oracle
def test_both_sides_are_timed_on_the_same_network(torch, capsys):
    result = json.loads(json.dumps(benchmark_transformers.benchmark(TINY)))
    names = ["gen_jax", "dynamic cache", "static cache"]
    assert [(row["batch"], row["side"]) for row in result["rows"]] == [
        (batch, name) for batch in (1, 3) for name in names
    ]
    assert result["largest_difference"] < 1e-4
    assert all(row["tokens_per_second"] > 0 for row in result["rows"])
    # One of two layers of 12 D^2 + 13 D, the last norm, and the table of tokens as the head.
    assert result["weight_bytes_per_token"] == 4 * (2 * (12 * 16**2 + 13 * 16) + 2 * 16 + 40 * 16)
    assert [("share_of_bandwidth" in row) for row in result["rows"]] == [True] * 3 + [False] * 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("batch")


@pytest.mark.oracle
def test_a_peer_is_timed_or_said_to_be_absent(torch, capsys):
    config = dataclasses.replace(TINY, batches=(1,), repeats=1, peers=True)
    sides = [row["side"] for row in benchmark_transformers.benchmark(config)["rows"]]
    installed = importlib.util.find_spec("ctranslate2") is not None
    assert sides[3:] == (["CTranslate2 float32", "CTranslate2 int8"] if installed else [])
    assert ("CTranslate2 is not installed" in capsys.readouterr().out) is not installed


@pytest.mark.oracle
def test_a_compiler_that_fails_is_a_row(torch, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("no compiler here\nat all")

    monkeypatch.setattr(torch, "compile", fail)
    config = dataclasses.replace(TINY, batches=(1,), compiled=True, repeats=1)
    row = benchmark_transformers.benchmark(config)["rows"][-1]
    assert row["failed"] == "RuntimeError: no compiler here"
    assert "not timed: RuntimeError: no compiler here" in capsys.readouterr().out


@pytest.mark.oracle
def test_sides_that_differ_are_not_timed(torch):
    with pytest.raises(FloatingPointError, match=r"logits .* differ by .*: not timed"):
        benchmark_transformers.benchmark(dataclasses.replace(TINY, tolerance=0.0))


@pytest.mark.parametrize("wrong", [{"batches": (0,)}, {"tokens": 0}, {"prompt": 11}])
def test_sizes_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        dataclasses.replace(TINY, **wrong)
