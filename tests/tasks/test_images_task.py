import json
import shutil

import numpy as np
import pytest
from PIL import Image

from experiments.ddpm_cifar import EXPERIMENT
from gen_jax import cli
from gen_jax.models.diffusion import DiffusionConfig
from gen_jax.tasks import image_files
from gen_jax.workdir import WorkdirError

pytestmark = pytest.mark.long

# The least that the experiment can be asked for on eight devices.
MINUTE = (
    "--model.widths 8 --model.groups 4 --model.attention --model.patch 8 --train.steps 4 "
    "--train.batch 8 --train.warmup 0 --train.log-every 1 --train.checkpoint-every 2 "
    "--sample.number 4 --sample.micro-batch 8 --sampler.steps 4 --evaluate.images 4 "
    "--evaluate.draws 2"
)


def perform(*arguments):
    """A command line, in this process."""
    command, config = cli.parse(EXPERIMENT, [str(argument) for argument in arguments])
    cli.execute(EXPERIMENT, config, cli.phases_of(config, command))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The work directory of the command `all`."""
    path = tmp_path_factory.mktemp("results") / "my run"
    perform("--workdir", path, *MINUTE.split())
    return path


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "a copy")


def samples(workdir):
    with np.load(workdir / "samples.npz") as file:
        return dict(file)


def test_the_command_all_leaves_everything(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.json",
        "model",
        "samples",
        "samples.npz",
        "samples.png",
        "summary.json",
        "trajectory.gif",
        "trajectory.png",
    }
    left = [path.name for path in finished.rglob(".*") if path.name != ".lock"]
    assert left == []

    config = json.loads((finished / "config.json").read_text())
    assert config["model"]["widths"] == [8]
    assert config["workdir"] == str(finished)
    records = [
        json.loads(line) for line in (finished / "model" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert {"loss", "gradient_norm", "skipped", "examples_per_second"} < records[0].keys()


def test_the_summary_has_the_figures(finished):
    summary = json.loads((finished / "summary.json").read_text())
    wanted = {
        "wall_seconds",
        "nfe",
        "validity",
        "bits_per_dim",
        "images_per_second",
        "parameters",
        "steps",
        "sampling_latency_seconds",
        "samples_per_second",
        "train_seconds",
        "train_compile_seconds",
        "sample_compile_seconds",
        "bits_per_dim_standard_error",
    }
    assert wanted < summary.keys()
    assert all(isinstance(summary[name], int | float) for name in wanted)
    assert np.isfinite([summary[name] for name in wanted]).all()
    assert summary["nfe"] == 4
    assert summary["steps"] == summary["step"] == 4
    assert 0 <= summary["validity"] <= 1
    assert 0 < summary["train_seconds"] < summary["wall_seconds"]
    rate = 4 * 8 / summary["train_seconds"]
    assert summary["images_per_second"] == pytest.approx(rate, rel=0.01)
    parts = sum(summary[f"bits_{name}"] for name in ("decoder", "prior", "rate"))
    assert summary["bits_per_dim"] == pytest.approx(parts, rel=1e-5)


def test_the_pictures_are_those_of_the_samples(finished):
    drawn = samples(finished)
    assert drawn["images"].shape == (4, 16, 16, 3)
    assert drawn["images"].dtype == np.float32
    assert (int(drawn["step"]), int(drawn["seed"]), int(drawn["nfe"])) == (4, 0, 4)
    files = sorted((finished / "samples").iterdir())
    assert [path.name for path in files] == [f"{number:06d}.png" for number in range(4)]
    for path, image in zip(files, drawn["images"], strict=True):
        pixels = np.asarray(Image.open(path)).astype(np.float32)
        np.testing.assert_allclose(pixels, (np.clip(image, -1, 1) + 1) * 127.5, atol=0.501)
    with Image.open(finished / "samples.png") as sheet:
        assert sheet.size == (2 * 64 + 1, 2 * 64 + 1)
    with Image.open(finished / "trajectory.gif") as moving:
        assert moving.n_frames == 4
        assert moving.info["loop"] == 0
    with Image.open(finished / "trajectory.png") as sheet:
        assert sheet.size == (4 * 65 - 1, 8 * 65 - 1)


def test_a_lost_configuration_is_that_of_the_last_checkpoint(copy):
    path = copy / "config.json"
    stored = json.loads(path.read_text())
    path.unlink()
    with pytest.raises(WorkdirError, match=r"another configuration .*train\.batch"):
        perform("train", "--workdir", copy, *MINUTE.split(), "--train.batch", 16)
    assert not path.exists()
    perform("train", "--workdir", copy)
    assert json.loads(path.read_text()) == stored | {"workdir": str(copy)}


def test_a_trained_run_is_sampled_in_other_ways_without_its_preset(copy, capsys):
    before = samples(copy)
    perform(
        "sample",
        "--workdir",
        copy,
        "--sample.number",
        5,
        "--sample.seed",
        3,
        "--sampler",
        "ddim",
        "--sampler.steps",
        3,
    )
    five = samples(copy)
    assert five["images"].shape == (5, 16, 16, 3)
    assert (int(five["seed"]), int(five["nfe"]), int(five["step"])) == (3, 3, 4)
    assert len(list((copy / "samples").iterdir())) == 5
    assert not np.allclose(five["images"][0], before["images"][0])
    assert "nfe" in capsys.readouterr().out

    # What is asked for once is not stored, and the number does not change a sample.
    stored = json.loads((copy / "config.json").read_text())
    perform("sample", "--workdir", copy, "--sample.number", 3)
    three = samples(copy)
    assert (int(three["seed"]), int(three["nfe"])) == (
        stored["sample"]["seed"],
        stored["sampler"]["steps"],
    )
    assert three["images"].tobytes() == before["images"][:3].tobytes()
    assert len(list((copy / "samples").iterdir())) == 3


def test_the_number_of_classes_is_that_of_the_folder(tmp_path, monkeypatch):
    """One sub-folder for each; afterwards it is the checkpoint's, and a published network's."""
    colours = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
    for name, colour in colours.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), colour).save(tmp_path / "pictures" / name / "1.png")
    monkeypatch.chdir(tmp_path)
    own = ("--data.name", "folder", "--data.dir", "pictures", "--conditional")
    perform("train", *own, "--workdir", "run", *MINUTE.split(), "--train.steps", 1)
    perform("sample", "--workdir", "run", "--sample.number", 5)
    np.testing.assert_array_equal(samples(tmp_path / "run")["labels"], [0, 1, 2, 0, 1])
    with pytest.raises(ValueError, match="label must be -1 or a class, got 3"):
        perform("sample", "--workdir", "run", "--sample.label", 3)
    (tmp_path / "pictures" / "white").mkdir()
    Image.new("RGB", (16, 16), "white").save(tmp_path / "pictures" / "white" / "1.png")
    with pytest.raises(ValueError, match="the data has 4 classes, the model has 3"):
        perform("evaluate", "--workdir", "run")


def test_the_micro_batch_does_not_change_a_sample(copy):
    before = samples(copy)["images"]
    perform(
        "sample",
        "--workdir",
        copy,
        "--sample.micro-batch",
        16,
        "--train.log-every",
        7,
        "--train.keep",
        5,
    )
    np.testing.assert_allclose(samples(copy)["images"], before, atol=1e-5)


def test_evaluation_is_repeated_from_what_is_on_disk(copy, finished, capsys):
    perform("evaluate", "--workdir", copy)
    shown = dict(
        line.strip().rsplit(maxsplit=1)
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  ")
    )
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("bits_per_dim", "validity", "mean_mse"):
        assert shown[name.replace("_", " ")] == f"{summary[name]:.4g}"


def test_evaluation_without_samples_says_what_to_run(copy):
    (copy / "samples.npz").unlink()
    with pytest.raises(FileNotFoundError, match="run the command `sample` first"):
        perform("evaluate", "--workdir", copy)


def test_sampling_without_a_checkpoint_says_so(copy):
    shutil.rmtree(copy / "model" / "checkpoints")
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        perform("sample", "--workdir", copy)


@pytest.mark.parametrize("batch", [4, 12])
def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path, batch):
    arguments = ("train", "--workdir", tmp_path, *MINUTE.split(), "--train.batch", batch)
    with pytest.raises(ValueError, match=f"a batch of {batch} does not divide over 8 devices"):
        perform(*arguments)


def test_a_batch_that_does_not_divide_over_devices_and_slices_is_refused(tmp_path):
    arguments = ("train", "--workdir", tmp_path, *MINUTE.split(), "--train.accumulate", 2)
    with pytest.raises(ValueError, match="8 devices and 2 slices; choose a multiple of 16"):
        perform(*arguments)


def test_samples_of_another_step_are_not_evaluated(copy, capsys):
    with np.load(copy / "samples.npz") as file:
        arrays = dict(file)
    np.savez(copy / "samples.npz", **(arrays | {"step": 3}))
    assert cli.main(EXPERIMENT, ["evaluate", "--workdir", str(copy)]) == 2
    assert "was drawn at step 3, the checkpoint is of step 4" in capsys.readouterr().err


def test_the_summary_keeps_what_was_not_measured_again(copy):
    before = json.loads((copy / "summary.json").read_text())
    perform("all", "--workdir", copy)
    after = json.loads((copy / "summary.json").read_text())
    for name in ("images_per_second", "train_seconds"):
        assert after[name] == before[name]
    assert after["wall_seconds"] != before["wall_seconds"]  # of the latest command


@pytest.mark.parametrize(
    ("reference", "images", "size"),
    [(0, 9, 0), (640, 648, 640), (640, 100, 96), (12, 50, 8), (5, 2, 8)],
)
def test_the_reference_divides_over_the_devices(reference, images, size):
    process = DiffusionConfig(reference=reference)
    assert image_files.reference_size(process, images) == size
