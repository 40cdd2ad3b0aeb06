"""Speculative decoding: the exact distribution of the large model, whatever the draft is."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import kernels
from gen_jax import sampling
from gen_jax.models.autoregressive.config import TokenChoice
from gen_jax.models.autoregressive.losses import AutoregressiveSampler, pad_prompts
from gen_jax.models.autoregressive.speculative import SpeculativeSampler
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from random_networks import LLAMA_FORM, random_params

pytestmark = pytest.mark.usefixtures("quick_compile")

FOUR = TransformerConfig(vocabulary=4, context=24, layers=1, width=16, heads=2)
NINE = dataclasses.replace(FOUR, vocabulary=9)
GREEDY = TokenChoice(temperature=0)
MIXED = TokenChoice(temperature=1.5, top_k=3, top_p=0.95)
PROMPTS = [[1, 2, 3, 4], [5], [8, 0], [7, 7, 2], [6, 1, 0, 3], [3], [2, 8, 8]]
DRAWS = 20_000
PLAIN = TokenChoice()

apply = jax.jit(lambda network, params, tokens: network(params, tokens), static_argnums=0)


def small(config):
    """The configuration of a draft: another form, half as wide."""
    return dataclasses.replace(config, layers=1, width=8, **LLAMA_FORM)


def make(config, length, tokens, drafted, choice=PLAIN, kind=SpeculativeSampler, **rest):
    """A sampler with a draft of another form, and the parameters of both."""
    draft = small(config)
    sampler = kind(
        TokenNetwork(config), TokenNetwork(draft), length, tokens, drafted, choice, **rest
    )
    return sampler, {"target": random_params(config), "draft": random_params(draft, 2)}


def draw(sampler, params, prompts=PROMPTS, seed=0):
    keys = sampling.sample_keys(seed, 0, len(prompts))
    cond = pad_prompts(sampler.network, prompts)
    return np.asarray(sampling.generate(sampler, params, keys, cond))


def collect(*args, **kwargs):
    return np.concatenate([chunk.samples for chunk in sampling.generate_many(*args, **kwargs)])


def conditional(logits, choice):
    """Probabilities after temperature, top_k and top_p, of one row, by sorting."""
    z = np.asarray(logits, np.float64) / choice.temperature
    order = np.argsort(-z)[: choice.top_k or None]
    p = np.exp(z[order] - z.max())
    cumulative = np.cumsum(p) / p.sum()
    order = order[: np.searchsorted(cumulative, choice.top_p) + 1] if choice.top_p < 1 else order
    kept = np.zeros_like(z)
    kept[order] = np.exp(z[order] - z.max())
    return kept / kept.sum()


@functools.cache
def exact_distribution(config, prompt, choice, seed=1):
    """Probability of each of the V^3 continuations, in order."""
    rows = np.array(list(itertools.product(range(config.vocabulary), repeat=3)))
    tokens = np.concatenate([np.tile(prompt, (len(rows), 1)), rows], axis=1)
    logits = apply(TokenNetwork(config), random_params(config, seed), tokens)
    p = np.ones(len(rows))
    for i in range(3):
        given = np.asarray(logits[:, len(prompt) - 1 + i])
        p *= [conditional(a, choice)[row[i]] for a, row in zip(given, rows, strict=True)]
    assert p.sum() == pytest.approx(1, abs=1e-6)
    return p


def p_value(drawn, exact):
    observed = np.bincount(drawn @ [16, 4, 1], minlength=64)
    assert observed.sum() == DRAWS
    kept = exact > 0
    if observed[~kept].sum():
        return 0.0
    # Rare ones together.
    rare = kept & (exact * DRAWS < 8)
    common = kept & ~rare
    observed = np.append(observed[common], observed[rare].sum())
    expected = np.append(exact[common], exact[rare].sum()) * DRAWS
    if not rare.any():
        observed, expected = observed[:-1], expected[:-1]
    return stats.chisquare(observed, expected).pvalue


@pytest.mark.parametrize(
    ("choice", "drafted", "prompt"),
    [
        (PLAIN, 1, (2,)),
        (PLAIN, 2, (3, 1, 0)),
        (PLAIN, 3, (2,)),
        (MIXED, 2, (3, 1, 0)),
    ],
    ids=str,
)
def test_samples_have_the_exact_distribution_of_the_large_model(choice, drafted, prompt):
    exact = exact_distribution(FOUR, prompt, choice)
    assert (exact > 0).sum() >= 8
    assert exact.max() < 0.5
    sampler, params = make(FOUR, len(prompt), 3, drafted, choice)
    drawn = draw(sampler, params, [prompt] * DRAWS)
    assert p_value(drawn, exact) > 1e-4
    # That of the draft would be told apart.
    assert p_value(drawn, exact_distribution(small(FOUR), prompt, choice, 2)) < 1e-6


@dataclasses.dataclass(frozen=True)
class KeepsAll(SpeculativeSampler):
    """A mutant that keeps whatever was drafted."""

    def _check(self, drafted, proposal, wanted, uniforms, keys):
        _, end = super()._check(drafted, proposal, wanted, 0 * uniforms, keys)
        return jnp.full(drafted.shape[0], self.drafted), end


@dataclasses.dataclass(frozen=True)
class DrawsFromAll(SpeculativeSampler):
    """A mutant that replaces a refused token by a draw from p instead of what p has over q."""

    def _check(self, drafted, proposal, wanted, uniforms, keys):
        kept, _ = super()._check(drafted, proposal, wanted, uniforms, keys)
        p = jnp.take_along_axis(wanted, kept[:, None, None], axis=1)[:, 0]
        return kept, kernels.sample_logits(jnp.log(p), keys)


@pytest.mark.parametrize("mutant", [KeepsAll, DrawsFromAll])
def test_mutants_do_not_pass(mutant):
    sampler, params = make(FOUR, 1, 3, 2, kind=mutant)
    drawn = draw(sampler, params, [[2]] * DRAWS)
    assert p_value(drawn, exact_distribution(FOUR, (2,), PLAIN)) < 1e-6


def last_state(sampler, params, prompts):
    keys = sampling.sample_keys(0, 0, len(prompts))
    cond = pad_prompts(sampler.network, prompts)
    *_, state = sampling.stream(sampler, params, keys, cond, every=sampler.steps)
    return state


@pytest.mark.parametrize(("tokens", "drafted"), [(9, 2), (3, 5)])
def test_a_draft_that_is_the_large_model_is_always_kept(tokens, drafted):
    network = TokenNetwork(NINE)
    sampler = SpeculativeSampler(network, network, 4, tokens, drafted)
    params = {"target": random_params(NINE), "draft": random_params(NINE)}
    state = last_state(sampler, params, PROMPTS)
    assert (state.rounds == -(-tokens // (drafted + 1))).all()
    assert state.done.all()
    assert (state.known == 4 + tokens).all()


def test_rounds_are_between_the_extremes():
    sampler, params = make(NINE, 4, 9, 3)
    state = last_state(sampler, params, PROMPTS * 4)
    rounds = np.asarray(state.rounds)
    assert (rounds >= 3).all()  # ceil(9 / 4)
    assert (rounds <= 9).all()
    assert len(set(rounds.tolist())) > 2  # samples of one batch are at different columns
    assert sampler.steps == 9
    assert sampler.nfe == 10
    assert make(NINE, 1, 9, 2)[0].nfe == 9


@pytest.mark.parametrize(
    ("prompts", "drafted", "stop"),
    [(PROMPTS, 1, None), (PROMPTS, 4, "a token"), ([[5], [2]], 3, None)],
)
def test_greedy_is_greedy_of_the_large_model(prompts, drafted, stop):
    network, length = TokenNetwork(NINE), max(map(len, prompts))
    params = random_params(NINE)
    keys, cond = sampling.sample_keys(0, 0, len(prompts)), pad_prompts(network, prompts)
    plain = AutoregressiveSampler(network, length, 9, GREEDY)
    expected = np.asarray(sampling.generate(plain, params, keys, cond))
    if stop:
        stop = int(expected[0, 3])  # one that comes
        plain = dataclasses.replace(plain, stop=stop)
        expected = np.asarray(sampling.generate(plain, params, keys, cond))
        assert (expected[0, 3:] == stop).all()
    sampler, params = make(NINE, length, 9, drafted, GREEDY, stop=stop)
    np.testing.assert_array_equal(draw(sampler, params, prompts), expected)


def test_a_stop_token_fills_the_rest_of_what_is_drawn_without():
    sampler, params = make(NINE, 4, 9, 3)
    free = draw(sampler, params, PROMPTS * 4)
    stopped = draw(dataclasses.replace(sampler, stop=3), params, PROMPTS * 4)
    ends = 0
    for row, cut in zip(free, stopped, strict=True):
        places = np.flatnonzero(row == 3)
        end = places[0] if len(places) else 9
        ends += 0 < end < 8
        np.testing.assert_array_equal(cut[:end], row[:end])
        assert (cut[end:] == 3).all()
    assert ends > 5


def test_a_sample_does_not_know_its_batch():
    sampler, params = make(NINE, 4, 9, 3, stop=3)
    whole, cond = draw(sampler, params, PROMPTS * 4), pad_prompts(sampler.network, PROMPTS * 4)
    assert len({row.tobytes() for row in whole}) > 7
    for size in (1, 8):
        got = collect(sampler, params, 0, 28, cond=cond, micro_batch=size)
        np.testing.assert_array_equal(got, whole)


def test_a_stream_and_a_trajectory_end_in_the_sample():
    sampler, params = make(NINE, 4, 9, 3, stop=3)
    whole, keys = draw(sampler, params, PROMPTS * 4), sampling.sample_keys(0, 0, 28)
    cond = pad_prompts(sampler.network, PROMPTS * 4)
    known = np.full(28, 4)
    for state in sampling.stream(sampler, params, keys, cond, every=2):
        assert (np.asarray(state.known) >= known).all()
        known = np.asarray(state.known)
        for row, final, count in zip(np.asarray(state.tokens), whole, known, strict=True):
            np.testing.assert_array_equal(row[4:count], final[: count - 4])
        last = np.asarray(sampler.finish(None, state))
        assert bool(sampler.stopped(state)) == bool(np.asarray(state.done).all())
    np.testing.assert_array_equal(last, whole)
    # Here no step is left out when all are complete.
    samples, states = sampling.generate(sampler, params, keys, cond, trajectory=True)
    np.testing.assert_array_equal(samples, whole)
    assert np.asarray(states.done)[-1].all()
    np.testing.assert_array_equal(np.asarray(states.known)[-1], known)


def test_what_it_refuses():
    network, draft = TokenNetwork(NINE), TokenNetwork(small(NINE))
    for pair in ((network, "draft"), ("network", draft)):
        blind = [
            TokenNetwork(dataclasses.replace(NINE, causal=False)) if isinstance(one, str) else one
            for one in pair
        ]
        with pytest.raises(ValueError, match="two causal networks"):
            SpeculativeSampler(*blind, 2, 3)
    with pytest.raises(ValueError, match=r"the draft reads 4 \+ 0 tokens, the large model 9"):
        SpeculativeSampler(network, TokenNetwork(FOUR), 2, 3)
    for numbers in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            SpeculativeSampler(network, draft, *numbers)
    SpeculativeSampler(network, draft, 10, 10, 4)
    with pytest.raises(ValueError, match=r"10 \+ 10 tokens and 5 drafted ones do not fit .* 24"):
        SpeculativeSampler(network, draft, 10, 10, 5)
    sampler, params = make(NINE, 3, 3, 2)
    with pytest.raises(ValueError, match="prompts of 2 columns for a sampler of 3"):
        draw(sampler, params, [[1, 2]])
