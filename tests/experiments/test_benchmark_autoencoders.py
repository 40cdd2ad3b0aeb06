"""The benchmark of autoencoders: both sides agree on a small one, and what it refuses."""

import dataclasses
import json

import pytest

from experiments.benchmarks import autoencoders as benchmark

pytestmark = pytest.mark.long

TINY = benchmark.Config(
    widths=(4, 8), size=8, batches=(2,), vectors=600, codes=1100, width=4, repeats=1, threads=1
)


@pytest.mark.oracle
def test_both_sides_code_the_same(capsys):
    pytest.importorskip("diffusers")
    result = json.loads(json.dumps(benchmark.benchmark(TINY)))
    names = ["encode, batch 2", "decode, batch 2", "search, 600 x 1100 x 4"]
    assert list(dict.fromkeys(row["what"] for row in result["rows"])) == names
    assert len(result["rows"]) == 7
    assert result["largest_difference"] < 1e-4
    assert all(row["milliseconds"] > 0 for row in result["rows"])
    assert len(capsys.readouterr().out.splitlines()) == 7


@pytest.mark.oracle
def test_what_differs_is_not_timed():
    pytest.importorskip("diffusers")
    with pytest.raises(FloatingPointError, match=r"differ by .*: not timed"):
        benchmark.benchmark(dataclasses.replace(TINY, tolerance=0.0))


def test_what_it_refuses():
    with pytest.raises(ValueError, match="must be positive"):
        dataclasses.replace(TINY, repeats=0)
