"""What an accelerator draws is what a CPU draws."""

import jax
import numpy as np
import pytest

from gen_jax import sampling
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.losses import DiffusionModel
from gen_jax.models.diffusion.samplers import DiffusionSampler
from gen_jax.models.diffusion.solvers import DDIM
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.unet import UNetNetwork


@pytest.mark.gpu
@pytest.mark.usefixtures("optimised")
def test_samples_agree_with_the_cpu():
    accelerator, cpu = jax.devices()[0], jax.local_devices(backend="cpu")[0]
    assert accelerator.platform != "cpu", "no accelerator: run this on a machine that has one"
    network = UNetNetwork(UNetConfig(widths=(32, 64), attention=(8,), dropout=0.0))
    model, rng = DiffusionModel(network, DiffusionConfig(), (16, 16, 3)), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.02 * rng.normal(size=leaf.shape).astype(np.float32),
        jax.device_get(model.init(jax.random.key(0))),
    )
    sampler = DiffusionSampler(model, DDIM(steps=10, spacing="trailing"))
    drawn = []
    with jax.default_matmul_precision("highest"):
        for device in (cpu, accelerator):
            with jax.default_device(device):
                keys = sampling.sample_keys(0, 0, 4)
                drawn.append(np.asarray(sampling.generate(sampler, params, keys)))
    np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-2)
