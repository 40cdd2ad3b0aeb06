"""Weights of diffusers in and out of an experiment's command line."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import ddpm_cifar
from gen_jax import cli, interop, sampling
from gen_jax.models.diffusion import DiffusionModel, DiffusionSampler
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.unet import UNetNetwork

pytestmark = pytest.mark.usefixtures("one_device")

MODEL = UNetConfig(widths=(8, 8), blocks=1, attention=(), groups=4, dropout=0.0)
OPTIONS = [
    *("--model.widths", "8", "8", "--model.groups", "4", "--model.attention", "--model.patch", "1"),
    *("--sampler.steps", "4", "--sample.number", "3", "--sample.micro-batch", "3"),
]


@pytest.fixture(scope="module")
def published(tmp_path_factory, one_device):
    """A folder of random weights, and the weights."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32),
        UNetNetwork(MODEL).init(jax.random.key(0), 16, 16),
    )
    path = tmp_path_factory.mktemp("published weights")
    interop.save_diffusers_unet(path, MODEL, params, sample_size=16)
    return path, params


def main(*argv):
    return cli.main(ddpm_cifar.EXPERIMENT, [str(item) for item in argv])


def test_published_weights_are_sampled_and_written_back(published, tmp_path, capsys):
    folder, params = published
    run = tmp_path / "run"
    assert main("sample", "--workdir", run, "--pretrained", folder, *OPTIONS) == 0
    with np.load(run / "samples.npz") as file:
        drawn = file["images"]
    config = ddpm_cifar.TINY
    model = DiffusionModel(UNetNetwork(MODEL), config.diffusion, (16, 16, 3))
    sampler = DiffusionSampler(model, dataclasses.replace(config.sampler, steps=4))
    expected = sampling.generate(sampler, params, sampling.sample_keys(0, 0, 3))
    np.testing.assert_allclose(drawn, expected, atol=1e-4)
    assert main("export", "--workdir", run, "--pretrained", folder, *OPTIONS) == 0
    _, again = interop.load_diffusers_unet(run / "diffusers")
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(left, right)
    assert json.loads((run / "summary.json").read_text())["nfe"] == 4
    capsys.readouterr()


def test_another_network_is_refused(published, tmp_path, capsys):
    folder, _ = published
    options = [*OPTIONS, "--model.blocks", "2"]
    assert main("sample", "--workdir", tmp_path, "--pretrained", folder, *options) == 2
    assert "is another network than model (blocks: 2 -> 1)" in capsys.readouterr().err


def test_training_starts_from_published_weights(published, tmp_path, capsys):
    folder, params = published
    options = [*OPTIONS, "--train.steps", "1", "--train.batch", "8", "--train.learning-rate", "0"]
    assert main("train", "--workdir", tmp_path, "--pretrained", folder, *options) == 0
    assert main("export", "--workdir", tmp_path) == 0
    _, again = interop.load_diffusers_unet(tmp_path / "diffusers")
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-7)
    capsys.readouterr()
