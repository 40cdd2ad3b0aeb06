"""Two processes on loopback give the loss curve of one."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[4]))
import numpy as np
from gen_jax import parallel, training
from gen_jax.config import DistributedConfig, TrainConfig
from gen_jax.models import diffusion
from gen_jax.models.config import DiffusionConfig
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.unet import Denoiser
from gen_jax.workdir import Workdir
from gen_jax.data import ShapesSet

path, processes, index, _, port = sys.argv[1:]
coordinator = f"127.0.0.1:{port}" if processes != "1" else ""
parallel.start(DistributedConfig(coordinator, int(processes), int(index)))
assert len(jax.devices()) == 8 and jax.process_count() == int(processes)
network = Denoiser(UNetConfig(widths=(4, 4), blocks=1, attention=(), groups=2, dropout=0.2))
images = ShapesSet().as_images()
shard = (jax.process_index(), jax.process_count())
training.fit(
    TrainConfig(steps=6, batch=16, learning_rate=1e-2, warmup=1, log_every=1, checkpoint_every=3),
    lambda params, batch, keys: diffusion.loss(DiffusionConfig(), network, params, batch, keys),
    network.init(jax.random.key(0), 16, 16),
    lambda step: {"image": images.batch(0, step, 16, flip=True, shard=shard)["image"]},
    Workdir(path),
    mesh=parallel.data_mesh(),
)
"""


def run(path, processes, port):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(path), str(processes), str(index),
             str(8 // processes), str(port)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(processes)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_of_four_devices_are_one_of_eight(tmp_path, port):
    one = run(tmp_path / "one", 1, port)
    two = run(tmp_path / "two", 2, port)
    assert len(one) == 6
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert len(set(one)) == 6
