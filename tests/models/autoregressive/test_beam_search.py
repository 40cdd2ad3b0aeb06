"""Beam search: the exact argmax where the beam is wide enough, and that of transformers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from exact_sequences import all_sequences
from gen_jax import sampling
from gen_jax.models.autoregressive import (
    AutoregressiveModel,
    AutoregressiveSampler,
    BeamSearchSampler,
    SamplingOptions,
    make_prompts,
)
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.testing import check_sampler
from random_networks import LLAMA_FORM, random_params

THREE = TransformerConfig(vocabulary=3, context=8, layers=1, width=16, heads=2)
NINE = TransformerConfig(
    vocabulary=9, context=16, layers=1, width=16, heads=4, kv_heads=2, **LLAMA_FORM
)
PROMPTS = [[1, 2, 0], [2], [0, 1]]
NINE_PROMPTS = [[1, 2, 3], [5], [8, 0]]
SEEDS = range(8)
ROWS = 81

token_log_prob = jax.jit(AutoregressiveModel.token_log_prob, static_argnums=0)


def model_of(config):
    return AutoregressiveModel(TokenNetwork(config))


def identity(state):
    return state


def search(sampler, prompts, seed=1):
    """The new tokens, and the state after each step."""
    params, cond = (
        random_params(sampler.model.network.config, seed),
        make_prompts(sampler.model, prompts),
    )
    keys = sampling.sample_keys(0, 0, len(prompts))
    found, states = sampling.generate(sampler, params, keys, cond, trajectory=identity)
    assert found.dtype == np.int32
    return np.asarray(found), states


def scores(config, seed, prompt, rows):
    """float64 [R, N]: log-probability of the new tokens of each row; R is at most `ROWS`."""
    tokens = np.zeros((ROWS, config.context), np.int32)  # one program for all
    end = len(prompt) + rows.shape[1]
    tokens[: len(rows), :end] = np.concatenate([np.tile(prompt, (len(rows), 1)), rows], axis=1)
    values = token_log_prob(model_of(config), random_params(config, seed), {"tokens": tokens})
    return np.asarray(values, np.float64)[: len(rows), len(prompt) - 1 : end - 1]


@functools.cache
def scores_of_all(seed, prompt):
    return scores(THREE, seed, prompt, all_sequences(3, 4))


def hypotheses(seed, prompt, penalty, eos):
    """All hypotheses of 4 tokens by rank: (rank, new tokens filled with the one that ends them)."""
    ranks = {}
    for row, values in zip(all_sequences(3, 4), scores_of_all(seed, tuple(prompt)), strict=True):
        places = np.flatnonzero(row == eos) if eos is not None else []
        count = places[0] + 1 if len(places) else 4
        filled = tuple(row[:count].tolist()) + (eos,) * (4 - count)
        ranks[filled] = values[:count].sum() / count**penalty
    return sorted(((rank, row) for row, rank in ranks.items()), reverse=True)


@pytest.mark.parametrize(("penalty", "eos"), [(1.0, None), (0.0, 1), (1.0, 1), (3.0, 1), (-1.0, 1)])
def test_a_beam_wide_enough_finds_the_best_of_all(penalty, eos):
    sampler = BeamSearchSampler(model_of(THREE), 3, 4, 27, penalty, eos)
    lengths = set()
    for seed in SEEDS:
        found, _ = search(sampler, PROMPTS, seed)
        for prompt, row in zip(PROMPTS, found, strict=True):
            (best, expected), (second, _), *_ = hypotheses(seed, prompt, penalty, eos)
            assert best - second > 1e-6
            np.testing.assert_array_equal(row, expected)
            lengths.add(expected.index(eos) if eos in expected else 4)
    assert eos is None or len(lengths) > 1 or penalty == -1


def test_the_penalty_favours_longer_ones():
    lengths = []
    for penalty in (0.0, 1.0, 3.0):
        sampler = BeamSearchSampler(model_of(THREE), 3, 4, 27, penalty, 1)
        lengths.append(np.mean([(search(sampler, PROMPTS, seed)[0] != 1).sum() for seed in SEEDS]))
    assert lengths[0] < lengths[1] < lengths[2]


def test_one_beam_is_greedy():
    greedy = AutoregressiveSampler(model_of(NINE), 3, 5, SamplingOptions(temperature=0))
    keys, cond = sampling.sample_keys(0, 0, 3), make_prompts(greedy.model, PROMPTS)
    expected = np.asarray(sampling.generate(greedy, random_params(NINE), keys, cond))
    found, _ = search(BeamSearchSampler(greedy.model, 3, 5, 1, 0.0), PROMPTS)
    np.testing.assert_array_equal(found, expected)


def test_one_beam_is_not_worse_than_greedy_where_hypotheses_end():
    # A hypothesis that ends goes on competing: the two are not the same.
    greedy = AutoregressiveSampler(model_of(THREE), 3, 4, SamplingOptions(temperature=0), 1)
    keys, cond = sampling.sample_keys(0, 0, 3), make_prompts(greedy.model, PROMPTS)
    expected = np.asarray(sampling.generate(greedy, random_params(THREE), keys, cond))
    found, _ = search(BeamSearchSampler(greedy.model, 3, 4, 1, 0.0, 1), PROMPTS)
    for prompt, row, other in zip(PROMPTS, found, expected, strict=True):
        ranks = {filled: rank for rank, filled in hypotheses(1, prompt, 0.0, 1)}
        assert ranks[tuple(row.tolist())] >= ranks[tuple(other.tolist())] - 1e-5


def test_no_beam_is_better_than_the_exact_one_and_wider_ones_help():
    totals = []
    for beams in (1, 2, 27):
        sampler = BeamSearchSampler(model_of(THREE), 3, 4, beams, 1.0)
        found = [search(sampler, PROMPTS, seed)[0] for seed in SEEDS]
        totals.append(
            [
                scores(THREE, seed, prompt, row[None]).sum()
                for seed, rows in zip(SEEDS, found, strict=True)
                for prompt, row in zip(PROMPTS, rows, strict=True)
            ]
        )
    totals = np.array(totals)
    assert (totals[-1] >= totals - 1e-5).all()
    means = totals.mean(axis=1)
    assert (np.diff(means) >= 0).all()
    assert means[0] < means[1] < means[-1]  # greedy is not best


@pytest.mark.parametrize("eos", [None, 4])
def test_scores_are_log_probabilities_and_no_hypothesis_is_there_twice(eos):
    sampler = BeamSearchSampler(model_of(NINE), 3, 6, 4, 1.0, eos)
    found, states = search(sampler, NINE_PROMPTS)
    for step in (0, 2, 5):
        tokens = np.asarray(states.tokens[step])[:, :, 3 : 4 + step]
        for b, prompt in enumerate(NINE_PROMPTS):
            expected = scores(NINE, 1, prompt, tokens[b]).sum(axis=1)
            np.testing.assert_allclose(states.scores[step, b], expected, atol=1e-4)
            assert (np.diff(states.scores[step, b]) <= 0).all()
            assert len({row.tobytes() for row in tokens[b]}) == 4
            assert eos is None or not (tokens[b] == eos).any()
    ended, ranks = np.asarray(states.ended[-1]), np.asarray(states.ended_scores[-1])
    if eos is None:
        assert np.isneginf(ranks).all()
        return
    assert np.isfinite(ranks).sum() > 3
    for b, k in zip(*np.nonzero(np.isfinite(ranks)), strict=True):
        row = ended[b, k, 3:]
        count = row.tolist().index(eos) + 1
        assert (row[count:] == eos).all()
        total = scores(NINE, 1, NINE_PROMPTS[b], row[None, :count]).sum()
        assert ranks[b, k] == pytest.approx(total / count, abs=1e-4)
    best = np.maximum(ranks[:, 0], np.asarray(states.scores[-1])[:, 0] / 6)
    for b, prompt in enumerate(NINE_PROMPTS):
        places = np.flatnonzero(found[b] == eos)
        count = places[0] + 1 if len(places) else 6
        total = scores(NINE, 1, prompt, found[b][None, :count]).sum()
        assert total / count == pytest.approx(best[b], abs=1e-4)


def test_a_prompt_does_not_know_its_batch_or_padding():
    sampler = BeamSearchSampler(model_of(NINE), 3, 6, 4, 1.0, 4)
    whole, _ = search(sampler, NINE_PROMPTS)
    alone = dataclasses.replace(sampler, prompt_length=1)
    np.testing.assert_array_equal(search(alone, NINE_PROMPTS[1:2])[0][0], whole[1])
    cond = make_prompts(sampler.model, NINE_PROMPTS * 2)
    drawn = check_sampler(sampler, random_params(NINE), cond)
    np.testing.assert_array_equal(drawn, np.concatenate([whole, whole]))


def test_what_it_refuses():
    model = model_of(THREE)
    with pytest.raises(ValueError, match="prompt_length must be at least 1"):
        BeamSearchSampler(model, 0, 3, 2)
    for numbers in ((2, 0, 2), (2, 3, 0)):
        with pytest.raises(ValueError, match="tokens and beams must be at least 1"):
            BeamSearchSampler(model, *numbers)
    BeamSearchSampler(model, 4, 5, 2)
    with pytest.raises(ValueError, match=r"4 \+ 6 tokens do not fit into the context of 8"):
        BeamSearchSampler(model, 4, 6, 2)
    with pytest.raises(ValueError, match="length_penalty must be finite"):
        BeamSearchSampler(model, 4, 4, 2, float("inf"))
    with pytest.raises(ValueError, match="eos must be in 0 to 2"):
        BeamSearchSampler(model, 4, 4, 2, eos=3)
    sampler = BeamSearchSampler(model, 2, 3, 2)
    assert (sampler.steps, sampler.nfe) == (3, 4)
    assert BeamSearchSampler(model, 1, 3, 2).nfe == 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random GPT-2 of transformers, and the same network here."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from gen_jax.interop import load_gpt2

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20,
        n_positions=24,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    loaded, params = load_gpt2(folder)
    network = getattr(loaded, "network", loaded)
    return torch, theirs, model_of(network.config), params


@pytest.mark.oracle
@pytest.mark.parametrize(("beams", "count", "penalty"), [(4, 10, 1.0), (2, 12, 2.0), (9, 6, -0.5)])
def test_agrees_with_transformers(pair, beams, count, penalty):
    torch, theirs, model, params = pair
    eos, generator = 7, np.random.default_rng(count)
    prompts = generator.integers(20, size=(12, 4))
    lengths = generator.integers(1, 5, size=12)
    there = np.arange(4) >= 4 - lengths[:, None]
    sampler = BeamSearchSampler(model, 4, count, beams, penalty, eos)
    ragged = [row[keep] for row, keep in zip(prompts, there, strict=True)]
    keys = sampling.sample_keys(0, 0, 12)
    found = np.asarray(sampling.generate(sampler, params, keys, make_prompts(model, ragged, 4)))
    with torch.no_grad():
        expected = theirs.generate(
            torch.as_tensor(np.where(there, prompts, 0)),
            attention_mask=torch.as_tensor(there.astype(np.int64)),
            max_new_tokens=count,
            num_beams=beams,
            do_sample=False,
            early_stopping="never",
            length_penalty=penalty,
            eos_token_id=eos,
            pad_token_id=eos,
        )[:, 4:].numpy()
    expected = np.pad(expected, ((0, 0), (0, count - expected.shape[1])), constant_values=eos)
    np.testing.assert_array_equal(found, expected)
    assert (expected == eos).any(axis=1).any()
