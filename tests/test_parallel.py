"""Two processes on loopback are as one."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from experiments import ddpm_cifar
from gen_jax import cli
from gen_jax.workdir import Workdir

OPTIONS = (
    "--data.flip --model.widths 8 --model.groups 4 --model.attention --model.patch 4 "
    "--model.dropout 0.2 --train.steps 6 --train.batch 16 --train.warmup 1 "
    "--train.learning-rate 0.01 --train.log-every 1 --train.checkpoint-every 3 "
    "--sample.number 12 --sample.micro-batch 4 --sampler.steps 4 "
    "--evaluate.images 20 --evaluate.draws 2 --evaluate.batch 4"
)


# One host reads its data and compiles for longer than a collective waits.
LATE = """
import time
from experiments import ddpm_cifar
from gen_jax import cli, hosts
meet = hosts.meet
hosts.meet = lambda place: (time.sleep(35), meet(place))
raise SystemExit(cli.main(ddpm_cifar.EXPERIMENT))
"""


def start(path, processes, index, port, command="train", program=("-m", "experiments.ddpm_cifar")):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": (
            f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={4 // processes}"
        ),
    }
    distributed = (
        f"--distributed.coordinator 127.0.0.1:{port} --distributed.processes {processes} "
        f"--distributed.index {index}"
    )
    options = OPTIONS.split() + (distributed.split() if processes > 1 else [])
    return subprocess.Popen(
        [sys.executable, *program, command, "--workdir", str(path), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(path, processes, port):
    started = [start(path, processes, index, port, "all") for index in range(processes)]
    return losses(path, started)


def results_of(path):
    """The samples, which are drawn by all processes, and the figures of the test set."""
    assert not (path / "parts").exists()
    with np.load(path / "samples.npz") as file:
        samples = file["images"]
    summary = json.loads((path / "summary.json").read_text())
    assert summary["samples"] == len(samples) == 12
    return samples, [summary["bits_per_dim"], summary["bits_per_dim_standard_error"]]


def losses(path, started):
    outputs = [process.communicate(timeout=300)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    lines = (path / "model" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.long
def test_two_processes_of_two_devices_are_one_of_four(tmp_path, port):
    """They train, sample and evaluate."""
    one = run(tmp_path / "one", 1, port)
    two = run(tmp_path / "two", 2, port)
    assert len(set(one)) == len(one) == 6
    np.testing.assert_allclose(two, one, rtol=1e-5)
    results = [results_of(tmp_path / name) for name in ("one", "two")]
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=1e-4, atol=1e-4)

    # One process goes on with the run of two, without being told that there were two.
    assert "distributed" not in json.loads((tmp_path / "two" / "config.json").read_text())
    shutil.rmtree(tmp_path / "two" / "model" / "checkpoints" / "6")
    np.testing.assert_allclose(run(tmp_path / "two", 1, port), one, rtol=1e-5)


@pytest.mark.slow
def test_a_host_waits_for_one_that_is_late(tmp_path, port):
    early = start(tmp_path, 2, 0, port)
    late = start(tmp_path, 2, 1, port, program=("-c", LATE))
    assert len(losses(tmp_path, [early, late])) == 6


def test_several_hosts_do_not_export(tmp_path, port):
    Workdir(tmp_path).write_json("config.json", cli.stored_form(ddpm_cifar.TINY))
    process = start(tmp_path, 2, 0, port, "export")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert "several hosts train, sample, evaluate; run export on one of them" in output
