"""Next-scale prediction: exact on the pyramid of bits, trained on it, and the laws of samplers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.data.exact_sets import BinaryPyramid
from gen_jax.models.autoregressive.config import SamplingOptions
from gen_jax.models.next_scale import NextScaleModel, NextScaleSampler, network_sizes
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.testing import check_sampler
from random_networks import random_params


def model_of(vocabulary, scales, classes=0, **sizes):
    sizes = {"layers": 1, "width": 16, "heads": 2, "mlp_dim": 32} | sizes
    sizes |= network_sizes(vocabulary, scales, classes)
    return NextScaleModel(TokenNetwork(TransformerConfig(**sizes)), scales)


MODEL = model_of(5, (1, 2, 2), classes=3)


@functools.cache
def params_of_model():
    return random_params(MODEL.network.config)


def samples(model, params, seed, number):
    """Unconditional samples."""
    keys = sampling.sample_keys(seed, 0, number)
    return np.asarray(sampling.generate(NextScaleSampler(model), params, keys))


def exact_pyramid(levels, flip):
    """A network whose conditionals are those of a pyramid: a linear map of the input alone."""
    model = model_of(2, tuple(2**level for level in range(levels)), tied=False)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    params["norm"]["scale"] = jnp.ones_like(params["norm"]["scale"])
    inputs = model.network.config.vocabulary + model.network.config.extra_inputs
    embedding = np.random.default_rng(0).normal(size=(inputs, 16))
    wanted = np.log(np.array([[1 - flip, flip], [flip, 1 - flip]] * (levels - 1) + [[0.5, 0.5]]))
    centred = embedding - embedding.mean(1, keepdims=True)
    normed = centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + 1e-5)
    params["token"] = jnp.asarray(embedding, jnp.float32)
    params["head"] = jnp.asarray(np.linalg.pinv(normed) @ wanted, jnp.float32)
    return model, params


@pytest.mark.long
def test_a_pyramid_drawn_scale_by_scale_has_no_gap():
    """The cascade of sides 1, 2, 4, 8 takes four evaluations; all at once would lose 30.917."""
    pyramid = BinaryPyramid(4, 0.1)
    model, params = exact_pyramid(4, 0.1)
    assert NextScaleSampler(model).nfe == NextScaleSampler(model).steps == 4
    drawn = samples(model, params, 0, 2000)
    assert drawn.shape == (2000, 85)
    log_prob = model.log_prob(params, {"tokens": drawn})
    np.testing.assert_allclose(log_prob, pyramid.log_prob(drawn), rtol=1e-5)
    gap = -np.asarray(log_prob, np.float64).mean() - pyramid.entropy
    assert abs(gap) < 4 * np.asarray(log_prob).std() / 2000**0.5
    assert pyramid.one_shot_gap > 30


def test_samples_of_the_small_pyramid_have_its_distribution():
    dist = BinaryPyramid(2, 0.2).data
    model, params = exact_pyramid(2, 0.2)
    drawn = samples(model, params, 1, 4000)
    places = drawn @ (1 << np.arange(4, -1, -1))
    counts = np.bincount(places, minlength=32)
    assert stats.chisquare(counts, 4000 * dist.dense().ravel()).pvalue > 1e-3


@pytest.mark.long
def test_a_trained_network_learns_the_pyramid_to_its_entropy():
    pyramid = BinaryPyramid(4, 0.1)
    model = model_of(2, (1, 2, 4, 8))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 120))
    data = jnp.asarray(pyramid.batch(0, 0, 120 * 32)["tokens"]).reshape(120, 32, 85)

    def step(carry, tokens):
        params, state = carry
        gradients = jax.grad(lambda params: model.loss(params, {"tokens": tokens}, None)[0])(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), None

    params = model.init(jax.random.key(0))
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, data)[0])
    params, _ = run((params, optimizer.init(params)))
    fresh = pyramid.batch(0, 1, 1000)["tokens"]
    lost = pyramid.log_prob(fresh) - np.asarray(model.log_prob(params, {"tokens": fresh}))
    assert -0.05 < lost.mean() < 0.5, "nats; all at once they are 30.9"
    drawn = samples(model, params, 0, 500)
    assert abs(pyramid.log_prob(drawn).mean() + pyramid.entropy) < 1.5


@pytest.mark.parametrize("label", [0, 2])
def test_cached_scales_have_the_logits_of_the_whole_sequence(label):
    """What a sampler draws is likely as the model says, scale by scale."""
    params, labels = params_of_model(), np.full(3, label)
    sampler = NextScaleSampler(MODEL, SamplingOptions(temperature=0))
    cond = Condition(label=labels)
    drawn = np.asarray(sampling.generate(sampler, params, sampling.sample_keys(0, 0, 3), cond))
    parts = [MODEL.inputs(i, drawn, labels) for i in range(3)]
    logits = MODEL.network(params, jnp.concatenate(parts, axis=1))
    np.testing.assert_array_equal(drawn, logits.argmax(-1))


def test_a_token_sees_coarser_scales_and_not_its_own():
    params = params_of_model()
    tokens = np.random.default_rng(0).integers(0, 5, (1, 9))
    base = MODEL._nats(params, {"tokens": tokens}, None)
    for place, scale_end in ((0, 1), (3, 5)):
        changed = tokens.copy()
        changed[0, place] = (changed[0, place] + 1) % 5
        values = MODEL._nats(params, {"tokens": changed}, None)
        same = np.delete(np.arange(scale_end), place)
        np.testing.assert_array_equal(values[0, same], base[0, same])
        assert (np.abs(values[0, scale_end:] - base[0, scale_end:]) > 1e-6).all()


def test_the_input_of_a_position_is_the_token_that_covers_it():
    model = model_of(5, (1, 2, 4, 4), classes=3)
    first = np.arange(1, 5).reshape(2, 2)
    np.testing.assert_array_equal(model.parents(1), np.zeros(4))
    np.testing.assert_array_equal(model.parents(2), first.repeat(2, 0).repeat(2, 1).ravel())
    np.testing.assert_array_equal(model.parents(3), np.arange(5, 21))
    tokens = np.arange(37)[None] % 5
    np.testing.assert_array_equal(model.inputs(2, tokens)[0], tokens[0, model.parents(2)] + 5)
    np.testing.assert_array_equal(model.inputs(0, tokens, np.array([2])), [[17]])


def test_labels_differ_and_the_loss_is_the_likelihood():
    tokens = np.random.default_rng(0).integers(0, 5, (4, 9))
    batch = {"tokens": tokens, "label": np.array([0, 1, 2, 0])}
    params = params_of_model()
    value, parts = MODEL.loss(params, batch, None)
    log_prob = MODEL.log_prob(params, batch)
    np.testing.assert_allclose(value, -log_prob.mean() / 9, rtol=1e-6)
    whole = parts["loss_0"] + 4 * parts["loss_1"] + 4 * parts["loss_2"]
    np.testing.assert_allclose(whole / 9, value, rtol=1e-6)
    other = MODEL.log_prob(params, batch | {"label": np.array([1, 1, 2, 0])})
    assert (np.asarray(other != log_prob) == [True, False, False, False]).all()


def test_it_obeys_the_laws_of_samplers():
    cond = Condition(label=np.arange(6) % 3)
    check_sampler(NextScaleSampler(MODEL), params_of_model(), cond)


def test_a_stream_shows_scale_after_scale():
    sampler, params = NextScaleSampler(MODEL), params_of_model()
    states = sampling.stream(sampler, params, sampling.sample_keys(0, 0, 2), Condition())
    drawn = [np.asarray(sampler.finish(params, state)) for state in states]
    assert [(tokens >= 0).sum() for tokens in drawn] == [2, 10, 18]
    np.testing.assert_array_equal(drawn[0][:, 0], drawn[-1][:, 0])


@pytest.mark.parametrize(
    ("scales", "sizes", "message"),
    [
        ((), {}, "scales must be sides from coarse to fine"),
        ((2, 1), {}, "scales must be sides from coarse to fine"),
        ((2, 3), {}, "each scale must divide the next"),
        ((1, 2), {"groups": (5,)}, r"must have the groups \(1, 4\) of the scales"),
        ((1, 2, 4), {"extra_inputs": 2}, "needs extra_inputs of at least 1 more"),
    ],
)
def test_what_the_model_refuses(scales, sizes, message):
    fitting = network_sizes(2, scales or (1,)) | sizes
    network = TokenNetwork(TransformerConfig(layers=1, width=8, heads=2, **fitting))
    with pytest.raises(ValueError, match=message):
        NextScaleModel(network, scales)


def test_what_the_sampler_refuses():
    keys = sampling.sample_keys(0, 0, 2)
    sampler = NextScaleSampler(MODEL)
    with pytest.raises(ValueError, match="labels must be in 0 to 2"):
        sampling.generate(sampler, params_of_model(), keys, Condition(label=np.array([0, 3])))
    with pytest.raises(ValueError, match="parameters do not fit the NextScaleModel"):
        sampling.generate(sampler, {"head": np.zeros(2)}, keys)
