"""Weights of diffusers in and out of an experiment's command line."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from experiments import ddpm_cifar
from gen_jax import cli, interop, sampling
from gen_jax.models.diffusion import DiffusionModel, DiffusionSampler
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.unet import UNetNetwork
from refusals import refused_in

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.long]

MODEL = UNetConfig(widths=(8, 8), blocks=1, attention=(), groups=4, dropout=0.0)
OPTIONS = ["--sampler.steps", "4", "--sample.number", "3", "--sample.micro-batch", "3"]


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
    model = DiffusionModel(UNetNetwork(MODEL), DiffusionConfig(), (16, 16, 3))
    sampler = DiffusionSampler(model, dataclasses.replace(ddpm_cifar.TINY.sampler, steps=4))
    expected = sampling.generate(sampler, params, sampling.sample_keys(0, 0, 3))
    np.testing.assert_allclose(drawn, expected, atol=1e-4)
    said = "has no scheduler_config.json: its process is taken to be --diffusion.schedule linear"
    assert said in capsys.readouterr().err
    # The run knows what it is from here on.
    assert main("evaluate", "--workdir", run, "--evaluate.images", 2, "--evaluate.draws", 1) == 0
    assert json.loads((run / "summary.json").read_text())["validity"] == 0
    assert main("export", "--workdir", run) == 0
    _, again = interop.load_diffusers_unet(run / "diffusers")
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(left, right)
    assert json.loads((run / "summary.json").read_text())["nfe"] == 4
    capsys.readouterr()


def test_the_work_directory_is_named_after_the_folder(published, tmp_path, monkeypatch, capsys):
    folder, _ = published
    monkeypatch.chdir(tmp_path)
    assert main("sample", "--pretrained", folder, *OPTIONS) == 0
    run = tmp_path / "runs" / f"ddpm_cifar_{folder.name}"
    stored = json.loads((run / "config.json").read_text())
    assert stored["model"]["widths"] == [8, 8]
    assert stored["pretrained"] == str(folder)
    capsys.readouterr()


SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 50,
    "prediction_type": "v_prediction",
    "variance_type": "fixed_large",
    "clip_sample": True,
}


@pytest.mark.parametrize("place", [".", "scheduler"])
def test_the_process_is_that_of_the_scheduler(published, tmp_path, place):
    folder, _ = published
    shutil.copytree(folder, copy := tmp_path / "copy")
    (copy / place).mkdir(exist_ok=True)
    (copy / place / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    command = ["sample", "--pretrained", str(copy), "--sampler.steps", "50"]
    _, config = cli.parse(ddpm_cifar.EXPERIMENT, command)
    assert config.diffusion == DiffusionConfig(
        timesteps=50, schedule="cosine", prediction="v", variance="fixed_large"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_schedule", "sigmoid"),
        ("trained_betas", [0.1]),
        ("variance_type", "fixed_small_log"),
        ("rescale_betas_zero_snr", True),
        ("prediction_type", None),
        ("num_train_timesteps", 0),
        ("beta_end", 2),
    ],
)
def test_a_scheduler_that_cannot_be_expressed_is_refused(published, tmp_path, capsys, key, value):
    folder, _ = published
    shutil.copytree(folder, copy := tmp_path / "copy")
    (copy / "scheduler_config.json").write_text(json.dumps(SCHEDULER | {key: value}))
    assert main("sample", "--pretrained", copy, "--workdir", tmp_path / "run") == 2
    assert f"{key}={json.dumps(value)} (supported: " in refused_in(capsys)
    assert not (tmp_path / "run").exists()


def test_a_pipeline_that_draws_latents_is_refused(published, tmp_path, capsys):
    folder, _ = published
    shutil.copytree(folder, copy := tmp_path / "copy")
    (copy / "vqvae").mkdir()
    assert main("sample", "--pretrained", copy, "--workdir", tmp_path / "run") == 2
    assert "draws latents, not images: interop.load_diffusers_ldm reads it" in refused_in(capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_of_its_own_is_no_place_for_published_weights(published, tmp_path, capsys):
    folder, _ = published
    stored = dataclasses.replace(ddpm_cifar.TINY, workdir=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(cli.stored_form(stored)))
    (tmp_path / "model" / "checkpoints" / "1").mkdir(parents=True)
    assert main("sample", "--workdir", tmp_path, "--pretrained", folder) == 2
    assert "did not start from published weights" in refused_in(capsys)


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
