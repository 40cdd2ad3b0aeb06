import jax
import numpy as np
import pytest

from gen_jax import parallel, sampling, training
from gen_jax.config import TrainConfig
from gen_jax.models.diffusion import losses as diffusion
from gen_jax.models.diffusion.config import DiffusionConfig, SolverConfig
from gen_jax.models.diffusion.samplers import make_sampler
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.unet import Denoiser

PROCESS = DiffusionConfig(timesteps=10)
NETWORK = Denoiser(
    UNetConfig(
        widths=(4,), blocks=1, attention=(), groups=2, dropout=0.5, patch=4, channels=1,
        out_channels=1, classes=2,
    )
)  # fmt: skip


def test_the_check_of_keys_finds_one_used_twice():
    """Otherwise the tests below could not fail."""

    def twice(key):
        return jax.random.normal(key) + jax.random.uniform(key)

    with (
        jax.debug_key_reuse(True),
        pytest.raises(jax.errors.KeyReuseError),
    ):
        jax.jit(twice)(jax.random.key(0))


def shapes(function, *arguments):
    """What a function returns, as shapes and types; its use of keys is checked."""
    with jax.debug_key_reuse(True):
        return jax.eval_shape(jax.jit(function), *arguments)


def parameters():
    return shapes(lambda key: NETWORK.init(key, 8, 8), jax.random.key(0))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_key_is_used_twice_in_training(accumulate):
    config = TrainConfig(steps=2, batch=16, accumulate=accumulate, warmup=0)
    mesh = parallel.data_mesh()
    optimizer = training.make_optimizer(config)
    batch = {
        "image": jax.ShapeDtypeStruct((16, 8, 8, 1), np.uint8),
        "label": jax.ShapeDtypeStruct((16,), np.int32),
    }
    stop = jax.ShapeDtypeStruct((mesh.size,), np.int32)

    def loss(params, batch, keys):
        return diffusion.loss(PROCESS, NETWORK, params, batch, keys)

    state = shapes(lambda params: training.init_state(params, optimizer), parameters())
    step = training.make_step(loss, optimizer, config, mesh)
    with jax.debug_key_reuse(True):
        assert step.lower(state, batch, stop).as_text()


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("trajectory", [False, True])
def test_no_key_is_used_twice_in_sampling(solver, trajectory):
    config = SolverConfig(solver=solver, steps=3, eta=1.0)
    sampler = make_sampler(NETWORK, PROCESS, (8, 8, 1), config)
    label = jax.ShapeDtypeStruct((2,), np.int32)
    with jax.debug_key_reuse(True):
        keys = sampling.sample_keys(0, 0, 2)
        lowered = sampling.generate.lower(sampler, parameters(), keys, label, trajectory=trajectory)
    assert lowered.as_text()


def test_no_key_is_used_twice_in_the_bound():
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), np.uint8)
    labels = jax.ShapeDtypeStruct((2,), np.int32)

    def bound(params, image, label, keys):
        batch = {"image": image, "label": label}
        return diffusion.bits_per_dim(PROCESS, NETWORK, params, batch, keys, draws=2)

    keys = sampling.sample_keys(0, 0, 2)
    assert shapes(bound, parameters(), images, labels, keys)["bits_per_dim"].shape == (2,)
