"""Speculative decoding: the exact distribution of the large model, whatever the draft is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from exact_sequences import exact_distribution, p_value
from gen_jax import sampling
from gen_jax.config import frozen
from gen_jax.models.autoregressive import (
    AutoregressiveModel,
    AutoregressiveSampler,
    SamplingOptions,
    SpeculativeSampler,
    make_prompts,
)
from gen_jax.models.sequences import fill_after_eos
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import TokenNetwork
from random_networks import LLAMA_FORM, random_params

FOUR = TransformerConfig(vocabulary=4, context=24, layers=1, width=16, heads=2)
NINE = dataclasses.replace(FOUR, vocabulary=9)
GREEDY = SamplingOptions(temperature=0)
MIXED = SamplingOptions(temperature=1.5, top_k=3, top_p=0.95)
PLAIN = SamplingOptions()
PROMPTS = [[1, 2, 3, 4], [5], [8, 0], [7, 7, 2], [6, 1, 0, 3], [3], [2, 8, 8]]
DRAWS = 8_000


def model_of(config):
    return AutoregressiveModel(TokenNetwork(config))


def small(config):
    """The configuration of a draft: another form, half as wide."""
    return dataclasses.replace(config, width=8, **LLAMA_FORM)


def make(config, length, tokens, drafted, options=PLAIN, kind=SpeculativeSampler, **rest):
    """A sampler with a draft of another form, and the parameters of both."""
    draft = small(config)
    sampler = kind(model_of(config), model_of(draft), length, tokens, drafted, options, **rest)
    return sampler, {"target": random_params(config), "draft": random_params(draft, 2)}


def arguments(sampler, prompts):
    return sampling.sample_keys(0, 0, len(prompts)), make_prompts(sampler.model, prompts)


def draw(sampler, params, prompts):
    return np.asarray(sampling.generate(sampler, params, *arguments(sampler, prompts)))


def exact_of(config, prompt, options, seed=1):
    """Probability of each continuation of three tokens."""
    params = random_params(config, seed)
    return exact_distribution(TokenNetwork(config), params, prompt, 3, options)


@pytest.mark.parametrize(
    ("options", "drafted", "prompt"),
    [(PLAIN, 3, (2,)), (MIXED, 1, (3, 1, 0))],
    ids=["plain", "mixed"],
)
def test_samples_have_the_exact_distribution_of_the_large_model(options, drafted, prompt):
    exact = exact_of(FOUR, prompt, options)
    assert (exact > 0).sum() >= 8
    assert exact.max() < 0.5
    sampler, params = make(FOUR, len(prompt), 3, drafted, options)
    drawn = draw(sampler, params, [prompt] * DRAWS)
    assert p_value(drawn, exact, 4) > 1e-4
    # That of the draft would be told apart.
    assert p_value(drawn, exact_of(small(FOUR), prompt, options, 2), 4) < 1e-6


@frozen
class KeepsAll(SpeculativeSampler):
    """A mutant that keeps whatever was drafted."""

    def _accept(self, drafted, proposal, wanted, uniforms, keys):
        _, end = super()._accept(drafted, proposal, wanted, 0 * uniforms, keys)
        return jnp.full(drafted.shape[0], self.drafted), end


@frozen
class DrawsFromAll(SpeculativeSampler):
    """A mutant that replaces a refused token by a draw from p instead of what p has over q."""

    def _accept(self, drafted, proposal, wanted, uniforms, keys):
        kept, _ = super()._accept(drafted, proposal, wanted, uniforms, keys)
        p = jnp.take_along_axis(wanted, kept[:, None, None], axis=1)[:, 0]
        return kept, kernels.sample_logits(jnp.log(p), keys)


@pytest.mark.parametrize("mutant", [KeepsAll, DrawsFromAll])
def test_mutants_do_not_pass(mutant):
    sampler, params = make(FOUR, 1, 3, 1, kind=mutant)
    drawn = draw(sampler, params, [[2]] * DRAWS)
    assert p_value(drawn, exact_of(FOUR, (2,), PLAIN), 4) < 1e-6


def progress(state):
    return {"known": state.known, "done": state.done, "rounds": state.rounds}


def draw_and_follow(sampler, params, prompts):
    """Samples, and the progress after each step; none is left out when all are complete."""
    keys, cond = arguments(sampler, prompts)
    drawn = sampling.generate(sampler, params, keys, cond, trajectory=progress)
    return jax.tree.map(np.asarray, drawn)


@pytest.mark.parametrize(("tokens", "drafted"), [(9, 2), (2, 3)])
def test_a_draft_that_is_the_large_model_is_always_kept(tokens, drafted):
    model = model_of(NINE)
    sampler = SpeculativeSampler(model, model, 4, tokens, drafted)
    params = {"target": random_params(NINE), "draft": random_params(NINE)}
    _, values = draw_and_follow(sampler, params, PROMPTS)
    assert (values["rounds"][-1] == -(-tokens // (drafted + 1))).all()
    assert values["done"][-1].all()
    assert (values["known"][-1] == 4 + tokens).all()


FREE, PARAMS = make(NINE, 4, 9, 2)
STOPPING = dataclasses.replace(FREE, eos=3)


@pytest.fixture(scope="module")
def free():
    return draw_and_follow(FREE, PARAMS, PROMPTS * 4)


@pytest.fixture(scope="module")
def trajectory():
    return draw_and_follow(STOPPING, PARAMS, PROMPTS * 4)


@pytest.fixture(scope="module")
def stopped(trajectory):
    return trajectory[0]


def test_rounds_are_between_the_extremes(free):
    rounds = free[1]["rounds"][-1]
    assert (rounds >= 3).all()  # 9 / 3
    assert (rounds <= 9).all()
    assert len(set(rounds.tolist())) > 2  # samples of one batch are at different columns
    assert FREE.steps == 9
    assert FREE.nfe == 10
    assert dataclasses.replace(FREE, prompt_length=1).nfe == 9


def test_greedy_is_greedy_of_the_large_model():
    plain = AutoregressiveSampler(model_of(NINE), 4, 9, GREEDY)
    expected = draw(plain, random_params(NINE), PROMPTS)
    eos = int(expected[0, 3])  # one that comes
    expected = np.asarray(fill_after_eos(expected, eos))
    assert (expected[0, 3:] == eos).all()
    sampler, params = make(NINE, 4, 9, 2, GREEDY, eos=eos)
    np.testing.assert_array_equal(draw(sampler, params, PROMPTS), expected)


def test_eos_fills_the_rest_of_what_is_drawn_without(free, stopped):
    ends = 0
    for row, cut in zip(free[0], stopped, strict=True):
        places = np.flatnonzero(row == 3)
        end = places[0] if len(places) else 9
        ends += 0 < end < 8
        np.testing.assert_array_equal(cut[:end], row[:end])
        assert (cut[end:] == 3).all()
    assert ends > 5


def test_a_sample_does_not_know_its_batch(stopped):
    assert len({row.tobytes() for row in stopped}) > 7
    cond = make_prompts(STOPPING.model, PROMPTS)
    chunks = sampling.generate_many(STOPPING, PARAMS, 0, 7, cond=cond, micro_batch=3)
    got = np.concatenate([chunk.samples for chunk in chunks])
    np.testing.assert_array_equal(got, stopped[:7])


def test_a_stream_and_a_trajectory_end_in_the_sample(trajectory, stopped):
    keys, cond = arguments(STOPPING, PROMPTS * 4)
    known = np.full(28, 4)
    for state in sampling.stream(STOPPING, PARAMS, keys, cond, every=2):
        assert (np.asarray(state.known) >= known).all()
        known = np.asarray(state.known)
        tokens = np.asarray(STOPPING.new_tokens(state))
        for row, final, count in zip(tokens, stopped, known - 4, strict=True):
            np.testing.assert_array_equal(row[:count], final[:count])
        last = np.asarray(STOPPING.finish(PARAMS, state))
        assert bool(STOPPING.stopped(state)) == bool(np.asarray(state.done).all())
    np.testing.assert_array_equal(last, stopped)
    assert trajectory[1]["done"][-1].all()
    np.testing.assert_array_equal(trajectory[1]["known"][-1], known)


def test_what_it_refuses():
    model, draft = model_of(NINE), model_of(small(NINE))
    reader = AutoregressiveModel(EncoderDecoder(dataclasses.replace(NINE, memory=True), 1))
    for pair in ((reader, draft), (model, reader)):
        with pytest.raises(ValueError, match="models without a source"):
            SpeculativeSampler(*pair, 2, 3)
    with pytest.raises(ValueError, match=r"the draft reads 4 \+ 0 tokens, the large model 9"):
        SpeculativeSampler(model, model_of(FOUR), 2, 3)
    with pytest.raises(ValueError, match="prompt_length must be at least 1"):
        SpeculativeSampler(model, draft, 0, 3)
    for numbers in ((2, 0, 2), (2, 3, 0)):
        with pytest.raises(ValueError, match="tokens and drafted must be at least 1"):
            SpeculativeSampler(model, draft, *numbers)
    SpeculativeSampler(model, draft, 10, 10, 4)
    with pytest.raises(ValueError, match=r"10 \+ 10 tokens and 5 drafted ones do not fit .* 24"):
        SpeculativeSampler(model, draft, 10, 10, 5)
