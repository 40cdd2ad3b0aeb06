"""The task of two stages: every prior, the codes that are kept, and whose autoencoder it is."""

import dataclasses
import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import gen_jax
from experiments.two_stage import EXPERIMENT
from gen_jax import checkpoint, cli, interop, runs, sampling
from gen_jax.data import DataConfig
from gen_jax.models.autoregressive.config import SamplingOptions
from gen_jax.models.masked import HaltonOptions, MaskedModel, OrderedGroups
from gen_jax.models.vq.config import CodebookOptions
from gen_jax.nn.config import AutoencoderConfig, TransformerConfig, UNetConfig
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.tasks import masked_rounds
from gen_jax.tasks.images.config import LabelledSampleConfig
from gen_jax.tasks.two_stage.config import EvaluateConfig, TwoStageConfig
from gen_jax.tasks.two_stage.task import _exactly
from gen_jax.workdir import Workdir
from miniature import TRAIN, arrays, summary
from random_networks import random_params
from refusals import refused_in

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.long]

_TRAIN = dataclasses.replace(TRAIN, preview_every=0, evaluate_every=0)
MINUTE = TwoStageConfig(
    workdir="",
    data=DataConfig(),
    coder=AutoencoderConfig(widths=(4,), blocks=1, groups=2, middle_attention=False, patch=4),
    quantiser=CodebookOptions(codes=6, width=4, restart_every=1),
    coder_train=TRAIN,
    model=TransformerConfig(layers=1, width=8, heads=1),
    unet=UNetConfig(widths=(4,), blocks=1, attention=(), groups=2, dropout=0.0),
    diffusion=EXPERIMENT.presets["ar"].diffusion,
    train=TRAIN,
    sample=LabelledSampleConfig(number=5, micro_batch=8),
    evaluate=EvaluateConfig(images=11, draws=2, batch=8),
)
MINIATURE = dataclasses.replace(EXPERIMENT, presets={"minute": MINUTE})


def main(*argv):
    return cli.main(MINIATURE, [str(item) for item in argv])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    """The work directory of the command `all`, with an autoencoder of its own."""
    path = tmp_path_factory.mktemp("two stages") / "my run"
    assert main("--workdir", path) == 0
    return path


@pytest.fixture(scope="module")
def coder(tmp_path_factory, one_device):
    """The work directory of an autoencoder whose codes are of scales: 1 + 4 + 16."""
    from experiments import vq_cifar
    from gen_jax.tasks.autoencoder.config import AutoencoderRunConfig

    scales = dataclasses.replace(MINUTE.quantiser, scales=(1, 2, 4))
    run = AutoencoderRunConfig(
        "", data=MINUTE.data, model=MINUTE.coder, quantiser=scales, train=_TRAIN
    )
    experiment = dataclasses.replace(vq_cifar.EXPERIMENT, presets={"minute": run})
    path = tmp_path_factory.mktemp("coder") / "run"
    assert cli.main(experiment, ["train", "--workdir", str(path)]) == 0
    return path


def test_the_command_all_leaves_everything(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    pictures = {"samples.png", "samples.npz", "samples", "trajectory.png", "previews"}
    assert names == {"config.json", "autoencoder", "prior", "codes", "summary.json"} | pictures
    report = summary(finished)
    assert (report["nfe"], report["codes_per_image"]) == (17, 16)
    assert report["nats_of_codes"] == pytest.approx(16 * report["nats_per_code"])
    assert report["nats_of_codes"] >= report["nats_of_codes_floor"] - 0.5
    assert report["bits_per_dim"] > report["bits_per_dim_of_codes"] > 0
    assert 0 < report["one_shot_mass_on_support"] <= 1
    images = arrays(finished)["images"]
    assert images.shape == (5, 16, 16, 3)
    loaded = gen_jax.load(finished)
    keys = sampling.sample_keys(0, 0, 5)
    again = sampling.generate(loaded.sampler, loaded.params, keys, loaded.condition(5))
    np.testing.assert_allclose(again, images, atol=1e-4)
    assert list(EXPERIMENT.presets) == ["ar", "masked", "one_shot", "next_scale", "diffusion"]


@pytest.mark.parametrize("prior", ["ar", "diffusion"])
def test_what_a_batch_is_like_is_known_before_there_are_codes(prior, tmp_path):
    diffusion = dataclasses.replace(MINUTE.diffusion, reference=4)
    config = dataclasses.replace(MINUTE, prior=prior, conditional=True, diffusion=diffusion)
    workdir, phases = Workdir(tmp_path / "run"), ("train",)
    task = runs.make_task(config, workdir, phases, config.load(workdir.path, phases))
    coder, stage = task.stages
    like = stage.batch_like()
    assert not workdir.path.exists()
    params = coder.trainable.averaged(coder.trainable.init(jax.random.key(0)))
    made = stage.batch(0, (0, 1), {"autoencoder": params})
    assert set(made) > {"label"}
    assert jax.tree.map(jax.typeof, like) == jax.tree.map(jax.typeof, made)


def test_a_dry_run_leaves_nothing(tmp_path):
    """The codes would be those of an autoencoder that is not trained yet."""
    assert main("--dry-run", "--workdir", tmp_path / "run") == 0
    assert not (tmp_path / "run").exists()


def test_each_stage_shows_what_it_has_learned(finished):
    """The autoencoder images beside what comes back, and the prior the samples of the run."""
    previews = finished / "previews"
    names = ["autoencoder_00000002.png", "prior_00000002.png"]
    assert sorted(path.name for path in previews.iterdir()) == names
    with Image.open(previews / names[0]) as sheet:
        assert sheet.size == (5 * 65 - 1, 3 * 65 - 1)
    with Image.open(previews / names[1]) as last, Image.open(finished / "samples.png") as drawn:
        difference = np.asarray(last).astype(int) - np.asarray(drawn)
    assert abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("prior", "nfe", "more"),
    [
        ("ar", 22, ""),
        ("masked", 9, ""),
        ("masked", 5, "--mask.halton 0.5 --sampler halton --sampler.rounds 4"),
        ("one_shot", 2, ""),
        ("next_scale", 4, ""),
        ("diffusion", 21, ""),
    ],
)
def test_every_prior_takes_the_autoencoder_of_a_run(tmp_path, capsys, coder, prior, nfe, more):
    options = ("--workdir", tmp_path, "--autoencoder", coder, "--prior", prior, *more.split())
    options += ("--diffusion.reference", 16) if prior == "diffusion" else ()
    assert main(*options, "--conditional") == 0
    report = summary(tmp_path)
    assert report["nfe"] == nfe
    assert ("bits_per_dim" in report) == (prior != "diffusion")
    assert ("next_scale_nats_lost" in report) == (prior != "diffusion")
    np.testing.assert_array_equal(arrays(tmp_path)["labels"], range(5))
    assert not (tmp_path / "autoencoder").exists()
    capsys.readouterr()


def test_the_likelihood_of_an_order_is_exact():
    """It sums to one over all sequences, whatever the groups, and is the same in any batch."""
    sizes = TransformerConfig(
        vocabulary=3, context=5, layers=1, width=8, heads=1, causal=False, extra_inputs=3
    )
    model = MaskedModel(TokenNetwork(sizes), grid=(2, 2), halton=0.5)
    params = random_params(model.network)
    tokens = np.array(list(itertools.product(range(3), repeat=4)), np.int32)
    rows = {"tokens": tokens, "label": np.ones(len(tokens), np.int32)}
    for rounds in (1, 2, 4):
        sampler = OrderedGroups.halton(HaltonOptions(rounds), model, 4)
        nats = masked_rounds.nats_in_order(sampler, params, rows, 100)
        np.testing.assert_allclose(np.exp(-nats).sum(), 1, rtol=1e-5)
        again = masked_rounds.nats_in_order(sampler, params, rows, 7)
        np.testing.assert_allclose(nats, again, rtol=1e-5)


def test_the_prior_refuses_another_autoencoder(tmp_path, capsys, coder):
    workdir = tmp_path / "run"
    assert main("train", "--workdir", workdir, "--autoencoder", coder) == 0
    other = shutil.copytree(coder, tmp_path / "other")
    shutil.rmtree(other / "model")
    config = json.loads((other / "config.json").read_text())
    config["train"]["seed"] = 7
    (other / "config.json").write_text(json.dumps(config))
    from experiments import vq_cifar

    again = ["train", "--workdir", str(other)]
    assert cli.main(vq_cifar.EXPERIMENT, again) == 0
    capsys.readouterr()
    assert main("sample", "--workdir", workdir, "--autoencoder", other) == 2
    assert "was trained with another autoencoder than that in" in refused_in(capsys)


def test_codes_are_kept_and_a_damaged_file_is_named(tmp_path, capsys, coder, monkeypatch):
    workdir = tmp_path / "run"
    assert main("train", "--workdir", workdir, "--autoencoder", coder) == 0
    (file,) = (workdir / "codes").glob("train-*.npy")
    codes = np.load(file)
    assert codes.shape == (648, 21)
    assert (codes.min(), codes.max() < 6) == (0, True)
    before = file.stat().st_mtime_ns
    assert main("evaluate", "--workdir", workdir) == 2  # no samples yet
    assert main("sample", "--workdir", workdir) == 0
    assert main("evaluate", "--workdir", workdir) == 0
    assert file.stat().st_mtime_ns == before
    (test,) = (workdir / "codes").glob("test-*.npy")
    content = bytearray(test.read_bytes())
    content[-1] ^= 1
    capsys.readouterr()
    head = content[: content.index(b"\n") + 1].replace(b", 21), ", b", 4294967296), ")
    head = head.replace(8 * b" ", b"", 1)
    pickled = bytes(content).replace(b"'<i4'", b"'|O8'")
    for damage in (bytes(content), bytes(content[:-8]), b"nothing", bytes(head), pickled):
        test.write_bytes(damage)
        if damage == head:  # of a terabyte, which takes no room on the disk
            os.truncate(test, len(head) + 4 * 4294967296 * len(np.load(file)) // 9)
        assert main("evaluate", "--workdir", workdir) == 2
        assert f"{test} is damaged: remove it" in refused_in(capsys)
    test.unlink()
    digest, hashed = checkpoint.digest, []
    monkeypatch.setattr(checkpoint, "digest", lambda value: hashed.append(value) or digest(value))
    assert main("evaluate", "--workdir", workdir) == 0
    whole = [value for value in hashed if value.shape[1:] == (21,)]
    assert len(whole) == 2, "what is there is read once, and what is written is not read again"
    capsys.readouterr()


def test_what_one_shot_loses_is_exact():
    codes = np.array([[0, 1], [1, 0]])  # the actor and the professor
    report = _exactly(codes, 2)
    assert report["distinct_codes_of_support"] == 2
    assert report["nats_of_codes_floor"] == pytest.approx(np.log(2))
    assert report["one_shot_mass_on_support"] == pytest.approx(0.5)
    scales = _exactly(np.array([[0, 0, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]), 2, (1, 2))
    assert scales["next_scale_mass_on_support"] == pytest.approx(1 / 3 + 2 / 3 * 0.5)
    assert scales["next_scale_nats_lost"] == pytest.approx(2 / 3 * np.log(2))


REFUSED = [
    ("--model.vocabulary 9", "follow from the codes and the prior: leave them as they are"),
    ("--sampler maskgit", "--sampler maskgit is not for --prior ar"),
    ("--prior one_shot --sampler maskgit --sampler.rounds 2", "draws in one round"),
    ("--prior one_shot --mask.halton 0.5", "mask.halton is for --prior masked"),
    ("--prior diffusion --sampler ddim --sampler.steps 5", "latents are not in [-1, 1]"),
    ("--prior diffusion --diffusion.variance learned", "no bound for a learned variance"),
    ("--prior masked --quantiser kl", "--prior masked is over codes, and a kl latent has"),
    ("--prior gan", "gan"),
    ("--sampler speculative", "--sampler speculative is not for --prior ar"),
    ("--model.groups 4 12 --model.context 16", "follow from the codes and the prior"),
    ("--prior next_scale", "--prior next_scale is over the codes of scales: set quantiser.scales"),
    ("--quantiser.scales 1 2", "end at 2 x 2, and the latents are 4 x 4"),
    (
        "--prior next_scale --quantiser.scales 1 2 4 --sampler sample --sampler.weights int8",
        "weights in int8 are for one token at a time",
    ),
    ("--data.palette", "an autoencoder takes RGB images"),
    ("--objective.critic.weight 1", "the critic starts at step 10000, and training ends at 2"),
    ("--autoencoder /nowhere", "no run in /nowhere"),
    ("--coder.widths 4 4 4 --coder.patch 8", "height and width must be multiples of 32"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_bad_input_is_refused_in_one_line(tmp_path, capsys, line, message):
    assert main(*line.split(), "--workdir", tmp_path / "run") == 2
    assert message in refused_in(capsys)
    assert not (tmp_path / "run").exists()


def test_latent_diffusion_is_exported_and_codes_are_not(tmp_path, capsys, finished):
    options = ("--prior", "diffusion", "--quantiser", "kl", "--train.preview-every", 0)
    assert main("train", "--workdir", tmp_path, *options) == 0
    assert main("export", "--workdir", tmp_path) == 0
    sampler, params = interop.load_diffusers_ldm(tmp_path / "diffusers", steps=20)
    ours = gen_jax.load(tmp_path)
    assert sampler.prior.solver == ours.sampler.prior.solver
    assert sampler.autoencoder.shape == (16, 16, 3)
    jax.tree.map(np.testing.assert_array_equal, params, ours.params)
    capsys.readouterr()
    assert main("export", "--workdir", finished) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: an LDMPipeline draws latents by diffusion, not codes"
    assert not (finished / "diffusers").exists()


def test_the_prior_names_the_preset():
    _, config = cli.parse(EXPERIMENT, ["--prior", "masked"])
    assert (config.workdir, config.prior) == ("runs/two_stage_masked", "masked")
    _, config = cli.parse(EXPERIMENT, ["--preset", "ar", "--prior", "masked"])
    assert config.workdir == "runs/two_stage_ar"
    assert config.decoding.rounds == 8
    assert dataclasses.replace(config, prior="ar").decoding == SamplingOptions()
