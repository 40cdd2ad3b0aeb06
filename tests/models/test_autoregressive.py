"""Autoregressive models: exact likelihood, exact samples, and the loop that draws them."""

import collections
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from scipy import stats

import kernels
from gen_jax import keys as key_streams
from gen_jax import sampling
from gen_jax.data import MarkovSource
from gen_jax.models.autoregressive import losses as autoregressive
from gen_jax.models.autoregressive.config import TokenChoice
from gen_jax.models.autoregressive.losses import AutoregressiveSampler, pad_prompts
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from random_networks import LLAMA_FORM, random_params

pytestmark = pytest.mark.usefixtures("quick_compile")

GPT = TransformerConfig(vocabulary=9, context=16, layers=1, width=16, heads=2)
LLAMA = dataclasses.replace(
    GPT,
    heads=4,
    kv_heads=2,
    **LLAMA_FORM,
)
FORMS = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
THREE = dataclasses.replace(GPT, vocabulary=3, context=8, layers=1, extra_inputs=2)
GREEDY = TokenChoice(temperature=0)
PLAIN = TokenChoice()
MIXED = TokenChoice(temperature=1.3, top_k=2, top_p=0.9)
PROMPTS = [[1, 2, 3, 4], [5], [8, 0], [7, 7, 2], [6, 1, 0, 3], [3], [2, 8, 8]]

apply = jax.jit(lambda network, params, tokens: network(params, tokens), static_argnums=0)
log_prob_of = jax.jit(autoregressive.log_prob, static_argnums=0)
loss_of = jax.jit(autoregressive.loss, static_argnums=0)


def draw(sampler, prompts=PROMPTS, seed=0, params=None):
    network = sampler.network
    params = random_params(network.config) if params is None else params
    keys = sampling.sample_keys(seed, 0, len(prompts))
    return np.asarray(sampling.generate(sampler, params, keys, pad_prompts(network, prompts)))


def collect(*args, **kwargs):
    return np.concatenate([chunk.samples for chunk in sampling.generate_many(*args, **kwargs)])


def all_sequences(vocabulary, length):
    return np.array(list(itertools.product(range(vocabulary), repeat=length)), np.int32)


@pytest.mark.parametrize("label", [None, 0, 1])
def test_probabilities_of_all_sequences_sum_to_one(label):
    network, params = TokenNetwork(THREE), random_params(THREE)
    tokens = all_sequences(3, 4)
    labels = None if label is None else np.full(81, label, np.int32)
    log_prob = np.asarray(log_prob_of(network, params, tokens, labels), np.float64)
    assert log_prob.shape == (81, 4)
    p = np.exp(log_prob.sum(axis=1))
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert 0.02 < p.max() < 0.5
    # The chain rule, from the logits.
    start = np.full((81, 1), 3 + (label or 0))
    logits = apply(network, params, np.concatenate([start, tokens[:, :-1]], axis=1))
    chain = np.asarray(jax.nn.log_softmax(logits))
    chain = np.take_along_axis(chain, tokens[..., None], axis=2)
    np.testing.assert_allclose(log_prob, chain[..., 0], atol=1e-5)
    value, metrics = loss_of(
        network, params, {"tokens": tokens} | ({} if label is None else {"label": labels}), None
    )
    assert value == pytest.approx(-log_prob.mean(), abs=1e-5)
    assert metrics == {}


def test_labels_differ_and_no_label_is_the_first():
    network, params = TokenNetwork(THREE), random_params(THREE)
    tokens = all_sequences(3, 4)
    none, zero, one = (
        np.asarray(log_prob_of(network, params, tokens, labels))
        for labels in (None, np.zeros(81, np.int32), np.ones(81, np.int32))
    )
    np.testing.assert_array_equal(none, zero)
    assert np.abs(zero - one).max() > 0.01
    inputs, targets = autoregressive.inputs_and_targets(network, tokens, np.arange(81) % 2)
    np.testing.assert_array_equal(inputs[:, 0], 3 + np.arange(81) % 2)
    np.testing.assert_array_equal(inputs[:, 1:], tokens[:, :-1])
    np.testing.assert_array_equal(targets, tokens)


def test_without_a_start_the_first_token_is_given():
    config = dataclasses.replace(THREE, extra_inputs=0)
    network, params = TokenNetwork(config), random_params(config)
    tokens = all_sequences(3, 4)
    log_prob = np.asarray(log_prob_of(network, params, tokens))
    assert log_prob.shape == (81, 3)
    p = np.exp(log_prob.sum(axis=1)).reshape(3, 27)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)
    value, _ = loss_of(network, params, {"tokens": tokens}, None)
    assert value == pytest.approx(-log_prob.mean(), abs=1e-5)


def next_logits(network, params, rows):
    """Uncached logits after sequences of any lengths, padded on the right to the context."""
    context = network.config.context
    tokens = np.zeros((len(rows), context), np.int32)
    for row, given in zip(tokens, rows, strict=True):
        row[: len(given)] = given
    logits = np.asarray(apply(network, params, tokens))
    return logits[np.arange(len(rows)), [len(row) - 1 for row in rows]]


@FORMS
@pytest.mark.parametrize("prompts", [PROMPTS, [[4]] * 2, [[1, 2, 3], [0, 0, 5]]])
def test_greedy_takes_the_largest_uncached_logit(config, prompts):
    network, params = TokenNetwork(config), random_params(config)
    sampler = AutoregressiveSampler(network, max(map(len, prompts)), 6, GREEDY)
    got, rows = draw(sampler, prompts), [list(prompt) for prompt in prompts]
    assert got.dtype == np.int32
    for i in range(6):
        best = next_logits(network, params, rows).argmax(axis=1)
        np.testing.assert_array_equal(got[:, i], best)
        rows = [[*row, token] for row, token in zip(rows, best, strict=True)]
    assert len({tuple(row) for row in got.tolist()}) > 1 or len(prompts) == 2


@FORMS
def test_the_loop_is_its_steps_in_python(config):
    network, params = TokenNetwork(config), random_params(config)
    sampler = AutoregressiveSampler(network, 4, 6, TokenChoice(top_k=6))
    cond, keys = pad_prompts(network, PROMPTS), sampling.sample_keys(0, 0, 7)
    prepared = sampler.prepare(params)
    state, step = jax.jit(sampler.init)(prepared, keys, cond), jax.jit(sampler.step)
    for i in range(sampler.steps):
        state = step(prepared, state, jnp.int32(i))
    np.testing.assert_array_equal(sampler.finish(prepared, state), draw(sampler))


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


def exact_distribution(network, params, prompt, length, choice):
    """Probability of every continuation, in the order of `all_sequences`."""
    continuations = all_sequences(network.config.vocabulary, length)
    p = np.ones(len(continuations))
    for i in range(length):
        logits = next_logits(network, params, [[*prompt, *row[:i]] for row in continuations])
        p *= [conditional(a, choice)[row[i]] for a, row in zip(logits, continuations, strict=True)]
    assert p.sum() == pytest.approx(1, abs=1e-5)
    return p


def p_value(drawn, exact):
    """Of Pearson's test over the 27 continuations, rare ones joined to the last frequent one."""
    observed = np.bincount(drawn @ [9, 3, 1], minlength=27)
    if observed[exact == 0].any():
        return 0.0
    order = np.argsort(-exact)
    observed, expected = observed[order], len(drawn) * exact[order] / exact.sum()
    ends = np.arange((expected >= 8).sum())
    return stats.chisquare(np.add.reduceat(observed, ends), np.add.reduceat(expected, ends)).pvalue


@pytest.mark.parametrize("choice", [PLAIN, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("prompt", [[4], [3, 1, 0, 2]], ids=["start", "prompt"])
def test_samples_have_the_exact_distribution(prompt, choice):
    network, params = TokenNetwork(THREE), random_params(THREE)
    exact = exact_distribution(network, params, prompt, 3, choice)
    if choice == PLAIN and prompt == [4]:
        log_prob = np.asarray(
            log_prob_of(network, params, all_sequences(3, 3), np.ones(27, np.int32))
        )
        np.testing.assert_allclose(exact, np.exp(log_prob.sum(axis=1)), rtol=1e-4)
    sampler = AutoregressiveSampler(network, len(prompt), 3, choice)
    drawn = draw(sampler, [prompt] * 20_000)
    assert (exact > 0).sum() >= 6
    assert exact.max() < 0.7
    assert p_value(drawn, exact) > 1e-4
    if choice == MIXED:  # the test tells it from the unfiltered distribution
        assert p_value(drawn, exact_distribution(network, params, prompt, 3, PLAIN)) < 1e-6


def test_a_stop_token_fills_the_rest():
    network = TokenNetwork(GPT)
    free = AutoregressiveSampler(network, 4, 12)
    stopping = dataclasses.replace(free, stop=3)
    drawn, stopped = (draw(sampler, PROMPTS * 4) for sampler in (free, stopping))
    ends = 0
    for row, cut in zip(drawn, stopped, strict=True):
        places = np.flatnonzero(row == 3)
        end = places[0] if len(places) else 12
        ends += 0 < end < 11
        np.testing.assert_array_equal(cut[:end], row[:end])
        assert (cut[end:] == 3).all()
    assert ends > 5


def test_a_sample_does_not_know_its_batch_or_device():
    network, params = TokenNetwork(LLAMA), random_params(LLAMA)
    sampler = AutoregressiveSampler(network, 4, 8, TokenChoice(temperature=1.5))
    cond, whole = pad_prompts(network, PROMPTS), draw(sampler, seed=3)
    assert len({row.tobytes() for row in whole}) == 7
    for size in (1, 3, 8):
        got = collect(sampler, params, 3, 7, cond=cond, micro_batch=size)
        np.testing.assert_array_equal(got, whole)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    got = collect(sampler, params, 3, 7, cond=cond, micro_batch=8, mesh=mesh)
    np.testing.assert_array_equal(got, whole)
    rest = {name: leaf[4:] for name, leaf in cond.items()}
    got = collect(sampler, params, 3, 3, cond=rest, micro_batch=8, start=4)
    np.testing.assert_array_equal(got, whole[4:])


def test_padding_on_the_left_does_not_change_a_sample():
    network, params = TokenNetwork(GPT), random_params(GPT)
    keys = sampling.sample_keys(0, 0, 2)
    drawn = []
    for length in (3, 6):
        sampler = AutoregressiveSampler(network, length, 6)
        cond = pad_prompts(network, [[1, 2, 3], [4, 5, 6]], length)
        drawn.append(np.asarray(sampling.generate(sampler, params, keys, cond)))
    np.testing.assert_array_equal(*drawn)


def test_the_trajectory_ends_in_the_sample():
    network, params = TokenNetwork(GPT), random_params(GPT)
    sampler = AutoregressiveSampler(network, 4, 8, stop=3)
    cond, keys = pad_prompts(network, PROMPTS), sampling.sample_keys(0, 0, 7)
    samples, states = sampling.generate(sampler, params, keys, cond, trajectory=True)
    np.testing.assert_array_equal(samples, draw(sampler))
    samples, tokens = np.asarray(samples), np.asarray(states.tokens)
    for i in range(8):
        np.testing.assert_array_equal(tokens[i, :, 4 : 5 + i], samples[:, : i + 1])
        assert (tokens[i, :, 5 + i :] == 0).all()
    np.testing.assert_array_equal(tokens[:, :, :4], np.tile(cond["tokens"], (8, 1, 1)))


def test_a_stream_shows_the_same_tokens():
    network, params = TokenNetwork(GPT), random_params(GPT)
    sampler = AutoregressiveSampler(network, 4, 8)
    cond = jax.tree.map(jnp.asarray, pad_prompts(network, PROMPTS))
    keys, whole = sampling.sample_keys(0, 0, 7), draw(sampler)
    for every in (3, 20):  # what it was given is still there the second time
        shown = 0
        for state in sampling.stream(sampler, params, keys, cond, every=every):
            shown = min(shown + every, 8)
            tokens = np.asarray(state.tokens)
            np.testing.assert_array_equal(tokens[:, 4 : 4 + shown], whole[:, :shown])
            assert (tokens[:, 4 + shown :] == 0).all()
        assert shown == 8


@dataclasses.dataclass(frozen=True)
class Countdown:
    """Counts each sample down to nothing by a key's worth; `trips` counts the steps."""

    steps: int = 10
    nfe: int = 10

    def prepare(self, params):
        return params

    def init(self, params, keys, cond):
        return {"left": cond, "sum": jnp.zeros(len(keys)), "keys": keys, "trips": jnp.int32(0)}

    def step(self, params, state, i):
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i)))(state["keys"])
        going = state["left"] > 0
        return state | {
            "left": state["left"] - going,
            "sum": state["sum"] + jnp.where(going, noise, 0) * params,
            "trips": state["trips"] + 1,
        }

    def finish(self, params, state):
        return jnp.stack([state["sum"], jnp.broadcast_to(state["trips"], len(state["sum"]))])


@dataclasses.dataclass(frozen=True)
class StoppingCountdown(Countdown):
    def stopped(self, state):
        return (state["left"] == 0).all()


def test_a_loop_that_may_stop_takes_no_further_steps():
    keys = sampling.sample_keys(0, 0, 4)
    for left, trips in (([0, 0, 0, 0], 0), ([1, 6, 0, 2], 6), ([12, 0, 0, 0], 10)):
        left = jnp.array(left)
        whole = np.asarray(sampling.generate(Countdown(), 2.0, keys, left))
        early = np.asarray(sampling.generate(StoppingCountdown(), 2.0, keys, left))
        np.testing.assert_array_equal(early[0], whole[0])
        assert (whole[1] == 10).all()
        assert (early[1] == trips).all()
        samples, _ = sampling.generate(StoppingCountdown(), 2.0, keys, left, trajectory=True)
        np.testing.assert_array_equal(samples[0], whole[0])


@pytest.mark.parametrize("every", [1, 4, 11])
@pytest.mark.parametrize("sampler", [Countdown(), StoppingCountdown()])
def test_a_stream_of_any_sampler(sampler, every):
    keys, left = sampling.sample_keys(0, 0, 4), jnp.array([1, 6, 0, 2])
    whole = np.asarray(sampling.generate(sampler, 2.0, keys, left))
    for state in sampling.stream(sampler, 2.0, keys, left, every=every):
        last = np.asarray(sampler.finish(2.0, state))
    np.testing.assert_array_equal(last, whole)
    np.testing.assert_array_equal(left, [1, 6, 0, 2])


@pytest.mark.parametrize("every", [0, -1])
def test_a_stream_refuses_to_show_nothing(every):
    keys, left = sampling.sample_keys(0, 0, 1), jnp.array([1])
    with pytest.raises(ValueError):
        next(sampling.stream(Countdown(), 2.0, keys, left, every=every), None)


@functools.cache
def pick_program(choice):
    return jax.jit(functools.partial(kernels.sample_logits, **dataclasses.asdict(choice)))


def reread(network, params, prompts, count, choice, seed=0):
    """Drawing without a cache, with the window that the docstring describes; also the slides."""
    context, width = network.config.context, max(map(len, prompts))
    total = min(width + count - 1, context)
    keys = key_streams.grid(sampling.sample_keys(seed, 0, len(prompts)), count)
    rows, firsts = [list(prompt) for prompt in prompts], [width - len(p) for p in prompts]
    pick = pick_program(choice)
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


@FORMS
@pytest.mark.parametrize(("prompts", "context"), [(PROMPTS, 5), ([[3], [4]], 2)])
def test_beyond_the_context_it_goes_on_from_the_last_half(config, prompts, context):
    config = dataclasses.replace(config, context=context)
    network, params = TokenNetwork(config), random_params(config)
    for choice in (GREEDY, TokenChoice()):
        sampler = AutoregressiveSampler(network, max(map(len, prompts)), 14, choice)
        expected, slides = reread(network, params, prompts, 14, choice)
        np.testing.assert_array_equal(draw(sampler, prompts), expected)
        assert sampler.columns == context
        assert sampler.nfe == 14 + (len(prompts[0]) > 1) + slides
        assert slides > 2


def test_a_context_of_one_token():
    config = dataclasses.replace(GPT, context=1)
    network, params = TokenNetwork(config), random_params(config)
    sampler = AutoregressiveSampler(network, 1, 6, GREEDY)
    expected, _ = reread(network, params, [[3], [4]], 6, GREEDY)
    np.testing.assert_array_equal(draw(sampler, [[3], [4]]), expected)


@dataclasses.dataclass(frozen=True)
class CountingNetwork(TokenNetwork):
    """Notes the number of new tokens of every evaluation when it is run."""

    def extend(self, prepared, tokens, *args, **options):
        jax.debug.callback(functools.partial(CALLS.append, tokens.shape[1]))
        return super().extend(prepared, tokens, *args, **options)


CALLS = []


@pytest.mark.parametrize(
    ("length", "count", "context", "expected"),
    [
        (1, 3, 16, [1, 1, 1]),
        (4, 3, 16, [3, 1, 1, 1]),
        (4, 13, 16, [3] + 13 * [1]),  # all but the last fill the context
        (4, 14, 16, [3] + 13 * [1] + [8, 1]),
        (5, 5, 5, [4, 1, 2, 1, 1, 1, 2, 1]),
    ],
)
def test_the_network_is_evaluated_as_often_as_is_said(length, count, context, expected):
    config = dataclasses.replace(GPT, context=context, layers=1)
    network = CountingNetwork(config)
    sampler = AutoregressiveSampler(network, length, count)
    CALLS.clear()
    draw(sampler, [list(range(length))] * 2)
    jax.effects_barrier()
    assert sorted(CALLS) == sorted(expected)
    assert sampler.nfe == len(expected)
    assert sampler.steps == count


def test_prompts_are_aligned_at_their_ends():
    network = TokenNetwork(GPT)
    cond = pad_prompts(network, [[1, 2, 3], (4,), np.array([5, 6])])
    np.testing.assert_array_equal(cond["tokens"], [[1, 2, 3], [0, 0, 4], [0, 5, 6]])
    np.testing.assert_array_equal(cond["first"], [0, 2, 1])
    assert cond["tokens"].dtype == cond["first"].dtype == np.int32
    assert set(pad_prompts(network, [[1, 2], [3, 4]])) == {"tokens"}
    cond = pad_prompts(network, [[1, 2], [3, 4]], 4)
    np.testing.assert_array_equal(cond["tokens"], [[0, 0, 1, 2], [0, 0, 3, 4]])
    np.testing.assert_array_equal(cond["first"], [2, 2])
    assert pad_prompts(TokenNetwork(THREE), [[4]])["tokens"] == [[4]]  # a start


@pytest.mark.parametrize(
    ("prompts", "length", "match"),
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
def test_prompts_that_cannot_be(prompts, length, match):
    with pytest.raises(ValueError, match=match):
        pad_prompts(TokenNetwork(GPT), prompts, length)


def test_what_the_sampler_refuses():
    network = TokenNetwork(GPT)
    with pytest.raises(ValueError, match="needs a causal network"):
        AutoregressiveSampler(TokenNetwork(dataclasses.replace(GPT, causal=False)), 2, 3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        AutoregressiveSampler(network, 2, 0)
    for length in (0, 17):
        with pytest.raises(ValueError, match=f"a prompt of {length} tokens does not fit"):
            AutoregressiveSampler(network, length, 3)
    sampler = AutoregressiveSampler(network, 3, 3)
    with pytest.raises(ValueError, match="prompts of 2 columns for a sampler of 3"):
        draw(sampler, [[1, 2]])
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TokenChoice(**wrong)


def test_a_markov_source_is_learned_to_its_entropy():
    source = MarkovSource.random(5, seed=3, concentration=1.0)
    config = TransformerConfig(
        vocabulary=5, context=32, layers=1, width=32, heads=2, mlp_dim=64, extra_inputs=1
    )
    network = TokenNetwork(config)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 300))
    batches = np.stack([source.batch(0, i, 64, length=32)["tokens"] for i in range(300)])

    @jax.jit
    def train(params):
        def update(carry, tokens):
            params, state = carry
            gradient, _ = jax.grad(
                lambda p: autoregressive.loss(network, p, {"tokens": tokens}, None), has_aux=True
            )(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(update, (params, optimizer.init(params)), batches)[0][0]

    params = train(network.init(jax.random.key(0)))
    fresh = source.batch(1, 0, 2048, length=32)["tokens"]
    log_prob = np.asarray(
        jax.jit(functools.partial(autoregressive.log_prob, network))(params, fresh)
    )
    # Against the truth on the same sequences, which takes their luck out; and the entropy itself.
    excess = source.log_prob(fresh).mean() - log_prob.sum(axis=1).mean()
    assert -1e-4 < excess / source.entropy(32) < 0.01
    assert -log_prob[:, 1:].mean() == pytest.approx(source.entropy_rate, rel=0.01)
    assert 0.3 * np.log(5) < source.entropy_rate < 0.9 * np.log(5)

    sampler = AutoregressiveSampler(network, 1, 32)
    drawn = draw(sampler, [[5]] * 2048, params=params)
    counts = np.zeros((5, 5))
    np.add.at(counts, (drawn[:, :-1], drawn[:, 1:]), 1)
    found = counts / counts.sum(axis=1, keepdims=True)
    assert (np.abs(found - source.transition).sum(axis=1) / 2 < 0.05).all()
    first = np.bincount(drawn[:, 0], minlength=5) / len(drawn)
    assert np.abs(first - source.initial).sum() / 2 < 0.05


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
    ("choice", "count"),
    [(GREEDY, 20), (PLAIN, 90), (TokenChoice(top_k=5), 20), (TokenChoice(top_k=5), 90)],
    ids=["greedy", "plain, several buckets", "top-k", "top-k, several buckets"],
)
def test_the_compiled_loop_moves_no_cache_and_sorts_no_vocabulary(choice, count):
    config = dataclasses.replace(GPT, vocabulary=53, context=128, layers=2)
    network = TokenNetwork(config)
    sampler = AutoregressiveSampler(network, 8, count, choice)
    prepared = jax.jit(sampler.prepare)(random_params(config))
    cond, keys = pad_prompts(network, [np.arange(8)] * 3), sampling.sample_keys(0, 0, 3)
    text = sampling.compile_generate(sampler, prepared, keys, cond).as_text()
    program, columns = Program(text), sampler.columns
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
    """Memory: beside arguments and caches the program needs little."""
    config = dataclasses.replace(GPT, context=1024, width=64, vocabulary=16, layers=2)
    network = TokenNetwork(config)
    sampler = AutoregressiveSampler(network, 8, 1000, GREEDY)
    prepared = jax.jit(sampler.prepare)(random_params(config))
    cond, keys = pad_prompts(network, [np.arange(8)] * 4), sampling.sample_keys(0, 0, 4)
    memory = sampling.compile_generate(sampler, prepared, keys, cond).memory_analysis()
    caches = 4 * 2 * 2 * 4 * 64 * sampler.columns  # float32, keys and values, layers, B, D, T
    assert memory.temp_size_in_bytes < 2 * caches
