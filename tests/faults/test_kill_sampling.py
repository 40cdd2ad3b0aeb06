"""Samples of a run that was killed while it drew them, and drew on."""

import shutil
import signal

import numpy as np
import processes
import pytest

pytestmark = pytest.mark.long

OPTIONS = processes.MINUTE.replace("--sample.number 3", "--sample.number 200")


def images(workdir):
    with np.load(workdir / "samples.npz") as file:
        return file["images"]


def test_samples_are_those_of_a_run_that_was_not_killed(folder):
    experiment = processes.experiment(folder, OPTIONS)
    whole = experiment.run("all", "--workdir", "whole", "--train.steps", 2)
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(folder / "whole", folder / "killed")
    (folder / "killed" / "samples.npz").unlink()
    parts = folder / "killed" / "parts"
    with experiment.start("sample", "--workdir", "killed") as process:
        processes.wait_until(lambda: len(list(parts.glob("*/*.npz"))) > 10, process)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = {path: path.read_bytes() for path in parts.glob("*/*.npz")}
    assert 10 < len(kept) < 100
    again = experiment.run("sample", "--workdir", "killed")
    assert again.returncode == 0, again.stderr
    assert images(folder / "killed").tobytes() == images(folder / "whole").tobytes()
    assert not parts.exists()
