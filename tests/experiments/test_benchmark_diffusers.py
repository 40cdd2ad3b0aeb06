"""The benchmarks against diffusers: what they refuse, and training on a small network."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.benchmarks import diffusers as sampling_benchmark
from experiments.benchmarks import diffusers_training as benchmark
from experiments.benchmarks.diffusers_training import NETWORKS, Config

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
TINY = Config(
    networks=("tiny",), batches=(2,), steps=1, repeats=2, compiled=False, threads=1, tolerance=1e-3
)


@pytest.fixture
def small_network(monkeypatch):
    pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    small = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    monkeypatch.setitem(NETWORKS, "tiny", NETWORKS["tiny"] | small)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.oracle
def test_both_sides_train_the_same_network(small_network, one_device, capsys):
    result = json.loads(json.dumps(benchmark.benchmark(TINY)))
    assert [row["side"] for row in result["rows"]] == ["gen_jax", "PyTorch eager"]
    assert result["largest_difference"]["tiny"] < 1e-4
    assert all(row["images_per_second"] > 0 for row in result["rows"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["network", "tiny", "tiny"]


@pytest.mark.oracle
def test_gradients_that_differ_are_not_timed(small_network, one_device):
    with pytest.raises(FloatingPointError, match=r"gradients .* differ by .*: not timed"):
        benchmark.benchmark(dataclasses.replace(TINY, tolerance=0.0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"networks": ("large",)}, "networks are tiny, cpu, not 'large'"),
        ({"batches": (2, 4)}, "one batch for each network, not 2 for 1"),
        ({"batches": (0,)}, "must be at least 1"),
        ({"repeats": 0}, "must be at least 1"),
    ],
)
def test_what_training_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


@pytest.mark.parametrize("wrong", [{"batches": (0,)}, {"steps": 1}, {"repeats": 0}])
def test_what_sampling_refuses(wrong):
    with pytest.raises(ValueError, match="must be"):
        sampling_benchmark.Config(**wrong)


@pytest.mark.oracle
def test_the_peers_are_found_by_a_process_that_has_not_imported_them():
    for name in ("diffusers", "transformers", "torch"):
        pytest.importorskip(name)
    code = (
        "from experiments.benchmarks import diffusers, transformers\n"
        "assert diffusers.diffusers.UNet2DModel and transformers.transformers.GPT2Config\n"
        "assert transformers.torch.Tensor\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
