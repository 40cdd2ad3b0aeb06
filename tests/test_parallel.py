"""Two processes on loopback train as one does."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

OPTIONS = (
    "--data.flip --model.widths 8 --model.groups 4 --model.attention --model.patch 4 "
    "--model.dropout 0.2 --train.steps 6 --train.batch 16 --train.warmup 1 "
    "--train.learning-rate 0.01 --train.log-every 1 --train.checkpoint-every 3"
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
    return losses(path, [start(path, processes, index, port) for index in range(processes)])


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


def test_two_processes_of_two_devices_are_one_of_four(tmp_path, port):
    one = run(tmp_path / "one", 1, port)
    two = run(tmp_path / "two", 2, port)
    assert len(set(one)) == len(one) == 6
    np.testing.assert_allclose(two, one, rtol=1e-5)

    # One process goes on with the run of two, without being told that there were two.
    assert "distributed" not in json.loads((tmp_path / "two" / "config.json").read_text())
    shutil.rmtree(tmp_path / "two" / "model" / "checkpoints" / "6")
    np.testing.assert_allclose(run(tmp_path / "two", 1, port), one, rtol=1e-5)


@pytest.mark.slow
def test_a_host_waits_for_one_that_is_late(tmp_path, port):
    early = start(tmp_path, 2, 0, port)
    late = start(tmp_path, 2, 1, port, program=("-c", LATE))
    assert len(losses(tmp_path, [early, late])) == 6


def test_several_hosts_only_train(tmp_path, port):
    process = start(tmp_path, 2, 0, port, "all")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert "several hosts train together; sample and evaluate on one of them" in output
