"""generate and generate_many: a sample depends on its seed and number alone."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from gen_jax import sampling
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.samplers import Ancestral, DiffusionSampler, TimeGrid
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.unet import Denoiser


@dataclasses.dataclass(frozen=True)
class Walk:
    """x += N(0, 1) + cond, four times: elementwise, so that bits can be compared.

    A sample has 16 numbers, a whole number of vector registers: what is left over in a batch of
    ragged ones is computed by other instructions, which may round otherwise.
    """

    steps: int = 4
    nfe: int = 4

    def prepare(self, params):
        return params

    def init(self, params, keys, cond):
        return {"x": jnp.full((keys.shape[0], 16), params), "keys": keys, "cond": cond}

    def step(self, params, state, i):
        def noise(key):
            return jax.random.normal(jax.random.fold_in(key, i), (16,))

        shift = 0.0 if state["cond"] is None else state["cond"][:, None]
        return state | {"x": state["x"] + jax.vmap(noise)(state["keys"]) + shift}

    def finish(self, params, state):
        return state["x"]


def collect(*args, **kwargs):
    return np.concatenate([chunk.samples for chunk in sampling.generate_many(*args, **kwargs)])


@pytest.fixture(scope="module")
def unet():
    config = UNetConfig(widths=(8, 16), blocks=1, attention=(4,), groups=4, dropout=0.0)
    denoiser = Denoiser(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32),
        denoiser.init(jax.random.key(0), 8, 8),
    )
    return DiffusionSampler(
        denoiser, DiffusionConfig(), (8, 8, 3), TimeGrid(5), Ancestral()
    ), params


def test_bits_do_not_change_with_the_batch():
    keys = sampling.sample_keys(7, 0, 64)
    whole = np.asarray(sampling.generate(Walk(), 1.0, keys))
    for size in (1, 7):
        np.testing.assert_array_equal(sampling.generate(Walk(), 1.0, keys[:size]), whole[:size])
    for micro_batch in (1, 7, 64):
        np.testing.assert_array_equal(collect(Walk(), 1.0, 7, 64, micro_batch=micro_batch), whole)


def test_bits_do_not_change_with_the_request_through_a_network(unet):
    sampler, params = unet
    whole = collect(sampler, params, 3, 64, micro_batch=16)
    for number in (1, 7):
        part = collect(sampler, params, 3, number, micro_batch=16)
        np.testing.assert_array_equal(part, whole[:number])
    middle = collect(sampler, params, 3, 9, micro_batch=16, start=20)
    np.testing.assert_array_equal(middle, whole[20:29])


def test_batches_of_a_network_agree_to_rounding(unet):
    sampler, params = unet
    whole = collect(sampler, params, 3, 64, micro_batch=64)
    for size in (1, 7):
        part = sampling.generate(sampler, params, sampling.sample_keys(3, 0, size))
        np.testing.assert_allclose(part, whole[:size], atol=5e-5)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_devices(unet, count):
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
    labels = np.arange(20, dtype=np.float32)
    one = collect(Walk(), 0.0, 5, 20, cond=labels, micro_batch=16)
    many = collect(Walk(), 0.0, 5, 20, cond=labels, micro_batch=16, mesh=mesh)
    np.testing.assert_array_equal(many, one)  # the noise is the same to the bit
    sampler, params = unet
    one = collect(sampler, params, 5, 10, micro_batch=16)
    many = collect(sampler, params, 5, 10, micro_batch=16, mesh=mesh)
    np.testing.assert_allclose(many, one, atol=5e-5)


def test_conditions_follow_their_samples():
    shift = 100.0 * np.arange(10, dtype=np.float32)
    with_cond = collect(Walk(), 0.0, 0, 10, cond=shift, micro_batch=4)
    without = collect(Walk(), 0.0, 0, 10, micro_batch=4)
    np.testing.assert_allclose(with_cond - without, np.repeat(4 * shift[:, None], 16, 1), rtol=1e-4)


def test_trajectory_ends_in_the_sample():
    keys = sampling.sample_keys(1, 0, 5)
    samples, states = sampling.generate(Walk(), 2.0, keys, trajectory=True)
    assert states["x"].shape == (4, 5, 16)
    np.testing.assert_array_equal(states["x"][-1], samples)
    np.testing.assert_array_equal(sampling.generate(Walk(), 2.0, keys), samples)


def test_seeds_and_numbers_give_different_samples():
    drawn = [collect(Walk(), 0.0, seed, 8, micro_batch=8) for seed in (0, 1)]
    assert len({row.tobytes() for rows in drawn for row in rows}) == 16


def test_chunks_are_in_order_and_the_first_compiles():
    chunks = list(sampling.generate_many(Walk(), 0.0, 0, 10, micro_batch=4, start=3))
    assert [chunk.start for chunk in chunks] == [3, 7, 11]
    assert [len(chunk.samples) for chunk in chunks] == [4, 4, 2]
    assert [chunk.compile_seconds > 0 for chunk in chunks] == [True, False, False]


def test_running_out_of_memory_halves_the_micro_batch(monkeypatch):
    expected, real = collect(Walk(), 0.0, 0, 20, micro_batch=8), sampling.compile_generate

    def small_device(sampler, params, keys, cond, mesh):
        if len(keys) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(sampler, params, keys, cond, mesh=mesh)

    monkeypatch.setattr(sampling, "compile_generate", small_device)
    with pytest.warns(UserWarning, match="drawing 2 samples at a time") as caught:
        samples = collect(Walk(), 0.0, 0, 20, micro_batch=8)
    assert len(caught) == 2
    np.testing.assert_array_equal(samples, expected)


def test_other_errors_and_the_last_sample_are_not_retried(monkeypatch):
    def broken(sampler, params, keys, cond, mesh):
        raise jax.errors.JaxRuntimeError(f"{message}: {len(keys)}")

    monkeypatch.setattr(sampling, "compile_generate", broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = "INTERNAL"
        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: 8"):
            collect(Walk(), 0.0, 0, 20, micro_batch=8)
        message = "RESOURCE_EXHAUSTED"
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED: 1"):
            collect(Walk(), 0.0, 0, 20, micro_batch=8)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        collect(Walk(), 0.0, 0, 0)
