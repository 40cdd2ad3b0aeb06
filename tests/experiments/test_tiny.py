"""The default jobs, whole: minutes long each, and their samples are of the data."""

import json

import pytest

from experiments import ddpm_cifar, gpt_pixels, gpt_text, masked_pixels
from gen_jax import cli


def perform(experiment, path):
    """The summary of the default job."""
    assert cli.main(experiment, ["--workdir", str(path / "run")]) == 0
    return json.loads((path / "run" / "summary.json").read_text())


@pytest.mark.slow
def test_the_default_job_draws_shapes(tmp_path):
    summary = perform(ddpm_cifar.EXPERIMENT, tmp_path)
    assert summary["validity"] >= 0.8
    assert summary["coverage"] >= 0.75 * summary["coverage_expected"]
    assert summary["tv_joint"] <= summary["tv_joint_expected"] + 0.1


@pytest.mark.slow
def test_the_default_job_of_pixels_is_near_the_floor(tmp_path):
    summary = perform(gpt_pixels.EXPERIMENT, tmp_path)
    assert 1 <= summary["nats_over_floor"] <= 1.1
    assert summary["validity"] >= 0.9
    assert summary["tv_joint"] <= summary["tv_joint_expected"] + 0.1


@pytest.mark.slow
def test_the_default_job_of_masked_pixels_draws_shapes(tmp_path):
    summary = perform(masked_pixels.EXPERIMENT, tmp_path)
    assert 1 <= summary["nats_over_floor"] <= 1.25
    assert summary["validity"] >= 0.7
    assert summary["tv_joint"] <= summary["tv_joint_expected"] + 0.15


@pytest.mark.slow
def test_the_default_job_of_text_writes_words(tmp_path):
    summary = perform(gpt_text.EXPERIMENT, tmp_path)
    assert summary["nats_per_token"] <= 1.4
    assert summary["known_words"] >= 0.8
    assert summary["distinct_2"] >= 0.5
