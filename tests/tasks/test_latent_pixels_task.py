"""One-shot decoders of pixels with a shared latent, end to end with the least of training."""

import dataclasses

import numpy as np
import pytest

from experiments.gpt_pixels import PATCHES
from gen_jax import cli
from gen_jax.models.parallel.config import LatentConfig
from gen_jax.tasks.images.config import LabelledSampleConfig
from gen_jax.tasks.latent_pixels.config import LatentPixelsConfig
from gen_jax.tasks.masked_pixels.config import EvaluateConfig
from miniature import TRAIN, arrays, summary

MINUTE = LatentPixelsConfig(
    workdir="runs/latent",
    data=PATCHES.data,
    patch=4,
    model=dataclasses.replace(PATCHES.model, layers=1, width=16, heads=2, causal=False),
    latent=LatentConfig(kind="gaussian", size=3, free_nats=2.0),
    train=TRAIN,
    sample=LabelledSampleConfig(number=4),
    evaluate=EvaluateConfig(images=16, draws=2, batch=8),
)
MINIATURE = cli.Experiment(name="latent", about="A test.", presets={"minute": MINUTE})
pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.long]


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_it_trains_samples_and_evaluates(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(MINIATURE, ["--latent.kind", kind]) == 0, capsys.readouterr().err
    place = tmp_path / "runs" / "latent"
    figures, kept = summary(place), arrays(place)
    assert kept["images"].shape == (4, 16, 16)
    assert kept["nfe"] == 2
    assert figures["nfe"] == 2
    assert figures["nats_per_image"] > figures["nats_per_image_floor"]
    assert ("nats_of_latent" in figures) == (kind == "gaussian")
    assert 0 <= figures["validity"] <= 1
    if kind == "gaussian":  # the bound counts the latent whole, whatever is free in training
        assert 0 <= figures["nats_of_latent"] < figures["nats_per_image"]
        assert np.isfinite(figures["nats_of_latent"])


def test_classes_are_refused(tmp_path, capsys):
    place = str(tmp_path / "run")
    assert cli.main(MINIATURE, ["--conditional", "--workdir", place]) == 2
    assert "leave conditional off" in capsys.readouterr().err
