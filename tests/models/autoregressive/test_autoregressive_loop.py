"""The loop of autoregressive decoding: its evaluations, full contexts, the compiled program."""

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

import kernels
from exact_sequences import next_logits
from gen_jax import keys as key_streams
from gen_jax import sampling
from gen_jax.models.autoregressive import (
    AutoregressiveModel,
    AutoregressiveSampler,
    SamplingOptions,
    make_prompts,
)
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from random_networks import LLAMA_FORM, random_params

GPT = TransformerConfig(vocabulary=9, context=16, layers=1, width=16, heads=2)
LLAMA = dataclasses.replace(GPT, heads=4, kv_heads=2, **LLAMA_FORM)
GREEDY = SamplingOptions(temperature=0)
PLAIN = SamplingOptions()
PROMPTS = [[1, 2, 3, 4], [5], [8, 0], [7, 7, 2], [6, 1, 0, 3], [3], [2, 8, 8]]


def model_of(config):
    return AutoregressiveModel(TokenNetwork(config))


def draw(sampler, prompts):
    params, keys = (
        random_params(sampler.model.network.config),
        sampling.sample_keys(0, 0, len(prompts)),
    )
    cond = make_prompts(sampler.model, prompts)
    return np.asarray(sampling.generate(sampler, params, keys, cond))


@functools.cache
def pick_program(options):
    return jax.jit(functools.partial(kernels.sample_logits, **options.choice))


def reread(network, params, prompts, count, options):
    """Drawing without a cache, with the window that the docstring describes; also the slides."""
    context, width = network.config.context, max(map(len, prompts))
    total = min(width + count - 1, context)
    keys = key_streams.grid(sampling.sample_keys(0, 0, len(prompts)), count)
    rows, firsts = [list(prompt) for prompt in prompts], [width - len(p) for p in prompts]
    pick = pick_program(options)
    offset, slides, drawn = 0, 0, []
    for i in range(count):
        place = width - 1 + i  # of the last token, in columns of the padded prompts
        if place - offset == total:
            offset += total - total // 2
            slides += 1
        windows = [row[max(offset - f, 0) :] for row, f in zip(rows, firsts, strict=True)]
        token = np.asarray(pick(next_logits(network, params, windows), keys[i]))
        rows = [[*row, new] for row, new in zip(rows, token, strict=True)]
        drawn.append(token)
    return np.stack(drawn, axis=1), slides


@pytest.mark.parametrize(
    ("config", "prompts", "context"),
    [(GPT, PROMPTS, 5), (LLAMA, PROMPTS, 5), (GPT, [[3], [4]], 2)],
    ids=["gpt", "llama", "two"],
)
def test_beyond_the_context_it_goes_on_from_the_last_half(config, prompts, context):
    config = dataclasses.replace(config, context=context)
    sampler = AutoregressiveSampler(model_of(config), max(map(len, prompts)), 14)
    network, params = sampler.model.network, random_params(config)
    expected, slides = reread(network, params, prompts, 14, PLAIN)
    np.testing.assert_array_equal(draw(sampler, prompts), expected)
    assert sampler.cache_length == context
    assert sampler.nfe == 14 + (len(prompts[0]) > 1) + slides
    assert slides > 2


def test_a_context_of_one_token():
    config = dataclasses.replace(GPT, context=1)
    sampler = AutoregressiveSampler(model_of(config), 1, 6, GREEDY)
    expected, _ = reread(sampler.model.network, random_params(config), [[3], [4]], 6, GREEDY)
    np.testing.assert_array_equal(draw(sampler, [[3], [4]]), expected)


@dataclasses.dataclass(frozen=True)
class CountingNetwork(TokenNetwork):
    """A network that notes how many new tokens each evaluation reads, while it runs."""

    def extend(self, prepared, tokens, *args, **options):
        jax.debug.callback(functools.partial(CALLS.append, tokens.shape[1]))
        return super().extend(prepared, tokens, *args, **options)


CALLS = []


@pytest.mark.parametrize(
    ("length", "count", "context", "expected"),
    [
        (1, 3, 16, [1, 1, 1]),
        (4, 13, 16, [3] + 13 * [1]),  # all but the last fill the context
        (4, 14, 16, [3] + 13 * [1] + [8, 1]),
        (5, 5, 5, [4, 1, 2, 1, 1, 1, 2, 1]),
    ],
)
def test_the_network_is_evaluated_as_often_as_is_said(length, count, context, expected):
    config = dataclasses.replace(GPT, context=context, layers=1)
    model = AutoregressiveModel(CountingNetwork(config))
    sampler = AutoregressiveSampler(model, length, count)
    CALLS.clear()
    draw(sampler, [list(range(length))] * 2)
    jax.effects_barrier()
    assert sorted(CALLS) == sorted(expected)
    assert sampler.nfe == len(expected)
    assert sampler.steps == count


class Program:
    """The text of a compiled program, by computation."""

    def __init__(self, text):
        self.computations, name = collections.defaultdict(list), None
        for line in text.splitlines():
            if begin := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                name = begin[1]
            elif line.startswith("}"):
                name = None
            elif name:
                self.computations[name].append(line.strip())

    def reachable(self, name):
        """Lines of a computation and of all that it calls."""
        seen, waiting = set(), [name]
        while waiting:
            current = waiting.pop()
            if current not in seen:
                seen.add(current)
                text = " ".join(self.computations[current])
                waiting += [n for n in re.findall(r"%([\w.\-]+)", text) if n in self.computations]
        return [line for name in seen for line in self.computations[name]]

    def loops(self):
        """(type of the carry, name of the body) of every loop."""
        lines = [line for lines in self.computations.values() for line in lines]
        found = (re.search(r"= (.*?) while\(.*body=%?([\w.\-]+)", line) for line in lines)
        return [match.groups() for match in found if match]


@pytest.mark.parametrize(
    ("options", "count"),
    [(GREEDY, 20), (PLAIN, 90), (SamplingOptions(top_k=5), 90)],
    ids=["greedy", "plain, several buckets", "top-k, several buckets"],
)
def test_the_compiled_loop_moves_no_cache_and_sorts_no_vocabulary(options, count):
    config = dataclasses.replace(GPT, vocabulary=53, context=128, layers=2)
    sampler = AutoregressiveSampler(model_of(config), 8, count, options)
    prepared = jax.jit(sampler.prepare)(random_params(config))
    cond, keys = make_prompts(sampler.model, [np.arange(8)] * 3), sampling.sample_keys(0, 0, 3)
    text = sampling.compile_generate(sampler, prepared, keys, cond).as_text()
    program, columns = Program(text), sampler.cache_length
    caches = f"f32[3,2,8,{columns}]", f"f32[3,2,{columns},8]"
    loops = [(carry, body) for carry, body in program.loops() if caches[0] in carry]
    # The other one there may be is that of the generator which makes the keys, before.
    assert len(loops) == 1
    assert len(program.loops()) <= 2
    assert all("u32[" in carry for carry, _ in program.loops() if caches[0] not in carry)
    carry, body = loops[0]
    assert all(carry.count(shape) == config.layers for shape in caches)
    lines = program.reachable(body)
    assert len(lines) > 100
    assert not [line for line in lines if " while(" in line]
    for shape in caches:
        moved = rf"= {re.escape(shape)}\S* (copy|transpose|convert|concatenate)\("
        assert not [line for line in lines if re.search(moved, line)]
        written = rf"= {re.escape(shape)}\S* dynamic-update-slice\("
        assert len([line for line in lines if re.search(written, line)]) == config.layers
    assert not [line for line in lines if " sort(" in line]
    # The head is read as it is stored, [D, V].
    assert "f32[16,53]" in carry
    heads = [line for line in lines if re.search(r"= f32\[(16,53|53,16)\]", line)]
    assert not [l for l in heads if not re.search(r" (parameter|get-tuple-element)\(", l)]


def test_one_cache_serves_the_whole_loop():
    """Beside arguments and caches the program needs little memory."""
    config = dataclasses.replace(GPT, context=512, width=64, vocabulary=16, layers=2)
    sampler = AutoregressiveSampler(model_of(config), 8, 500, GREEDY)
    prepared = jax.jit(sampler.prepare)(random_params(config))
    cond, keys = make_prompts(sampler.model, [np.arange(8)] * 4), sampling.sample_keys(0, 0, 4)
    memory = sampling.compile_generate(sampler, prepared, keys, cond).memory_analysis()
    caches = 4 * 2 * 2 * 4 * 64 * sampler.cache_length  # float32, keys and values, layers, B, D, T
    assert memory.temp_size_in_bytes < 2 * caches
