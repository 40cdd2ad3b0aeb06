"""The transformer with an encoder: caches, padding of sources, and the samplers that read one."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.models.autoregressive.beam_search import BeamSearchSampler
from gen_jax.models.autoregressive.config import SamplingOptions
from gen_jax.models.autoregressive.losses import AutoregressiveModel
from gen_jax.models.autoregressive.samplers import AutoregressiveSampler
from gen_jax.models.sequences import mean_of_first
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.encoder_decoder import EncoderDecoder
from random_networks import LLAMA_FORM, random_params

GPT = TransformerConfig(
    vocabulary=5, context=12, layers=2, width=16, heads=2, extra_inputs=1, memory=True
)
LLAMA = dataclasses.replace(GPT, layers=1, heads=4, kv_heads=2, **LLAMA_FORM)
FORMS = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
GREEDY = SamplingOptions(temperature=0)
START = 5
CALLS = []

generator = np.random.default_rng(0)
SOURCE = generator.integers(0, 5, (6, 7)).astype(np.int32)
LENGTH = np.array([7, 3, 1, 5, 2, 4], np.int32)
TOKENS = generator.integers(0, 5, (6, 8)).astype(np.int32)
RAGGED = {"source": SOURCE, "source_length": LENGTH}
COND = Condition(**RAGGED)  # the start token stands before each sample by itself


@dataclasses.dataclass(frozen=True)
class Counting(EncoderDecoder):
    """One that writes down each call of `extend`."""

    def extend(self, prepared, tokens, caches, column, first=None, **options):
        jax.debug.callback(lambda: CALLS.append(column))
        return super().extend(prepared, tokens, caches, column, first, **options)


def make(config):
    network = EncoderDecoder(config, 1)
    return network, random_params(network)


@functools.partial(jax.jit, static_argnums=0)
def call(network, params, tokens, batch):
    return network(params, tokens, **network.condition(params, batch))


@functools.partial(jax.jit, static_argnums=0)
def evaluate(network, params, tokens, cond):
    prepared = network.prepare(params)
    return network.evaluate(prepared, tokens, **network.encode(prepared, cond))


@functools.partial(jax.jit, static_argnums=(0, 4))
def extend(network, params, tokens, cond, cuts):
    """Logits of pieces that end at the cuts, one after the other through the caches."""
    prepared = network.prepare(params)
    encoded, caches = network.encode(prepared, cond), network.make_caches(*tokens.shape)
    logits = []
    for start, end in itertools.pairwise((0, *cuts)):
        hidden, caches = network.extend(prepared, tokens[:, start:end], caches, start, **encoded)
        logits.append(network.logits(prepared, hidden))
    return jnp.concatenate(logits, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def log_prob(model, params, batch):
    return model.log_prob(params, batch)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(model, params, batch, keys=None):
    return model.loss(params, batch, keys)[0]


@FORMS
def test_the_cache_gives_what_the_whole_sequence_gives(config):
    network, params = make(config)
    whole = call(network, params, TOKENS, RAGGED)
    assert whole.shape == (6, 8, 5)
    assert whole.dtype == jnp.float32
    assert np.asarray(whole).std(axis=-1).min() > 0.05
    cached = extend(network, params, TOKENS, RAGGED, (4, 5, 8))
    np.testing.assert_allclose(cached, whole, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@FORMS
def test_prepared_parameters_give_the_same(config, causal):
    network, params = make(dataclasses.replace(config, causal=causal))
    whole = call(network, params, TOKENS, RAGGED)
    np.testing.assert_allclose(evaluate(network, params, TOKENS, RAGGED), whole, atol=1e-5)
    later = np.concatenate([TOKENS[:, :5], 4 - TOKENS[:, 5:]], axis=1)
    moved = np.abs(call(network, params, later, RAGGED) - whole)[:, :5].max()
    assert moved == 0 if causal else moved > 0.01


@FORMS
def test_padding_of_the_source_changes_nothing(config):
    network, params = make(config)
    whole = call(network, params, TOKENS, RAGGED)
    beyond = np.arange(7) >= LENGTH[:, None]
    other = RAGGED | {"source": np.where(beyond, (SOURCE + 1) % 5, SOURCE)}
    np.testing.assert_allclose(call(network, params, TOKENS, other), whole, atol=1e-5)
    wider = RAGGED | {"source": np.pad(SOURCE, ((0, 0), (0, 2)), constant_values=4)}
    np.testing.assert_allclose(call(network, params, TOKENS, wider), whole, atol=1e-5)
    short = {"source": SOURCE[3:4, :5]}
    np.testing.assert_allclose(call(network, params, TOKENS[3:4], short), whole[3:4], atol=1e-5)


@FORMS
def test_the_source_and_its_order_matter(config):
    network, params = make(config)
    source = np.tile(np.array([0, 1, 2, 3, 4, 0, 1], np.int32), (6, 1))
    whole = call(network, params, TOKENS, {"source": source})
    for other in (source[:, ::-1], (source + 1) % 5, np.roll(source, 1, axis=1)):
        changed = np.abs(call(network, params, TOKENS, {"source": other}) - whole)
        assert (changed.max((1, 2)) > 0.01).all()


def test_one_table_of_tokens():
    params = make(GPT)[1]
    assert set(params) == {"encoder", "decoder"}
    assert "token" not in params["encoder"]
    assert "head" not in params["encoder"]


@pytest.mark.parametrize("tied", [True, False])
def test_all_but_norms_are_cast(tied):
    config = dataclasses.replace(GPT, dtype="bfloat16", tied=tied)
    network, params = make(config)
    prepared = jax.eval_shape(network.prepare, params)
    leaves = jax.tree_util.tree_leaves_with_path(prepared.params)
    assert len(leaves) == len(jax.tree.leaves(params)) - (not tied)
    kept = set()
    for path, leaf in leaves:
        names = [entry.key for entry in path]
        normal = any(name.startswith("norm") for name in names)
        assert leaf.dtype == (jnp.float32 if normal else jnp.bfloat16), names
        kept |= {names[0]} if normal else set()
    assert kept == {"encoder", "decoder"}
    assert prepared.head.dtype == jnp.bfloat16
    assert prepared.head.shape == (16, 5)


def test_bfloat16_is_close():
    network, params = make(LLAMA)
    half = EncoderDecoder(dataclasses.replace(LLAMA, dtype="bfloat16"), 1)
    logits = evaluate(half, params, TOKENS, RAGGED)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - call(network, params, TOKENS, RAGGED)).max() < 0.3


def generate(sampler, params, cond=COND, seed=0):
    keys = sampling.sample_keys(seed, 0, len(cond.source))
    return np.asarray(sampling.generate(sampler, params, keys, cond))


@functools.cache
def greedy(config):
    """Argmax of uncached logits, one token after the other."""
    network, params = make(config)
    row = np.full((6, 9), START, np.int32)
    for i in range(8):
        logits = np.asarray(call(network, params, row, RAGGED))
        row[:, i + 1] = logits[:, i].argmax(axis=-1)
    return row[:, 1:]


@FORMS
def test_greedy_takes_the_largest_uncached_logit(config):
    network, params = make(config)
    wanted = greedy(config)
    assert len({row.tobytes() for row in wanted}) > 2
    sampler = AutoregressiveSampler(AutoregressiveModel(network), 0, 8, GREEDY)
    np.testing.assert_array_equal(generate(sampler, params), wanted)


def until(rows, eos):
    """Rows that are filled with the token that ends them after the first one, and where that is."""
    ended = np.cumsum(rows == eos, axis=1) > 0
    return np.where(ended, eos, rows), rows.shape[1] - ended.sum(axis=1)


def test_the_loop_ends_when_all_have_ended():
    params = random_params(EncoderDecoder(GPT, 1))
    endless = AutoregressiveSampler(AutoregressiveModel(Counting(GPT, 1)), 0, 12)
    trips = set()
    drawn = [generate(endless, params, seed=seed) for seed in range(20)]
    eos = int(np.bincount(np.concatenate(drawn).ravel()).argmax())
    sampler = dataclasses.replace(endless, eos=eos)
    for seed, rows in enumerate(drawn):
        wanted, ends = until(rows, eos)
        jax.effects_barrier()
        CALLS.clear()
        np.testing.assert_array_equal(generate(sampler, params, seed=seed), wanted)
        jax.effects_barrier()
        assert len(CALLS) == min(ends.max() + 1, 12)
        trips.add(len(CALLS))
    assert min(trips) < 10
    assert len(trips) > 1
    assert sampler.nfe == 12


def test_one_beam_is_greedy():
    network, params = make(GPT)
    wanted = greedy(GPT)
    sampler = BeamSearchSampler(AutoregressiveModel(network), 0, 8, 1)
    np.testing.assert_array_equal(generate(sampler, params), wanted)
    eos = int(np.bincount(wanted[:, 2:6].ravel()).argmax())
    ended, ends = until(wanted, eos)
    assert ends.min() < 8
    sampler = dataclasses.replace(sampler, length_penalty=0.0, eos=eos)
    np.testing.assert_array_equal(generate(sampler, params), ended)


@FORMS
def test_enough_beams_find_the_most_probable(config):
    network, params = make(config)
    model = AutoregressiveModel(network)
    found = generate(BeamSearchSampler(model, 0, 3, 25), params)
    rows = np.array(list(itertools.product(range(5), repeat=3)), np.int32)
    first = greedy(config)[:, :3]
    for b in range(6):
        one = {name: np.repeat(leaf[b : b + 1], 125, axis=0) for name, leaf in RAGGED.items()}
        scores = np.asarray(log_prob(model, params, one | {"tokens": rows}))
        of = {tuple(row): value for row, value in zip(rows.tolist(), scores, strict=True)}
        np.testing.assert_allclose(np.exp(scores.astype(np.float64)).sum(), 1, atol=1e-5)
        assert of[tuple(found[b].tolist())] == pytest.approx(scores.max(), abs=1e-5)
        assert of[tuple(found[b].tolist())] >= of[tuple(first[b].tolist())] - 1e-5


@pytest.mark.parametrize(
    "make_sampler",
    [
        lambda model: AutoregressiveSampler(model, 0, 6),
        lambda model: BeamSearchSampler(model, 0, 6, 3),
    ],
    ids=["autoregressive", "beams"],
)
def test_samplers_do_not_read_the_padding(make_sampler):
    network, params = make(LLAMA)
    sampler = make_sampler(AutoregressiveModel(network))
    beyond = np.arange(7) >= LENGTH[:, None]
    changed = COND.replace(source=np.where(beyond, (SOURCE + 1) % 5, SOURCE))
    drawn = generate(sampler, params)
    np.testing.assert_array_equal(drawn, generate(sampler, params, changed))
    assert len({row.tobytes() for row in drawn}) > 2


def test_the_mean_of_the_first():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert mean_of_first(values) == 5.5
    assert mean_of_first(values, np.array([1, 0, 3])) == (0 + 8 + 9 + 10) / 4
    assert mean_of_first(values, np.array([0, 0, 0])) == 0
    spoiled = np.where(np.arange(4) < 2, values, np.inf)
    assert mean_of_first(spoiled, np.array([2, 2, 2])) == values[:, :2].mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_of_what_is_there(smoothing):
    network, params = make(GPT)
    model = AutoregressiveModel(network, smoothing)
    length = np.array([8, 1, 3, 5, 2, 7], np.int32)
    beyond = np.arange(8) >= length[:, None]
    first, second = (
        float(loss_of(model, params, RAGGED | {"tokens": tokens, "length": length}))
        for tokens in (TOKENS, np.where(beyond, 4 - TOKENS, TOKENS))
    )
    assert first == second
    inputs = np.concatenate([np.full((6, 1), START, np.int32), TOKENS[:, :-1]], axis=1)
    log_prob = np.asarray(jax.nn.log_softmax(call(network, params, inputs, RAGGED)))
    target = (1 - smoothing) * np.eye(5)[TOKENS] + smoothing / 5
    values = -(target * log_prob).sum(axis=-1)
    assert first == pytest.approx(values[~beyond].mean(), abs=1e-5)


def test_dropout_of_both_sides_depends_on_the_keys():
    network, params = make(dataclasses.replace(GPT, dropout=0.3))
    batch = RAGGED | {"tokens": TOKENS}
    one, same, other = (
        float(
            loss_of(AutoregressiveModel(network), params, batch, sampling.sample_keys(seed, 0, 6))
        )
        for seed in (0, 0, 1)
    )
    assert one == same
    assert abs(one - other) > 1e-4


def test_it_needs_a_memory():
    with pytest.raises(ValueError, match="the decoder reads the encoder: set memory"):
        EncoderDecoder(dataclasses.replace(GPT, memory=False), 1)
    with pytest.raises(ValueError, match="encoder_layers must be at least 1"):
        EncoderDecoder(GPT, 0)
    with pytest.raises(ValueError, match="vocabulary must be at least 1"):
        EncoderDecoder(dataclasses.replace(GPT, vocabulary=0), 1)
    with pytest.raises(ValueError, match="only a decoder that is not causal copies"):
        EncoderDecoder(GPT, 1, copies=True)
    assert hash(EncoderDecoder(GPT, 1)) == hash(EncoderDecoder(GPT, 1))
    assert EncoderDecoder(GPT, 3).encoder.layers == 3
