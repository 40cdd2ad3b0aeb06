"""Prompts, start tokens and sources of autoregressive samplers, and what they refuse."""

import dataclasses

import jax
import numpy as np
import pytest

from exact_sequences import next_logits
from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.models.autoregressive import (
    AutoregressiveModel,
    AutoregressiveSampler,
    BeamSearchSampler,
    SamplingOptions,
    SpeculativeSampler,
    make_prompts,
    prompts,
)
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import TokenNetwork
from random_networks import random_params

GPT = TransformerConfig(vocabulary=9, context=16, layers=1, width=16, heads=2)
STARTED = dataclasses.replace(GPT, extra_inputs=3, tied=False)  # tied, it repeats itself
PLAIN, START = (AutoregressiveModel(TokenNetwork(config)) for config in (GPT, STARTED))
READER = AutoregressiveModel(
    EncoderDecoder(dataclasses.replace(GPT, extra_inputs=1, memory=True), 1)
)
GREEDY = SamplingOptions(temperature=0)
RAGGED = [[1, 2, 3], [4], [], [5, 6]]
LABEL = np.array([2, 0, 1, 1], np.int32)


def test_prompts_are_aligned_at_their_ends():
    cond = make_prompts(PLAIN, [[1, 2, 3], (4,), np.array([5, 6])])
    np.testing.assert_array_equal(cond.prompt, [[1, 2, 3], [0, 0, 4], [0, 5, 6]])
    np.testing.assert_array_equal(cond.prompt_length, [3, 1, 2])
    assert cond.prompt.dtype == cond.prompt_length.dtype == np.int32
    assert set(make_prompts(PLAIN, [[1, 2], [3, 4]]).fields()) == {"prompt"}
    cond = make_prompts(PLAIN, [[1, 2], [3, 4]], 4)
    np.testing.assert_array_equal(cond.prompt, [[0, 0, 1, 2], [0, 0, 3, 4]])
    np.testing.assert_array_equal(cond.prompt_length, [2, 2])
    cond = make_prompts(START, RAGGED)
    np.testing.assert_array_equal(cond.prompt_length, [3, 1, 0, 2])
    assert make_prompts(START, [[], []]).prompt.shape == (2, 0)


@pytest.mark.parametrize(
    ("given", "length", "match"),
    [
        ([[1], []], None, "the prompt is empty"),
        ([[1, 9]], None, "has the token 9; the model knows 0 to 8"),
        ([[1], [-1, 2]], None, "has the token -1; the model knows 0 to 8"),
        ([list(range(9)) * 2], None, "18 tokens, the context of the model is 16"),
        ([[1, 2, 3]], 2, "3 tokens"),
        ([[2**40]], None, "has the token 1099511627776; the model knows 0 to 8"),
        ([], None, "prompt"),
    ],
)
def test_prompts_that_cannot_be(given, length, match):
    with pytest.raises(ValueError, match=match):
        make_prompts(PLAIN, given, length)


def test_a_start_token_is_no_part_of_a_prompt():
    with pytest.raises(ValueError, match="has the token 9; the model knows 0 to 8"):
        make_prompts(START, [[9, 1]])
    make_prompts(START, [[1] * 15])
    with pytest.raises(ValueError, match=r"16 tokens, the context .* is 16 with the start token"):
        make_prompts(START, [[1] * 16])


def test_start_tokens_stand_directly_before_prompts():
    cond = make_prompts(START, RAGGED).replace(label=LABEL)
    inputs, first = prompts.first_inputs(START, cond, 4)
    np.testing.assert_array_equal(first, [0, 2, 3, 1])
    for row, column, label, prompt in zip(inputs, first, LABEL, RAGGED, strict=True):
        assert row[int(column) :].tolist() == [9 + label, *prompt]
    inputs, first = prompts.first_inputs(START, Condition(), 2)
    assert first is None
    np.testing.assert_array_equal(inputs, [[9], [9]])
    inputs, first = prompts.first_inputs(START, Condition(prompt=np.ones((2, 2), int)), 2)
    assert first is None
    np.testing.assert_array_equal(inputs, [[9, 1, 1]] * 2)
    inputs, first = prompts.first_inputs(PLAIN, make_prompts(PLAIN, [[1, 2], [3]]), 2)
    np.testing.assert_array_equal(inputs, [[1, 2], [0, 3]])
    np.testing.assert_array_equal(first, [0, 1])


@pytest.fixture(scope="module")
def continued():
    """The greedy continuation of start tokens and ragged prompts, without a cache."""
    params = random_params(STARTED)
    rows = [[9 + label, *prompt] for label, prompt in zip(LABEL, RAGGED, strict=True)]
    for _ in range(5):
        best = next_logits(START.network, params, rows).argmax(axis=1)
        rows = [[*row, token] for row, token in zip(rows, best, strict=True)]
    return np.array([row[-5:] for row in rows])


@pytest.mark.parametrize("kind", ["sample", "beam search", "speculative"])
def test_samplers_begin_with_the_start_token(kind, continued):
    params = random_params(STARTED)
    if kind == "sample":
        sampler = AutoregressiveSampler(START, 3, 5, GREEDY)
    elif kind == "beam search":
        sampler = BeamSearchSampler(START, 3, 5, 1, 0.0)
    else:
        sampler = SpeculativeSampler(START, START, 3, 5, 1, GREEDY)
        params = {"target": params, "draft": random_params(STARTED, 2)}
    cond = make_prompts(START, RAGGED).replace(label=LABEL)
    assert set(cond.fields()) <= set(sampler.conditions)
    drawn = sampling.generate(sampler, params, sampling.sample_keys(0, 0, 4), cond)
    np.testing.assert_array_equal(drawn, continued)
    assert len(np.unique(continued, axis=0)) > 2


def test_no_condition_is_the_start_of_label_0():
    sampler = AutoregressiveSampler(START, 0, 5)
    keys, params = sampling.sample_keys(0, 0, 4), random_params(STARTED)
    none = np.asarray(sampling.generate(sampler, params, keys))
    labelled = Condition(label=np.array([0, 1, 2, 0]))
    drawn = np.asarray(sampling.generate(sampler, params, keys, labelled))
    np.testing.assert_array_equal(none[[0, 3]], drawn[[0, 3]])
    assert (none[1:3] != drawn[1:3]).any()
    assert sampler.nfe == 5
    assert AutoregressiveSampler(START, 1, 5).nfe == 6  # the start is read before the loop


def check(sampler, model, **fields):
    cond = Condition(**{name: np.array(value) for name, value in fields.items()})
    rows = len(next(iter(cond.fields().values()), [0]))
    cond.check(type(sampler).__name__, sampler.conditions, rows)
    sampler.check(random_params(model.network), cond)


@pytest.mark.parametrize("kind", [AutoregressiveSampler, BeamSearchSampler])
def test_conditions_that_cannot_be(kind):
    beams = (2,) if kind is BeamSearchSampler else ()
    sampler = kind(PLAIN, 2, 3, *beams)
    check(sampler, PLAIN, prompt=[[1, 2]])
    check(sampler, PLAIN, prompt=[[-7, 2], [1, 2]], prompt_length=[1, 2])  # -7 is not read
    for fields, match in (
        ({}, "prompts of 2 tokens: give the condition 'prompt'"),
        ({"prompt": [[1]]}, r"takes prompts \[B, 2\] \(its prompt_length\), not \[1, 1\]"),
        ({"prompt": [1]}, r"takes prompts \[B, 2\] \(its prompt_length\), not \[1\]"),
        ({"prompt": [[1, 9]]}, "the prompt has the token 9"),
        ({"prompt": [[-1, 2]]}, "the prompt has the token -1"),
        ({"prompt": [[1, 2]], "prompt_length": [0]}, "prompt_length must be in 1 to 2, got 0"),
        ({"prompt": [[1, 2]], "prompt_length": [3]}, "prompt_length must be in 1 to 2, got 3"),
        ({"prompt": [[1, 2]], "label": [0]}, "no use for the condition 'label'"),
        ({"prompt": [[1, 2]], "source": [[0]]}, "no use for the condition 'source'"),
    ):
        with pytest.raises(ValueError, match=match):
            check(sampler, PLAIN, **fields)
    sampler = kind(START, 2, 3, *beams)
    check(sampler, START, prompt=[[1, 2]] * 2, prompt_length=[0, 2], label=[0, 2])
    for label in (-1, 3):
        with pytest.raises(ValueError, match="labels must be in 0 to 2"):
            check(sampler, START, prompt=[[1, 2]], label=[label])
    sampler = kind(READER, 0, 3, *beams)
    check(sampler, READER, source=[[1, -1], [2, 3]], source_length=[1, 2])
    for fields, match in (
        ({}, "give the condition 'source'"),
        ({"source": [[10]]}, "the source has the token 10; the model knows 0 to 9"),
        ({"source": [[1, 2]], "source_length": [3]}, "source_length must be in 0 to 2, got 3"),
    ):
        with pytest.raises(ValueError, match=match):
            check(sampler, READER, **fields)


def test_parameters_of_another_model_are_refused():
    sampler, params = AutoregressiveSampler(PLAIN, 1, 3), random_params(GPT)
    cond = Condition(prompt=np.array([[1]]))
    sampler.check(params, cond)
    with pytest.raises(ValueError, match="token has the shape"):
        sampler.check(random_params(dataclasses.replace(GPT, extra_inputs=3)), cond)
    with pytest.raises(ValueError, match="pass what is in it"):
        BeamSearchSampler(PLAIN, 1, 3, 2).check({"params": params}, cond)
    pair = SpeculativeSampler(PLAIN, PLAIN, 1, 3)
    pair.check({"target": params, "draft": params}, cond)
    for wrong in (params, {"target": params}, [params, params]):
        with pytest.raises(ValueError, match="the parameters of two models"):
            pair.check(wrong, cond)
    with pytest.raises(ValueError, match="is missing"):
        pair.check({"target": params, "draft": {}}, cond)
    with pytest.raises(ValueError, match="token 9"):
        pair.check({"target": params, "draft": params}, Condition(prompt=np.array([[9]])))


def test_prefill_leaves_the_last_input_to_the_loop():
    prepared = PLAIN.network.prepare(random_params(GPT))
    inputs = np.array([[1, 2, 3, 4]], np.int32)
    fill = jax.jit(prompts.prefill, static_argnums=(0, 3))
    short, long = (fill(PLAIN.network, prepared, rows, 5) for rows in (inputs, inputs[:, :1]))
    for filled, empty in zip(jax.tree.leaves(short), jax.tree.leaves(long), strict=True):
        assert filled.shape == empty.shape
        assert not np.asarray(empty).any()
    keys = np.asarray(short[0].keys)  # [B, H, Dh, columns]
    assert (np.abs(keys).max(axis=(0, 1, 2)) > 0).tolist() == [True] * 3 + [False] * 2
