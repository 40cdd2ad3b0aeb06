"""Autoregressive models: exact likelihood, and samples of the exact distribution."""

import dataclasses
import functools
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from exact_sequences import all_sequences, apply, exact_distribution, next_logits, p_value
from gen_jax import config as config_lib
from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.data import MarkovSource
from gen_jax.models.autoregressive import (
    AutoregressiveModel,
    AutoregressiveSampler,
    BeamSearchOptions,
    BeamSearchSampler,
    SamplingOptions,
    make_prompts,
)
from gen_jax.models.autoregressive.config import DecodingOptions
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.testing import check_sampler
from random_networks import LLAMA_FORM, random_params

GPT = TransformerConfig(vocabulary=9, context=16, layers=1, width=16, heads=2)
LLAMA = dataclasses.replace(GPT, heads=4, kv_heads=2, **LLAMA_FORM)
THREE = dataclasses.replace(GPT, vocabulary=3, context=8, extra_inputs=2)
GREEDY = SamplingOptions(temperature=0)
PLAIN = SamplingOptions()
MIXED = SamplingOptions(temperature=1.3, top_k=2, top_p=0.9)
PROMPTS = [[1, 2, 3, 4], [5], [8, 0], [7, 7, 2], [6, 1, 0, 3], [3], [2, 8, 8]]

token_log_prob = jax.jit(AutoregressiveModel.token_log_prob, static_argnums=0)
log_prob_of = jax.jit(AutoregressiveModel.log_prob, static_argnums=0)
loss_of = jax.jit(AutoregressiveModel.loss, static_argnums=0)


def model_of(config, **fields):
    return AutoregressiveModel(TokenNetwork(config), **fields)


def draw(sampler, prompts=PROMPTS, seed=0, params=None, **fields):
    model = sampler.model
    params = random_params(model.network.config) if params is None else params
    cond = make_prompts(model, prompts).replace(**fields)
    keys = sampling.sample_keys(seed, 0, len(prompts))
    return np.asarray(sampling.generate(sampler, params, keys, cond))


def collect(*args, **kwargs):
    return np.concatenate([chunk.samples for chunk in sampling.generate_many(*args, **kwargs)])


@pytest.mark.parametrize("label", [None, 0, 1])
def test_probabilities_of_all_sequences_sum_to_one(label):
    model, params = model_of(THREE), random_params(THREE)
    tokens = all_sequences(3, 4)
    batch = {"tokens": tokens} | ({} if label is None else {"label": np.full(81, label, np.int32)})
    log_prob = np.asarray(token_log_prob(model, params, batch), np.float64)
    assert log_prob.shape == (81, 4)
    whole = log_prob_of(model, params, batch)
    np.testing.assert_allclose(whole, log_prob.sum(axis=1), rtol=1e-6)
    p = np.exp(log_prob.sum(axis=1))
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert 0.02 < p.max() < 0.5
    # The chain rule, from the logits.
    start = np.full((81, 1), 3 + (label or 0), np.int32)
    logits = apply(model.network, params, np.concatenate([start, tokens[:, :-1]], axis=1))
    chain = np.asarray(jax.nn.log_softmax(logits))
    chain = np.take_along_axis(chain, tokens[..., None], axis=2)
    np.testing.assert_allclose(log_prob, chain[..., 0], atol=1e-5)
    value, metrics = loss_of(model, params, batch, None)
    assert value == pytest.approx(-log_prob.mean(), abs=1e-5)
    assert metrics == {}


def test_labels_differ_and_no_label_is_the_first():
    model, params = model_of(THREE), random_params(THREE)
    tokens = all_sequences(3, 4)
    none, zero, one = (
        np.asarray(token_log_prob(model, params, {"tokens": tokens} | label))
        for label in ({}, {"label": np.zeros(81, np.int32)}, {"label": np.ones(81, np.int32)})
    )
    np.testing.assert_array_equal(none, zero)
    assert np.abs(zero - one).max() > 0.01
    inputs, targets = model.inputs_and_targets(tokens, np.arange(81) % 2)
    np.testing.assert_array_equal(inputs[:, 0], 3 + np.arange(81) % 2)
    np.testing.assert_array_equal(inputs[:, 1:], tokens[:, :-1])
    np.testing.assert_array_equal(targets, tokens)


def test_without_a_start_the_first_token_is_given():
    config = dataclasses.replace(THREE, extra_inputs=0)
    model, params = model_of(config), random_params(config)
    tokens = all_sequences(3, 4)
    log_prob = np.asarray(token_log_prob(model, params, {"tokens": tokens}))
    assert log_prob.shape == (81, 3)
    p = np.exp(log_prob.sum(axis=1)).reshape(3, 27)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)
    value, _ = loss_of(model, params, {"tokens": tokens}, None)
    assert value == pytest.approx(-log_prob.mean(), abs=1e-5)


def test_only_so_many_tokens_count():
    model, params = model_of(THREE), random_params(THREE)
    length = np.arange(81, dtype=np.int32) % 5
    batch = {"tokens": all_sequences(3, 4), "length": length}
    values = np.asarray(token_log_prob(model, params, batch))
    expected = np.where(np.arange(4) < length[:, None], values, 0).sum(axis=1)
    np.testing.assert_allclose(log_prob_of(model, params, batch), expected, atol=1e-5)
    value, _ = loss_of(model, params, batch, None)
    assert value == pytest.approx(-expected.sum() / length.sum(), abs=1e-5)
    # Smoothing is of the loss alone.
    smooth = model_of(THREE, smoothing=0.2)
    np.testing.assert_array_equal(token_log_prob(smooth, params, batch), values)
    assert loss_of(smooth, params, batch, None)[0] != value


@pytest.mark.parametrize(
    ("config", "prompts"),
    [(GPT, PROMPTS), (GPT, [[4]] * 2), (LLAMA, PROMPTS), (LLAMA, [[1, 2, 3], [0, 0, 5]])],
    ids=["gpt-ragged", "gpt-single", "llama-ragged", "llama-full"],
)
def test_greedy_takes_the_largest_uncached_logit(config, prompts):
    model, params = model_of(config), random_params(config)
    sampler = AutoregressiveSampler(model, max(map(len, prompts)), 6, GREEDY)
    got, rows = draw(sampler, prompts), [list(prompt) for prompt in prompts]
    assert got.dtype == np.int32
    for i in range(6):
        best = next_logits(model.network, params, rows).argmax(axis=1)
        np.testing.assert_array_equal(got[:, i], best)
        rows = [[*row, token] for row, token in zip(rows, best, strict=True)]
    assert len({tuple(row) for row in got.tolist()}) > 1 or len(prompts) == 2


@pytest.mark.parametrize(
    ("options", "prompt"), [(PLAIN, []), (MIXED, [1, 0, 2])], ids=["plain", "mixed"]
)
def test_samples_have_the_exact_distribution(options, prompt):
    model, params = model_of(THREE), random_params(THREE)
    start = [4, *prompt]  # label 1
    exact = exact_distribution(model.network, params, start, 3, options)
    if options == PLAIN:
        batch = {"tokens": all_sequences(3, 3), "label": np.ones(27, np.int32)}
        np.testing.assert_allclose(exact, np.exp(log_prob_of(model, params, batch)), rtol=1e-4)
    sampler = AutoregressiveSampler(model, len(prompt), 3, options)
    drawn = draw(sampler, [prompt] * 8_000, label=np.ones(8_000, np.int32))
    assert (exact > 0).sum() >= 6
    assert exact.max() < 0.7
    assert p_value(drawn, exact, 3) > 1e-4
    if options == MIXED:  # the test tells it from the unfiltered distribution
        plain = exact_distribution(model.network, params, start, 3, PLAIN)
        assert p_value(drawn, plain, 3) < 1e-6


FREE = AutoregressiveSampler(model_of(GPT), 4, 12)
STOPPING = dataclasses.replace(FREE, eos=3)


@pytest.fixture(scope="module")
def free():
    return draw(FREE, PROMPTS * 4)


@pytest.fixture(scope="module")
def stopped():
    return draw(STOPPING, PROMPTS * 4)


def test_eos_fills_the_rest(free, stopped):
    ends = 0
    for row, cut in zip(free, stopped, strict=True):
        places = np.flatnonzero(row == 3)
        end = places[0] if len(places) else 12
        ends += 0 < end < 11
        np.testing.assert_array_equal(cut[:end], row[:end])
        assert (cut[end:] == 3).all()
    assert ends > 5


def test_the_trajectory_ends_in_the_sample(stopped):
    cond, keys = make_prompts(STOPPING.model, PROMPTS * 4), sampling.sample_keys(0, 0, 28)
    samples, tokens = sampling.generate(
        STOPPING, random_params(GPT), keys, cond, trajectory=STOPPING.new_tokens
    )
    np.testing.assert_array_equal(samples, stopped)
    samples, tokens = np.asarray(samples), np.asarray(tokens)
    for i in range(12):
        np.testing.assert_array_equal(tokens[i, :, : i + 1], samples[:, : i + 1])
        assert (tokens[i, :, i + 1 :] == 0).all()


def test_a_stream_shows_the_same_tokens(free):
    cond = jax.tree.map(jax.numpy.asarray, make_prompts(FREE.model, PROMPTS * 4))
    keys, params = sampling.sample_keys(0, 0, 28), random_params(GPT)
    for every in (5, 20):  # what it was given is still there the second time
        shown = 0
        for state in sampling.stream(FREE, params, keys, cond, every=every):
            shown = min(shown + every, 12)
            np.testing.assert_array_equal(state.tokens[:, :4], cond.prompt)
            tokens = np.asarray(FREE.new_tokens(state))
            np.testing.assert_array_equal(tokens[:, :shown], free[:, :shown])
            assert (tokens[:, shown:] == 0).all()
        assert shown == 12


def test_padding_on_the_left_does_not_change_a_sample(free):
    sampler = dataclasses.replace(FREE, prompt_length=6)
    cond = make_prompts(FREE.model, PROMPTS, 6)
    keys = sampling.sample_keys(0, 0, 7)
    # The context is reached earlier: only so many tokens are of the same inputs.
    got = np.asarray(sampling.generate(sampler, random_params(GPT), keys, cond))
    np.testing.assert_array_equal(got[:, :11], free[:7, :11])


SPREAD = AutoregressiveSampler(model_of(LLAMA), 4, 8, SamplingOptions(temperature=1.5))


def test_it_obeys_the_laws_of_samplers():
    cond = make_prompts(SPREAD.model, PROMPTS[:6])
    drawn = check_sampler(SPREAD, random_params(LLAMA), cond)
    assert len({row.tobytes() for row in drawn}) == 6


def test_a_sample_does_not_know_its_batch_or_device():
    params, cond = random_params(LLAMA), make_prompts(SPREAD.model, PROMPTS)
    whole = draw(SPREAD, seed=3)
    assert len({row.tobytes() for row in whole}) == 7
    got = collect(SPREAD, params, 3, 7, cond=cond, micro_batch=3)
    np.testing.assert_array_equal(got, whole)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    got = collect(SPREAD, params, 3, 7, cond=cond, micro_batch=8, mesh=mesh)
    np.testing.assert_array_equal(got, whole)
    rest = jax.tree.map(lambda leaf: leaf[4:], cond)
    got = collect(SPREAD, params, 3, 3, cond=rest, micro_batch=3, start=4)
    np.testing.assert_array_equal(got, whole[4:])


def test_a_markov_source_is_learned_to_its_entropy():
    source = MarkovSource.random(5, seed=3, concentration=1.0)
    config = TransformerConfig(
        vocabulary=5, context=16, layers=1, width=32, heads=2, mlp_dim=64, extra_inputs=1
    )
    model = model_of(config)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 300))
    batches = np.stack([source.batch(0, i, 64, length=16)["tokens"] for i in range(300)])

    @jax.jit
    def train(params, batches):
        def update(carry, tokens):
            params, state = carry
            gradient, _ = jax.grad(model.loss, has_aux=True)(params, {"tokens": tokens}, None)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(update, (params, optimizer.init(params)), batches)[0][0]

    params = train(model.init(jax.random.key(0)), batches)
    fresh = source.batch(1, 0, 4096, length=16)["tokens"]
    log_prob = np.asarray(token_log_prob(model, params, {"tokens": fresh}))
    # Against the truth on the same sequences, which takes their luck out; and the entropy itself.
    excess = source.log_prob(fresh).mean() - log_prob.sum(axis=1).mean()
    assert -1e-4 < excess / source.entropy(16) < 0.01
    assert -log_prob[:, 1:].mean() == pytest.approx(source.entropy_rate, rel=0.01)
    assert 0.3 * np.log(5) < source.entropy_rate < 0.9 * np.log(5)

    sampler = AutoregressiveSampler(model, 0, 16)
    drawn = np.asarray(sampling.generate(sampler, params, sampling.sample_keys(0, 0, 4096)))
    counts = np.zeros((5, 5))
    np.add.at(counts, (drawn[:, :-1], drawn[:, 1:]), 1)
    found = counts / counts.sum(axis=1, keepdims=True)
    assert (np.abs(found - source.transition).sum(axis=1) / 2 < 0.05).all()
    first = np.bincount(drawn[:, 0], minlength=5) / len(drawn)
    assert np.abs(first - source.initial).sum() / 2 < 0.05


def test_what_the_model_refuses():
    with pytest.raises(ValueError, match="needs a causal network"):
        model_of(dataclasses.replace(GPT, causal=False))
    for smoothing in (-0.1, 1.0):
        with pytest.raises(ValueError, match="smoothing must be in"):
            model_of(GPT, smoothing=smoothing)
    assert hash(model_of(GPT)) == hash(model_of(GPT))


def test_what_the_sampler_refuses():
    model = model_of(GPT)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        AutoregressiveSampler(model, 2, 0)
    with pytest.raises(ValueError, match=r"at least 1 for a model without a start token.* got 0"):
        AutoregressiveSampler(model, 0, 3)
    with pytest.raises(ValueError, match="a prompt of 17 tokens does not fit"):
        AutoregressiveSampler(model, 17, 3)
    AutoregressiveSampler(model, 16, 3)
    AutoregressiveSampler(model_of(THREE), 7, 3)
    with pytest.raises(ValueError, match=r"a prompt of 8 tokens does not fit .* start token"):
        AutoregressiveSampler(model_of(THREE), 8, 3)
    with pytest.raises(ValueError, match="prompt_length must be at least 0, got -1"):
        AutoregressiveSampler(model_of(THREE), -1, 3)
    for eos in (-1, 9):
        with pytest.raises(ValueError, match="eos must be in 0 to 8"):
            AutoregressiveSampler(model, 2, 3, eos=eos)
    for wrong in (
        {"temperature": -1.0},
        {"temperature": 1e-7},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 2.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingOptions(**wrong)
    with pytest.raises(ValueError, match="beams must be at least 1"):
        BeamSearchOptions(beams=0)


def test_options_make_their_sampler():
    model = model_of(GPT)
    assert set(config_lib.choices(DecodingOptions)) >= {"sample", "beam_search"}
    for options, expected in (
        (MIXED, AutoregressiveSampler(model, 2, 3, MIXED, 4)),
        (BeamSearchOptions(5, 0.5), BeamSearchSampler(model, 2, 3, 5, 0.5, 4)),
    ):
        make = config_lib.resolve(options.make)
        assert make(options, model, 2, 3, 4) == expected
        assert config_lib.choices(DecodingOptions)[options.name] is type(options)
    assert BeamSearchOptions.deterministic
    assert not SamplingOptions.deterministic


def test_options_load_no_jax():
    code = "import sys, gen_jax.models.autoregressive.config; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_condition_may_be_traced():
    params, keys = random_params(LLAMA), sampling.sample_keys(3, 0, 7)
    draw = jax.jit(functools.partial(sampling.generate, SPREAD))
    shape = jax.eval_shape(draw, params, keys, make_prompts(SPREAD.model, PROMPTS))
    assert shape.shape == (7, 8)
    with pytest.raises(ValueError, match=r"prompts \[B, 4\]"):
        jax.eval_shape(draw, params, keys, Condition(prompt=np.zeros((7, 3), np.int32)))
