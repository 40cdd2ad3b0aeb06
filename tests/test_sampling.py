"""generate and generate_many: a sample depends on its seed and number alone."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import gen_jax
from annotations import unchecked_annotations
from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.models.diffusion import Ancestral, DiffusionConfig, DiffusionModel, DiffusionSampler
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.unet import UNetNetwork


@dataclasses.dataclass(frozen=True)
class Noise:
    """What a walk is made of, as a model with a network to be counted."""

    def __call__(self, keys, i):
        fold = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), (16,)))
        return fold(keys)


@dataclasses.dataclass(frozen=True)
class Walk:
    """x += N(0, 1) + label, four times: elementwise, so that bits can be compared.

    A sample has 16 numbers, a whole number of vector registers: what is left over in a batch of
    ragged ones is computed by other instructions, which may round otherwise.
    """

    steps: int = 4
    nfe: int = 4
    model: Noise = Noise()
    conditions = ("label", "given", "is_given")

    def check(self, params, cond):
        pass

    def prepare(self, params):
        return params

    def init(self, params, keys, cond):
        return {"x": jnp.full((keys.shape[0], 16), params), "keys": keys, "cond": cond}

    def step(self, params, state, i):
        label = state["cond"].label
        shift = 0.0 if label is None else label[:, None].astype(jnp.float32)
        return state | {"x": state["x"] + self.model(state["keys"], i) + shift}

    def finish(self, params, state):
        cond, x = state["cond"], state["x"]
        return x if cond.given is None else jnp.where(cond.is_given, cond.given, x)


def position(state):
    return state["x"]


def collect(*args, **kwargs):
    return np.concatenate([chunk.samples for chunk in sampling.generate_many(*args, **kwargs)])


@pytest.fixture(scope="module")
def unet():
    config = UNetConfig(widths=(8, 16), blocks=1, attention=(4,), groups=4, dropout=0.0)
    model = DiffusionModel(UNetNetwork(config), DiffusionConfig(), (8, 8, 3))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32),
        model.init(jax.random.key(0)),
    )
    return DiffusionSampler(model, Ancestral(steps=2)), params


def test_bits_do_not_change_with_the_batch():
    keys = sampling.sample_keys(7, 0, 64)
    whole = np.asarray(sampling.generate(Walk(), 1.0, keys))
    for size in (1, 7):
        np.testing.assert_array_equal(sampling.generate(Walk(), 1.0, keys[:size]), whole[:size])
    for micro_batch in (1, 7, 64):
        np.testing.assert_array_equal(collect(Walk(), 1.0, 7, 64, micro_batch=micro_batch), whole)


def test_bits_do_not_change_with_a_request_of_one_shape_and_else_by_rounding(unet):
    """Through a network: 9 and 16 samples are drawn 16 at a time, 7 are drawn 8 at a time."""
    sampler, params = unet
    whole = collect(sampler, params, 3, 32, micro_batch=16)
    middle = collect(sampler, params, 3, 9, micro_batch=16, start=20)
    np.testing.assert_array_equal(middle, whole[20:29])
    part = collect(sampler, params, 3, 7, micro_batch=16)
    np.testing.assert_allclose(part, whole[:7], atol=5e-5)
    alone = sampling.generate(sampler, params, sampling.sample_keys(3, 0, 1))
    np.testing.assert_allclose(alone, whole[:1], atol=5e-5)


@pytest.mark.parametrize(
    ("number", "micro_batch", "devices", "size"),
    [
        (16, 64, 1, 16),
        (17, 64, 1, 32),
        (33, 64, 1, 64),
        (1000, 64, 1, 64),
        (1, 64, 1, 1),
        (3, 7, 1, 4),
        (1, 1, 1, 1),
        (3, 64, 8, 8),
        (20, 12, 8, 16),
    ],
)
def test_a_short_request_is_not_padded_to_the_micro_batch(number, micro_batch, devices, size):
    assert sampling.size_for(number, micro_batch, devices) == size


def test_an_equal_request_does_not_compile_again(monkeypatch):
    compiled, real = [], sampling.compile_generate

    def counting(*arguments, **options):
        compiled.append(arguments[0])
        return real(*arguments, **options)

    monkeypatch.setattr(sampling, "compile_generate", counting)
    walk = Walk(steps=3, nfe=3)
    first = list(sampling.generate_many(walk, 0.0, 0, 5, micro_batch=8))
    again = list(sampling.generate_many(Walk(steps=3, nfe=3), 1.0, 9, 8, micro_batch=8))
    assert compiled == [walk]
    assert first[0].compile_seconds > 0 == again[0].compile_seconds
    list(sampling.generate_many(walk, 0.0, 0, 2, micro_batch=8))
    assert compiled == [walk, walk]  # another shape


@pytest.mark.parametrize("count", [1, 2, 8])
def test_devices(unet, count):
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
    cond = Condition(label=np.arange(20, dtype=np.int32))
    one = collect(Walk(), 0.0, 5, 20, cond=cond, micro_batch=16)
    many = collect(Walk(), 0.0, 5, 20, cond=cond, micro_batch=16, mesh=mesh)
    np.testing.assert_array_equal(many, one)  # the noise is the same to the bit
    sampler, params = unet
    one = collect(sampler, params, 5, 10, micro_batch=16)
    many = collect(sampler, params, 5, 10, micro_batch=16, mesh=mesh)
    np.testing.assert_allclose(many, one, atol=5e-5)


def test_conditions_follow_their_samples():
    shift = 100 * np.arange(10, dtype=np.int32)
    with_cond = collect(Walk(), 0.0, 0, 10, cond=Condition(label=shift), micro_batch=4)
    without = collect(Walk(), 0.0, 0, 10, micro_batch=4)
    np.testing.assert_allclose(with_cond - without, np.repeat(4 * shift[:, None], 16, 1), rtol=1e-4)


def test_a_trajectory_is_a_function_of_the_state_and_ends_in_the_sample():
    keys = sampling.sample_keys(1, 0, 5)
    samples, values = sampling.generate(Walk(), 2.0, keys, trajectory=position)
    assert values.shape == (4, 5, 16)
    np.testing.assert_array_equal(values[-1], samples)
    np.testing.assert_array_equal(sampling.generate(Walk(), 2.0, keys), samples)
    lowered = sampling._generate.lower(Walk(), 2.0, keys, Condition(), position)
    assert [leaf.shape for leaf in jax.tree.leaves(lowered.out_info)] == [(5, 16), (4, 5, 16)]


def test_seeds_and_numbers_give_different_samples():
    drawn = [collect(Walk(), 0.0, seed, 8, micro_batch=8) for seed in (0, 1)]
    assert len({row.tobytes() for rows in drawn for row in rows}) == 16


def test_chunks_are_in_order_and_the_first_compiles():
    walk = Walk(steps=2, nfe=2)
    chunks = list(sampling.generate_many(walk, 0.0, 0, 10, micro_batch=4, start=3))
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
    monkeypatch.setattr(sampling, "_programs", type(sampling._programs)())
    with pytest.warns(UserWarning, match="samples at a time instead") as caught:
        samples = collect(Walk(), 0.0, 0, 20, micro_batch=8)
    assert len(caught) == 2
    np.testing.assert_array_equal(samples, expected)


def test_other_errors_and_the_last_sample_are_not_retried(monkeypatch):
    def broken(sampler, params, keys, cond, mesh):
        raise jax.errors.JaxRuntimeError(f"{message}: {len(keys)}")

    monkeypatch.setattr(sampling, "compile_generate", broken)
    monkeypatch.setattr(sampling, "_programs", type(sampling._programs)())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = "INTERNAL"
        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: 8"):
            collect(Walk(), 0.0, 0, 20, micro_batch=8)
        message = "RESOURCE_EXHAUSTED"
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED: 1"):
            collect(Walk(), 0.0, 0, 20, micro_batch=8)


KEYS = sampling.sample_keys(0, 0, 2)


@pytest.mark.parametrize(
    ("keys", "cond", "message"),
    [
        (jax.random.key(0), None, "keys must be \\[B\\], one for each sample"),
        (np.arange(3), None, "keys must be PRNG keys"),
        (KEYS[:0], None, "at least one"),
        (KEYS, {"label": np.zeros(2, np.int32)}, "must be a gen_jax.Condition, not dict"),
        (KEYS, Condition(label=[0, 1]), "'label' must be an array of 2 rows"),
        (KEYS, Condition(label=np.zeros(3, np.int32)), "'label' must be an array of 2 rows"),
        (KEYS, Condition(label=np.zeros(2)), "'label' must be integers"),
        (KEYS, Condition(length=np.ones(2, np.int32)), "Walk has no use for the condition"),
        (KEYS, Condition(given=np.ones((2, 16))), "'given' goes with 'is_given'"),
    ],
)
def test_what_does_not_fit_is_a_sentence(keys, cond, message):
    with unchecked_annotations(), pytest.raises(ValueError, match=message):
        sampling.generate(Walk(), 0.0, keys, cond)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        collect(Walk(), 0.0, 0, 0)
    with pytest.raises(ValueError, match="count at least 1"):
        sampling.sample_keys(0, 0, 0)


def test_parameters_of_another_network_are_refused(unet):
    sampler, params = unet
    keys = sampling.sample_keys(0, 0, 1)
    with pytest.raises(ValueError, match="is unknown"):
        sampling.generate(sampler, params | {"more": np.zeros(1)}, keys)
    with pytest.raises(ValueError, match="pass what is in it"):
        sampling.generate(sampler, {"params": params}, keys)


class AsBatch(Walk):
    def step(self, params, state, i):
        return state | {"x": state["x"] + self.model(state["keys"], i) + len(state["keys"])}


class TwiceTheKey(Walk):
    def step(self, params, state, i):
        noise = jax.vmap(lambda key: jax.random.normal(key, (16,)))
        self.model(state["keys"], i)
        return state | {"x": state["x"] + noise(state["keys"]) + noise(state["keys"])}


class Forgetful(Walk):
    def finish(self, params, state):
        return state["x"]


class ByTheLoop(Walk):
    """Its step counts how often it was traced."""

    traced = 0

    def step(self, params, state, i):
        ByTheLoop.traced += 1
        return state | {"x": state["x"] + self.model(state["keys"], i) * ByTheLoop.traced}


def test_the_laws_of_samplers_hold_and_are_noticed_where_they_do_not():
    given = np.arange(16) < 3
    cond = Condition(
        given=np.ones((6, 16), np.float32), is_given=np.broadcast_to(given, (6, 16)).copy()
    )
    samples = gen_jax.check_sampler(Walk(), 0.0, cond)
    assert samples.shape == (6, 16)
    for sampler, law in (
        (AsBatch(), "a sample depends on its batch"),
        (Walk(nfe=3), "4 evaluations of the network, and nfe says 3"),
        (Forgetful(), "a value that was given has changed"),
        (ByTheLoop(), "the jitted loop and the Python loop differ"),
    ):
        with pytest.raises(AssertionError, match=law):
            gen_jax.check_sampler(sampler, 0.0, cond)
    with pytest.raises(Exception, match=r"[Kk]ey"):
        gen_jax.check_sampler(TwiceTheKey(), 0.0, cond)
