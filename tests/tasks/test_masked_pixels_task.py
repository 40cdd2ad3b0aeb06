import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

import gen_jax
from experiments.masked_pixels import EXPERIMENT
from gen_jax import cli
from gen_jax.data import DataConfig, ShapesSet
from gen_jax.models.masked.config import IterativeOptions, MaskGITOptions
from gen_jax.nn.config import TransformerConfig
from gen_jax.tasks.images.config import LabelledSampleConfig
from gen_jax.tasks.masked_pixels.config import (
    CompleteConfig,
    EvaluateConfig,
    MaskedPixelsConfig,
)
from gen_jax.tasks.masked_pixels.task import hidden_part
from miniature import TRAIN, summary
from miniature import arrays as samples
from refusals import refused_in

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.long]

# The least that the experiment can be asked for.
MINUTE = MaskedPixelsConfig(
    workdir="",
    data=DataConfig(palette=True),
    model=TransformerConfig(context=256, layers=1, width=8, heads=1, extra_inputs=1, causal=False),
    train=TRAIN,
    sample=LabelledSampleConfig(number=5, micro_batch=8),
    sampler=MaskGITOptions(rounds=4),
    evaluate=EvaluateConfig(images=11, draws=2, batch=8),
    complete=CompleteConfig(hide="left", images=2, fills=3),
)
MINIATURE = dataclasses.replace(EXPERIMENT, presets={"minute": MINUTE})


def main(*argv):
    return cli.main(MINIATURE, [str(item) for item in argv])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    """The work directory of the command `all`."""
    path = tmp_path_factory.mktemp("masked pixels") / "my run"
    assert main("--workdir", path) == 0
    return path


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "a copy")


def test_the_command_all_leaves_everything(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.json",
        "model",
        "previews",
        "samples",
        "samples.npz",
        "samples.png",
        "summary.json",
        "trajectory.png",
    }
    report = summary(finished)
    assert report["nfe"] == 4
    assert report["nats_per_image_floor"] == pytest.approx(np.log(648))
    assert report["nats_per_image"] > report["nats_per_image_floor"]
    assert report["bits_per_dim"] == pytest.approx(report["nats_per_image"] / 256 / np.log(2))
    assert samples(finished)["images"].shape == (5, 16, 16)
    with Image.open(finished / "trajectory.png") as sheet:
        assert sheet.size == (4 * 65 - 1, 4 * 65 - 1)
        first = np.asarray(sheet)[:64, :64]
    grey = (first == 64).all(-1)  # the first round reveals few pixels
    assert 0.5 < grey.mean() < 1
    assert list(EXPERIMENT.commands) == ["all", "train", "sample", "evaluate", "complete"]


def test_the_last_preview_is_what_is_sampled(finished):
    preview = finished / "previews" / "00000002.png"
    assert preview.read_bytes() == (finished / "samples.png").read_bytes()


@pytest.mark.parametrize("name", list(IterativeOptions.kinds))
def test_every_sampler_in_rounds_draws(copy, name):
    alone = ("--sample.number", 1) if name == "mask_predict" else ()
    assert main("sample", "--workdir", copy, "--sampler", name, "--sampler.rounds", 3, *alone) == 0
    drawn = samples(copy)
    assert int(drawn["nfe"]) == 3 + (name == "repair")
    assert drawn["images"].max() < 7


@pytest.mark.parametrize("hide", ["left", "random"])
def test_what_is_given_stays(copy, hide, capsys):
    assert main("complete", "--workdir", copy, "--complete.hide", hide) == 0
    report = summary(copy)
    assert (report["completed"], report["nfe"]) == (6, 4)
    assert report["completed_valid"] == 0  # nothing was learned
    assert report["completions_possible"] >= 1
    with Image.open(copy / "completed.png") as sheet:
        assert sheet.size == (5 * 65 - 1, 2 * 65 - 1)
        drawn = np.asarray(sheet)
    hidden = hidden_part(hide, (16, 16))
    for top in (0, 65):
        whole, given, *fills = (
            drawn[top : top + 64 : 4, x : x + 64 : 4] for x in range(0, 325, 65)
        )
        np.testing.assert_array_equal((given == 64).all(-1), hidden)
        for image in (given, *fills):
            np.testing.assert_array_equal(image[~hidden], whole[~hidden])
    capsys.readouterr()


def test_the_images_of_the_set_are_valid_completions():
    from gen_jax.tasks.masked_pixels.task import _exactly

    support = ShapesSet(16).images(True).reshape(648, -1)
    images = support[[3, 200]]
    known = ~hidden_part("top", (16, 16)).reshape(-1)
    report = _exactly(support, images, images, known)
    assert report["completed_valid"] == 1
    assert _exactly(support, images[::-1], images, known)["completed_valid"] == 0
    everything = np.zeros(256, bool)
    assert _exactly(support, images[::-1], images, everything) == {
        "completed_valid": 1.0,
        "completions_possible": 648.0,
    }


def test_hidden_parts():
    assert hidden_part("middle", (4, 4)).tolist() == [
        [False, False, False, False],
        [False, True, True, False],
        [False, True, True, False],
        [False, False, False, False],
    ]
    for hide in ("top", "bottom", "left", "right", "random"):
        for shape in ((8, 6), (8, 6, 3)):
            assert hidden_part(hide, shape).shape == shape
            assert hidden_part(hide, shape).mean() == 0.5
    colours = hidden_part("random", (8, 6, 3))
    assert (colours == colours[..., :1]).all()  # whole pixels


def test_patches_are_tokens(tmp_path, capsys):
    """Of 4 x 4 pixels: 16 tokens an image, hidden and drawn as squares."""
    options = ("--workdir", tmp_path, "--patch", 4, "--model.context", 16, "--model.vocabulary", 0)
    assert main(*options, "--sampler.rounds", 16, "--sample.number", 2) == 0
    assert samples(tmp_path)["images"].shape == (2, 16, 16)
    report = summary(tmp_path)
    assert report["bits_per_dim_floor"] == pytest.approx(np.log2(648) / 256)
    assert main("complete", "--workdir", tmp_path, "--complete.hide", "random") == 0
    with Image.open(tmp_path / "completed.png") as sheet:
        given = np.asarray(sheet)[:64, 65:129]
    grey = (given == 64).all(-1).reshape(4, 16, 4, 16).transpose(0, 2, 1, 3).reshape(16, -1)
    assert sorted(grey.mean(1)) == [0.0] * 8 + [1.0] * 8
    capsys.readouterr()


def test_classes_come_before_the_image(tmp_path, capsys):
    assert main("--workdir", tmp_path, "--conditional", "--sample.number", 3) == 0
    np.testing.assert_array_equal(samples(tmp_path)["labels"], [0, 1, 2])
    assert summary(tmp_path)["nats_per_image_floor"] == pytest.approx(np.log(18))
    loaded = gen_jax.load(tmp_path)
    assert (loaded.model.classes, loaded.model.network.config.context) == (36, 257)
    assert main("complete", "--workdir", tmp_path, "--sampler", "absorbing") == 0
    capsys.readouterr()


REFUSED = [
    ("--sampler mask_predict", "Mask-Predict finds one image, always the same"),
    ("--sampler.rounds 0", "rounds must be at least 1, got 0"),
    ("--model.causal", "this model of pixels has model.causal False"),
    ("--model.extra-inputs 2", "model.extra_inputs must be 1, the mask, got 2"),
    ("--patch 3 --model.vocabulary 0", "a patch of 3 does not fit images of 16 x 16"),
    ("--patch 4 --model.vocabulary 0", "16 x 16 in patches of 4), model.context is 256"),
    ("--patch 2 --data.no-palette", "above 1 it is for palette images that are not flipped"),
    ("--evaluate.draws 0", "evaluate.images, .draws and .batch must be at least 1"),
    ("--complete.fills 0", "complete.images and complete.fills must be at least 1"),
    ("complete", "train one first, or give its --workdir"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_bad_input_is_refused_in_one_line(tmp_path, capsys, line, message):
    assert main(*line.split(), "--workdir", tmp_path / "run") == 2
    assert message in refused_in(capsys)
    assert not (tmp_path / "run").exists()
