import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import gen_jax
from experiments.gpt_pixels import EXPERIMENT
from gen_jax import cli
from gen_jax.data import DataConfig, PixelSequences, ShapesSet
from gen_jax.data.shapes import PALETTE
from gen_jax.nn.config import TransformerConfig
from gen_jax.tasks import image_files
from gen_jax.tasks.images.config import LabelledSampleConfig
from gen_jax.tasks.pixels import task as pixels
from gen_jax.tasks.pixels.config import EvaluateConfig, PixelsConfig
from miniature import TRAIN, summary
from miniature import arrays as samples
from refusals import refused_in

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.long]

# The least that the experiment can be asked for.
MINUTE = PixelsConfig(
    workdir="",
    data=DataConfig(palette=True),
    model=TransformerConfig(context=256, layers=1, width=8, heads=1, extra_inputs=1),
    train=dataclasses.replace(TRAIN, steps=4),
    sample=LabelledSampleConfig(number=5, micro_batch=8),
    evaluate=EvaluateConfig(images=11, batch=8),
)
MINIATURE = dataclasses.replace(EXPERIMENT, presets={"minute": MINUTE})


def main(*argv):
    return cli.main(MINIATURE, [str(item) for item in argv])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    """The work directory of the command `all`."""
    path = tmp_path_factory.mktemp("pixels") / "my run"
    assert main("--workdir", path) == 0
    return path


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "a copy")


def model_of(workdir):
    """The model and the averaged parameters of the last checkpoint."""
    loaded = gen_jax.load(workdir)
    return loaded.model, loaded.params


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
    assert [path.name for path in finished.rglob(".*") if path.name != ".lock"] == []
    wanted = {
        "bits_per_dim",
        "bits_per_dim_floor",
        "nats_per_image",
        "nats_per_image_floor",
        "nats_over_floor",
        "validity",
        "nfe",
        "images_per_second",
        "sampled_tokens_per_second",
        "sampling_latency_seconds",
        "wall_seconds",
    }
    assert wanted <= summary(finished).keys()
    lines = [
        json.loads(line) for line in (finished / "model" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "eval/bits_per_dim" in line] == [2, 4]
    assert list(EXPERIMENT.commands) == ["all", "train", "sample", "evaluate"]


def test_the_last_preview_is_what_is_sampled(finished):
    assert [path.name for path in sorted((finished / "previews").iterdir())] == [
        "00000002.png",
        "00000004.png",
    ]
    preview = finished / "previews" / "00000004.png"
    assert preview.read_bytes() == (finished / "samples.png").read_bytes()


def test_the_samples_are_written_by_their_colours(finished):
    drawn = samples(finished)
    assert drawn["images"].shape == (5, 16, 16)
    assert drawn["images"].dtype == np.uint8
    assert (int(drawn["step"]), int(drawn["seed"]), int(drawn["nfe"])) == (4, 0, 256)
    files = sorted((finished / "samples").iterdir())
    for path, image in zip(files, drawn["images"], strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), PALETTE[image])
    with Image.open(finished / "samples.png") as sheet:
        assert sheet.size == (3 * 65 - 1, 2 * 65 - 1)
    with Image.open(finished / "trajectory.png") as sheet:
        assert sheet.size == (8 * 65 - 1, 4 * 65 - 1)


@pytest.mark.parametrize("palette", [True, False])
def test_a_picture_fills_up_in_raster_order(palette):
    images = ShapesSet(16).images(palette)[[0, 400]]
    colours = ShapesSet(16).images()[[0, 400]]
    picture = pixels.filling(images, 1)
    for row, image in enumerate(colours):
        for column in range(8):
            place = picture[row * 17 : row * 17 + 16, column * 17 : column * 17 + 16]
            drawn = 2 * (column + 1)
            np.testing.assert_array_equal(place[:drawn], image[:drawn])
            assert (place[drawn:] == 64).all()


def test_the_likelihood_is_that_of_the_model_summed_by_hand(finished):
    model, params = model_of(finished)
    sequences = PixelSequences(ShapesSet(16).as_images(palette=True))
    tokens = sequences.tokens_of(sequences.images.images[sequences.images.indices(0, 0, 11)])
    nats = -np.asarray(model.log_prob(params, {"tokens": tokens}), np.float64)
    report = summary(finished)
    assert report["test_images"] == 11
    assert report["nats_per_image"] == pytest.approx(nats.mean(), rel=1e-5)
    assert report["bits_per_dim"] == pytest.approx(nats.mean() / np.log(2) / 256, rel=1e-5)
    error = nats.std(ddof=1) / 11**0.5 / np.log(2) / 256
    assert report["bits_per_dim_standard_error"] == pytest.approx(error, rel=1e-3)
    assert report["nats_per_image_floor"] == pytest.approx(np.log(648))
    assert report["bits_per_dim_floor"] == pytest.approx(np.log2(648) / 256)
    assert report["nats_over_floor"] == pytest.approx(nats.mean() / np.log(648), rel=1e-5)


@pytest.mark.parametrize("palette", [True, False])
def test_images_of_the_set_are_valid(tmp_path, palette):
    """The scores of samples, by way of samples.npz."""
    config = dataclasses.replace(
        MINUTE,
        data=DataConfig(palette=palette),
        model=dataclasses.replace(MINUTE.model, context=256 if palette else 768),
    )
    miniature = dataclasses.replace(EXPERIMENT, presets={"minute": config})
    options = ["--workdir", str(tmp_path), "--train.steps", "1", "--train.evaluate-every", "0"]
    assert cli.main(miniature, ["train", *options]) == 0
    images = ShapesSet(16).images(palette)
    np.savez(tmp_path / "samples.npz", images=images, step=1, seed=0)
    assert cli.main(miniature, ["evaluate", *options]) == 0
    report = summary(tmp_path)
    assert (report["validity"], report["coverage"], report["tv_joint"]) == (1, 1, 0)
    np.savez(tmp_path / "samples.npz", images=np.zeros_like(images), step=1, seed=0)
    assert cli.main(miniature, ["evaluate", *options]) == 0
    assert summary(tmp_path)["validity"] == 0


def test_a_resumed_run_is_the_one_that_was_not_cut(finished, tmp_path, capsys):
    assert main("train", "--workdir", tmp_path, "--train.steps", 2) == 0
    assert main("train", "--workdir", tmp_path, "--train.steps", 4) == 0
    (_, expected), (_, resumed) = model_of(finished), model_of(tmp_path)
    for left, right in zip(jax.tree.leaves(expected), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(left, right)
    capsys.readouterr()


def test_a_sample_is_the_same_alone(finished, copy, capsys):
    assert main("sample", "--workdir", copy, "--sample.number", 1) == 0
    np.testing.assert_array_equal(samples(copy)["images"], samples(finished)["images"][:1])
    assert main("sample", "--workdir", copy, "--sampler.temperature", 0) == 0
    greedy = samples(copy)["images"]
    assert (greedy == greedy[0]).all()
    capsys.readouterr()


@pytest.mark.parametrize("given", [["--model.extra-inputs", 36], []])
def test_classes_are_inputs(tmp_path, capsys, given):
    """Their number is given, or that of the data; then it is the checkpoint's."""
    options = ("--workdir", tmp_path, "--conditional", *given)
    assert main(*options, "--train.steps", 1, "--sample.number", 3) == 0
    np.testing.assert_array_equal(samples(tmp_path)["labels"], [0, 1, 2])
    assert summary(tmp_path)["nats_per_image_floor"] == pytest.approx(np.log(18))
    assert main("sample", "--workdir", tmp_path, "--sample.label", 35) == 0
    np.testing.assert_array_equal(samples(tmp_path)["labels"], [35] * 3)
    capsys.readouterr()
    assert main("sample", "--workdir", tmp_path, "--sample.label", 36) == 2
    assert "sample.label must be -1 or a class, got 36" in refused_in(capsys)


def test_images_that_are_no_shapes_are_compared_as_pixels():
    rng = np.random.default_rng(0)
    world = dataclasses.replace(ShapesSet(16).as_images())
    images = rng.uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32)
    config = DataConfig(name="folder", dir="images")
    assert image_files.score(images, config, world)["frechet_pooled_pixels"] > 0
    assert image_files.score(images[:1], config, world) == {}


REFUSED = [
    ("--sampler.top-p 0", "top_p must be in (0, 1], got 0.0"),
    ("--sampler.top-p 2", "top_p must be in (0, 1], got 2.0"),
    ("--sample.label 1", "sample.label must be -1 or a class, got 1"),
    ("--evaluate.images 0", "evaluate.images and evaluate.batch must be at least 1"),
    ("--model.context 100", "the images have 256 tokens (16 x 16), model.context is 100"),
    ("--data.no-palette", "the images have 768 tokens (16 x 16 x 3), model.context is 256"),
    ("--model.vocabulary 9", "model.vocabulary must be 7, or 0 for the same, got 9"),
    ("--model.extra-inputs 2", "model.extra_inputs must be 1, the start of every image, got 2"),
    ("--conditional --model.extra-inputs 0", "model.extra_inputs must be at least 1"),
    (
        "--conditional --model.extra-inputs 9",
        "the data has 36 classes, model.extra_inputs is for 9",
    ),
    ("--conditional --sample.label 36", "sample.label must be -1 or a class, got 36"),
    ("--model.no-causal", "this model of pixels has model.causal True"),
    ("--data.no-palette --data.name cifar10 --data.dir nowhere", "no CIFAR-10 files in "),
    ("--pretrained there", "unknown option --pretrained"),
    ("export", "unknown command 'export'"),
    ("sample", "train one first, or give its --workdir"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    assert main(*line.split(), "--workdir", tmp_path / "run") == 2
    assert message in refused_in(capsys)
    assert not (tmp_path / "run").exists()
