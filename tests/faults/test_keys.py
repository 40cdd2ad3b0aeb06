import jax
import numpy as np
import pytest

from gen_jax import parallel, sampling, training
from gen_jax.condition import Condition
from gen_jax.config import TrainConfig
from gen_jax.models.contract import abstract_params
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.losses import DiffusionModel
from gen_jax.models.diffusion.samplers import DiffusionSampler
from gen_jax.models.diffusion.solvers import DDIM, Ancestral
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.unet import UNetNetwork
from gen_jax.trainables import ModelTrainable

NETWORK = UNetNetwork(
    UNetConfig(
        widths=(4,),
        blocks=1,
        attention=(),
        groups=2,
        dropout=0.5,
        patch=4,
        channels=1,
        out_channels=1,
        classes=2,
    )
)
MODEL = DiffusionModel(NETWORK, DiffusionConfig(timesteps=10), (8, 8, 1))


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


def test_no_key_is_used_twice_in_fresh_parameters():
    assert jax.tree.leaves(shapes(MODEL.init, jax.random.key(0)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_key_is_used_twice_in_training(accumulate):
    config = TrainConfig(steps=2, batch=16, accumulate=accumulate, warmup=0)
    mesh, trainable = parallel.data_mesh(), ModelTrainable(MODEL, config)
    batch = {
        "image": jax.ShapeDtypeStruct((16, 8, 8, 1), np.uint8),
        "label": jax.ShapeDtypeStruct((16,), np.int32),
    }
    stop = jax.ShapeDtypeStruct((mesh.size,), np.int32)
    with jax.debug_key_reuse(True):
        state = training.abstract_state(config, trainable)
    step = training.make_step(trainable, config, mesh)
    with jax.debug_key_reuse(True):
        assert step.lower(state, batch, stop).as_text()


@pytest.mark.parametrize("solver", [Ancestral(steps=3), DDIM(steps=3, eta=1.0)])
@pytest.mark.parametrize("trajectory", [None, lambda state: state.x])
def test_no_key_is_used_twice_in_sampling(solver, trajectory):
    sampler = DiffusionSampler(MODEL, solver)

    def draw(params, label):
        keys, cond = sampling.sample_keys(0, 0, 2), Condition(label=label)
        return sampling.generate(sampler, params, keys, cond, trajectory=trajectory)

    assert shapes(draw, abstract_params(MODEL), jax.ShapeDtypeStruct((2,), np.int32))


def test_no_key_is_used_twice_in_the_bound():
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), np.uint8)
    labels = jax.ShapeDtypeStruct((2,), np.int32)

    def bound(params, image, label, keys):
        return MODEL.bits_per_dim(params, {"image": image, "label": label}, keys, draws=2)

    keys = sampling.sample_keys(0, 0, 2)
    found = shapes(bound, abstract_params(MODEL), images, labels, keys)
    assert found["bits_per_dim"].shape == (2,)
