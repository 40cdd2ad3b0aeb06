"""The task of autoencoders: what a run leaves, and what it refuses."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import gen_jax
from experiments.vq_cifar import EXPERIMENT
from gen_jax import cli
from gen_jax.data import DataConfig
from gen_jax.models.vq.config import CodebookOptions
from gen_jax.nn.config import AutoencoderConfig
from gen_jax.tasks.autoencoder.config import AutoencoderRunConfig, EvaluateConfig
from gen_jax.tasks.autoencoder.task import code_pictures
from miniature import TRAIN, summary
from refusals import refused_in

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.long]

MINUTE = AutoencoderRunConfig(
    workdir="",
    data=DataConfig(),
    model=AutoencoderConfig(widths=(4,), blocks=1, groups=2, middle_attention=False, patch=4),
    quantiser=CodebookOptions(codes=6, width=3, restart_every=1),
    train=TRAIN,
    evaluate=EvaluateConfig(images=11, batch=8, shown=5),
)
MINIATURE = dataclasses.replace(EXPERIMENT, presets={"minute": MINUTE})


def main(*argv):
    return cli.main(MINIATURE, [str(item) for item in argv])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    """The work directory of the command `all`."""
    path = tmp_path_factory.mktemp("autoencoder") / "my run"
    assert main("--workdir", path) == 0
    return path


def test_the_command_all_leaves_everything(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    pictures = {"reconstruction.png", "codes.png", "usage.png"}
    assert names == {"config.json", "model", "previews", "summary.json"} | pictures
    with Image.open(finished / "previews" / "00000002.png") as sheet:
        assert sheet.size == (5 * 65 - 1, 3 * 65 - 1)
    report = summary(finished)
    assert report["codes_per_image"] == 16
    assert report["bits_per_image"] == pytest.approx(16 * np.log2(6))
    assert 1 <= report["code_perplexity"] <= 6
    assert report["psnr"] == pytest.approx(10 * np.log10(4 / report["reconstruction_mse"]))
    with Image.open(finished / "reconstruction.png") as sheet:
        assert sheet.size == (5 * 65 - 1, 3 * 65 - 1)
    lines = (finished / "model" / "metrics.jsonl").read_text().splitlines()
    assert {"perplexity", "used", "reconstruction"} <= json.loads(lines[0]).keys()
    assert "eval/code_perplexity" in lines[-1]
    assert list(EXPERIMENT.commands) == ["all", "train", "evaluate", "export"]


def test_it_is_exported_and_loaded(finished, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "a copy")
    assert main("export", "--workdir", copy) == 0
    assert (copy / "diffusers" / "config.json").exists()
    ours = gen_jax.load(copy)
    theirs, params = gen_jax.interop.load_diffusers_vq(copy / "diffusers")
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    code = ours.model.encode(ours.params, x).code
    np.testing.assert_array_equal(theirs.encode(params, x).code, code)
    capsys.readouterr()


def test_a_continuous_latent_has_no_codes(tmp_path, capsys):
    assert main("--workdir", tmp_path, "--quantiser", "kl") == 0
    report = summary(tmp_path)
    assert np.isfinite(report["reconstruction_mse"])
    assert "code_perplexity" not in report
    capsys.readouterr()


def test_a_critic_plays_and_is_left_behind(tmp_path, capsys):
    options = "--quantiser.depth 2 --objective.perceptual 1"
    options += " --objective.critic.weight 0.5 --objective.critic.start 1"
    for name, value in {"width": 2, "layers": 1, "groups": 2}.items():
        options += f" --objective.critic.network.{name} {value}"
    assert main("--workdir", tmp_path, *options.split()) == 0
    lines = (tmp_path / "model" / "metrics.jsonl").read_text().splitlines()
    before, after = (json.loads(line) for line in lines if "adaptive_weight" in line)
    assert before["adaptive_weight"] == 0 < after["adaptive_weight"]
    assert {"critic_loss", "critic_real", "critic_fake", "perceptual"} <= after.keys()
    assert np.isfinite(summary(tmp_path)["reconstruction_mse"])
    assert summary(tmp_path)["codes_per_image"] == 32
    loaded = gen_jax.load(tmp_path)
    assert loaded.params.keys() == {"network", "quantiser", "deviation"}
    capsys.readouterr()


def test_codes_are_drawn_in_colours():
    code = np.array([[[0, 1], [1, 0]]])
    drawn = code_pictures((code,), 2, 4)
    assert drawn.shape == (1, 4, 4, 3)
    assert (drawn[0, :2, :2] == drawn[0, 0, 0]).all()
    assert (drawn[0, 0, 0] != drawn[0, 0, 2]).any()
    several = code_pictures((code[:, :1, :1], code), 2, 4)
    assert several.shape == (1, 4, 8, 3)
    assert (several[0, :, :4] == several[0, 0, 0]).all()


REFUSED = [
    ("--data.palette", "an autoencoder takes RGB images: leave data.palette off"),
    ("--model.widths 4 4 4 4", "do not fit the autoencoder: height and width must be multiples of"),
    ("--model.channels 1", "the images have 3 channels, the model takes 1"),
    ("--quantiser.codes 1", "codes must be at least 2"),
    ("--quantiser fsq --quantiser.levels 8 1", "levels must be at least 2 each"),
    ("--objective.perceptual -1", "perceptual must not be negative"),
    ("--objective.critic.weight 1 --objective.critic.start 2", "training ends at 2: start it earl"),
    ("--objective.critic.weight 1 --objective.critic.start 0", "16 x 16 are too small for a discr"),
    ("--quantiser vq", "unknown --quantiser"),
    ("evaluate", "train one first, or give its --workdir"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_bad_input_is_refused_in_one_line(tmp_path, capsys, line, message):
    assert main(*line.split(), "--workdir", tmp_path / "run") == 2
    printed = capsys.readouterr()
    (error,) = printed.err.splitlines()[-1:]
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_run_with_another_quantiser_is_another_run(finished, capsys):
    assert main("evaluate", "--workdir", finished, "--quantiser.codes", 7) == 2
    assert "codes" in refused_in(capsys)
