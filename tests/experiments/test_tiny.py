"""The default job, whole: minutes long, and its samples are of the data."""

import json

import pytest

from experiments import common
from experiments.ddpm_cifar import EXPERIMENT


@pytest.mark.slow
def test_the_default_job_draws_shapes(tmp_path):
    assert common.main(EXPERIMENT, ["--workdir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validity"] >= 0.8
    assert summary["coverage"] >= 0.75 * summary["coverage_expected"]
    assert summary["tv_joint"] <= summary["tv_joint_expected"] + 0.1
