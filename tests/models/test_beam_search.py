"""Beam search: the exact argmax where the beam is wide enough, and that of transformers."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from gen_jax import sampling
from gen_jax.models.autoregressive import losses as autoregressive
from gen_jax.models.autoregressive.beam_search import BeamSearchSampler
from gen_jax.models.autoregressive.config import TokenChoice
from gen_jax.models.autoregressive.losses import AutoregressiveSampler, pad_prompts
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from random_networks import LLAMA_FORM, random_params

pytestmark = pytest.mark.usefixtures("quick_compile")

THREE = TransformerConfig(vocabulary=3, context=8, layers=1, width=16, heads=2)
NINE = TransformerConfig(
    vocabulary=9,
    context=16,
    layers=1,
    width=16,
    heads=4,
    kv_heads=2,
    **LLAMA_FORM,
)
PROMPTS = [[1, 2, 0], [2], [0, 1]]
SEEDS = range(8)

log_prob = jax.jit(autoregressive.log_prob, static_argnums=0)
generate = jax.jit(
    lambda sampler, params, cond: sampling.generate(
        sampler, params, sampling.sample_keys(0, 0, len(cond["tokens"])), cond, trajectory=True
    ),
    static_argnums=0,
)


def search(sampler, prompts, seed=1):
    """The new tokens, and the state after each step."""
    network = sampler.network
    found, states = generate(
        sampler, random_params(network.config, seed), pad_prompts(network, prompts)
    )
    assert found.dtype == np.int32
    return np.asarray(found), states


def scores(config, seed, prompt, rows):
    """float64 [R]: log-probability of whole rows of new tokens [R, N], [R, N] by token."""
    tokens = np.concatenate([np.tile(prompt, (len(rows), 1)), rows], axis=1).astype(np.int32)
    given = log_prob(TokenNetwork(config), random_params(config, seed), tokens)
    return np.asarray(given, np.float64)[:, len(prompt) - 1 :]


def hypotheses(config, seed, prompt, length, penalty, stop):
    """All hypotheses by rank: (rank, new tokens filled with the stop token)."""
    rows = np.array(list(itertools.product(range(config.vocabulary), repeat=length)))
    by_token = scores(config, seed, prompt, rows)
    ranks = {}
    for row, values in zip(rows, by_token, strict=True):
        places = np.flatnonzero(row == stop) if stop is not None else []
        count = places[0] + 1 if len(places) else length
        filled = tuple(row[:count].tolist()) + (stop,) * (length - count)
        ranks[filled] = values[:count].sum() / count**penalty
    return sorted(((rank, row) for row, rank in ranks.items()), reverse=True)


@pytest.mark.parametrize(
    ("penalty", "stop"), [(1.0, None), (0.0, 1), (1.0, 1), (3.0, 1), (-1.0, 1)]
)
def test_a_beam_wide_enough_finds_the_best_of_all(penalty, stop):
    sampler = BeamSearchSampler(TokenNetwork(THREE), 3, 4, 27, penalty, stop)
    lengths = set()
    for seed in SEEDS:
        found, _ = search(sampler, PROMPTS, seed)
        for prompt, row in zip(PROMPTS, found, strict=True):
            (best, expected), (second, _), *_ = hypotheses(THREE, seed, prompt, 4, penalty, stop)
            assert best - second > 1e-6
            np.testing.assert_array_equal(row, expected)
            lengths.add(expected.index(stop) if stop in expected else 4)
    assert stop is None or len(lengths) > 1 or penalty == -1


def test_the_penalty_favours_longer_ones():
    lengths = []
    for penalty in (0.0, 1.0, 3.0):
        sampler = BeamSearchSampler(TokenNetwork(THREE), 3, 4, 27, penalty, 1)
        lengths.append(np.mean([(search(sampler, PROMPTS, seed)[0] != 1).sum() for seed in SEEDS]))
    assert lengths[0] < lengths[1] < lengths[2]


@pytest.mark.parametrize(("config", "stop"), [(NINE, None), (THREE, 1)])
def test_one_beam_is_greedy(config, stop):
    network = TokenNetwork(config)
    greedy = AutoregressiveSampler(network, 3, 5, TokenChoice(temperature=0), stop)
    keys, cond = sampling.sample_keys(0, 0, 3), pad_prompts(network, PROMPTS)
    expected = np.asarray(sampling.generate(greedy, random_params(config), keys, cond))
    # Only where the length does not count: a hypothesis that ends goes on competing.
    found, _ = search(BeamSearchSampler(network, 3, 5, 1, 0.0, stop), PROMPTS)
    if stop is None:
        np.testing.assert_array_equal(found, expected)
        return
    for prompt, row, other in zip(PROMPTS, found, expected, strict=True):
        (rank, *_), (greedy_rank, *_) = (
            [r for r, filled in hypotheses(config, 1, prompt, 5, 0.0, stop) if filled == tuple(one)]
            for one in (row.tolist(), other.tolist())
        )
        assert rank >= greedy_rank - 1e-5


def test_no_beam_is_better_than_the_exact_one_and_wider_ones_help():
    totals = []
    for beams in (1, 2, 4, 27):
        sampler = BeamSearchSampler(TokenNetwork(THREE), 3, 4, beams, 1.0)
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


@pytest.mark.parametrize("stop", [None, 4])
def test_scores_are_log_probabilities_and_no_hypothesis_is_there_twice(stop):
    prompts = [[1, 2, 3], [5], [8, 0]]
    sampler = BeamSearchSampler(TokenNetwork(NINE), 3, 6, 5, 1.0, stop)
    found, states = search(sampler, prompts)
    for step in (0, 2, 5):
        tokens = np.asarray(states.tokens[step])[:, :, 3 : 4 + step]
        for b, prompt in enumerate(prompts):
            expected = scores(NINE, 1, prompt, tokens[b]).sum(axis=1)
            np.testing.assert_allclose(states.scores[step, b], expected, atol=1e-4)
            assert (np.diff(states.scores[step, b]) <= 0).all()
            assert len({row.tobytes() for row in tokens[b]}) == 5
            assert stop is None or not (tokens[b] == stop).any()
    ended, ranks = np.asarray(states.ended[-1]), np.asarray(states.ended_scores[-1])
    if stop is None:
        assert np.isneginf(ranks).all()
        return
    assert np.isfinite(ranks).sum() > 3
    for b, k in zip(*np.nonzero(np.isfinite(ranks)), strict=True):
        row = ended[b, k, 3:]
        count = row.tolist().index(stop) + 1
        assert (row[count:] == stop).all()
        total = scores(NINE, 1, prompts[b], row[None, :count]).sum()
        assert ranks[b, k] == pytest.approx(total / count, abs=1e-4)
    best = np.maximum(ranks[:, 0], np.asarray(states.scores[-1])[:, 0] / 6)
    for b, prompt in enumerate(prompts):
        places = np.flatnonzero(found[b] == stop)
        count = places[0] + 1 if len(places) else 6
        total = scores(NINE, 1, prompt, found[b][None, :count]).sum()
        assert total / count == pytest.approx(best[b], abs=1e-4)


def test_a_prompt_does_not_know_its_batch_or_padding():
    prompts = [[1, 2, 3], [5], [8, 0]]
    whole, _ = search(BeamSearchSampler(TokenNetwork(NINE), 3, 6, 4, 1.0, 4), prompts)
    for prompt, row in zip(prompts, whole, strict=True):
        sampler = BeamSearchSampler(TokenNetwork(NINE), len(prompt), 6, 4, 1.0, 4)
        np.testing.assert_array_equal(search(sampler, [prompt])[0][0], row)
    sampler = BeamSearchSampler(TokenNetwork(NINE), 3, 6, 4, 1.0, 4)
    cond = pad_prompts(sampler.network, prompts)
    (chunk,) = sampling.generate_many(sampler, random_params(NINE), 7, 3, cond=cond, micro_batch=4)
    np.testing.assert_array_equal(chunk.samples, whole)


def test_what_it_refuses():
    network = TokenNetwork(THREE)
    with pytest.raises(ValueError, match="needs a causal network"):
        BeamSearchSampler(TokenNetwork(dataclasses.replace(THREE, causal=False)), 2, 3, 2)
    for numbers in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            BeamSearchSampler(network, *numbers)
    BeamSearchSampler(network, 4, 5, 2)
    with pytest.raises(ValueError, match=r"4 \+ 6 tokens do not fit into the context of 8"):
        BeamSearchSampler(network, 4, 6, 2)
    with pytest.raises(ValueError, match="prompts of 1 columns for a sampler of 2"):
        search(BeamSearchSampler(network, 2, 3, 2), [[1]])
    sampler = BeamSearchSampler(network, 2, 3, 2)
    assert (sampler.steps, sampler.nfe) == (3, 4)
    assert BeamSearchSampler(network, 1, 3, 2).nfe == 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random GPT-2 of transformers, and the same network here."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from gen_jax.interop import load_gpt2

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    network, params = load_gpt2(folder)
    return torch, theirs, TokenNetwork(network.config), params


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("beams", "count", "penalty"), [(4, 10, 0.0), (4, 10, 1.0), (2, 12, 2.0), (9, 6, -0.5)]
)
def test_agrees_with_transformers(pair, beams, count, penalty):
    torch, theirs, network, params = pair
    stop, generator = 12, np.random.default_rng(count)
    prompts = generator.integers(20, size=(12, 4))
    lengths = generator.integers(1, 5, size=12)
    there = np.arange(4) >= 4 - lengths[:, None]
    sampler = BeamSearchSampler(network, 4, count, beams, penalty, stop)
    ragged = [row[keep] for row, keep in zip(prompts, there, strict=True)]
    keys = sampling.sample_keys(0, 0, 12)
    found = np.asarray(sampling.generate(sampler, params, keys, pad_prompts(network, ragged, 4)))
    with torch.no_grad():
        expected = theirs.generate(
            torch.as_tensor(np.where(there, prompts, 0)),
            attention_mask=torch.as_tensor(there.astype(np.int64)),
            max_new_tokens=count,
            num_beams=beams,
            do_sample=False,
            early_stopping="never",
            length_penalty=penalty,
            eos_token_id=stop,
            pad_token_id=stop,
        )[:, 4:].numpy()
    expected = np.pad(expected, ((0, 0), (0, count - expected.shape[1])), constant_values=stop)
    np.testing.assert_array_equal(found, expected)
    assert (expected == stop).any(axis=1).any()
