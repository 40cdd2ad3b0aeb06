"""CTC against the enumeration of all alignments, and what it decodes."""

import dataclasses
import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from annotations import unchecked_annotations
from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.models.parallel.ctc import CTCModel, CTCSampler, collapse
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.encoder_decoder import EncoderDecoder
from random_networks import random_params

CONFIG = TransformerConfig(
    vocabulary=3,
    context=12,
    layers=1,
    width=16,
    heads=2,
    causal=False,
    extra_inputs=1,
    memory=True,
)
NETWORK = EncoderDecoder(CONFIG, 1)
MODEL = CTCModel(NETWORK, 2)
BLANK = 2
rng = np.random.default_rng(0)
SOURCE = rng.integers(0, 2, (8, 3)).astype(np.int32)
BATCH = {
    "source": SOURCE,
    "source_length": np.array([3, 1, 2, 3, 2, 3, 2, 3], np.int32),
    "tokens": rng.integers(0, 2, (8, 3)).astype(np.int32),
    "length": np.array([3, 1, 2, 1, 2, 3, 0, 2], np.int32),
}
KEYS = sampling.sample_keys(0, 0, 8)

loss_of = jax.jit(CTCModel.loss, static_argnums=0)


PARAMS = random_params(NETWORK)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, batch):
    """Logits of masks, those of a padded source counted out."""
    columns = batch["source"].shape[1] * model.factor
    valid = jnp.arange(columns)[None] < model.factor * batch["source_length"][:, None]
    denoiser = model.denoiser
    prepared = denoiser.prepare(params)
    blank = jnp.full(valid.shape, denoiser.mask)
    return denoiser(prepared, blank, valid, denoiser.encode(prepared, batch))


def said(alignment, blank=BLANK):
    """What an alignment says."""
    return tuple(int(token) for token, _ in itertools.groupby(alignment) if token != blank)


def law_of(log_prob):
    """Probabilities of all targets, by the sum over all alignments of log_prob [U, V]."""
    law = {}
    for alignment in itertools.product(range(log_prob.shape[1]), repeat=len(log_prob)):
        prob = np.exp(sum(log_prob[u, token] for u, token in enumerate(alignment)))
        law[said(alignment)] = law.get(said(alignment), 0.0) + prob
    return law


@pytest.mark.parametrize(("length", "factor"), [(2, 2), (1, 5)])
def test_the_loss_sums_over_all_alignments(length, factor):
    model = CTCModel(NETWORK, factor)
    one = {"source": SOURCE[:1, :length], "source_length": np.array([length], np.int32)}
    logits = logits_of(model, PARAMS, one)[0, : length * factor]
    log_prob = np.asarray(jax.nn.log_softmax(logits), np.float64)
    assert log_prob.std() > 0.3
    law = law_of(log_prob)
    targets = list(law)
    assert () in law
    tokens = np.zeros((len(law), 1, length * factor), np.int32)
    for row, target in zip(tokens, targets, strict=True):
        row[0, : len(target)] = target
    counts = np.array([[len(target)] for target in targets], np.int32)

    @jax.jit
    @jax.vmap
    def row_loss(tokens, length):
        batch = one | {"tokens": tokens, "length": length}
        return *model.loss(PARAMS, batch, KEYS[:1]), model.log_prob(PARAMS, batch)[0]

    values, metrics, log_probs = row_loss(tokens, counts)
    total = np.asarray(values, np.float64) * np.maximum(counts[:, 0], 1)
    np.testing.assert_allclose(total, -np.log(list(law.values())), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(total, -log_probs, rtol=1e-4, atol=1e-6)
    assert np.exp(-total).sum() == pytest.approx(1, abs=1e-4)
    assert (np.asarray(metrics["unaligned"]) == 0).all()


def row_of(i):
    return {name: leaf[i : i + 1] for name, leaf in BATCH.items()}


def test_a_batch_is_the_mean_over_tokens():
    value, metrics = loss_of(MODEL, PARAMS, BATCH, KEYS)
    assert metrics["unaligned"] == 0
    values = [loss_of(MODEL, PARAMS, row_of(i), KEYS[:1])[0] for i in range(8)]
    total = np.array(values) @ np.maximum(BATCH["length"], 1)
    np.testing.assert_allclose(value, total / BATCH["length"].sum(), rtol=1e-5)


def test_padding_changes_nothing():
    value, _ = loss_of(MODEL, PARAMS, BATCH, KEYS)
    padded = dict(BATCH)
    for name, length, width in (("source", "source_length", 5), ("tokens", "length", 7)):
        wide = np.ones((8, width), np.int32)
        inside = np.arange(3) < BATCH[length][:, None]
        wide[:, :3] = np.where(inside, BATCH[name], 1 - BATCH[name])
        padded[name] = wide
    same, _ = loss_of(MODEL, PARAMS, padded, KEYS)
    np.testing.assert_allclose(same, value, rtol=1e-5)
    other, _ = loss_of(MODEL, PARAMS, BATCH | {"tokens": 1 - BATCH["tokens"]}, KEYS)
    assert abs(other - value) > 1e-3


@jax.jit
def slopes(params, batch, keys):
    return jax.value_and_grad(MODEL.loss, has_aux=True)(params, batch, keys)


def test_targets_without_an_alignment_do_not_count():
    # Four columns hold 0 1 0 1 and 0 0 1, but not 0 0 1 1 or five tokens.
    tokens = [[0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 1, 0]]
    batch = {
        "source": SOURCE[:4, :2],
        "source_length": np.full(4, 2, np.int32),
        "tokens": np.array(tokens, np.int32),
        "length": np.array([4, 3, 4, 5], np.int32),
    }
    (value, metrics), gradient = slopes(PARAMS, batch, KEYS[:4])
    assert metrics["unaligned"] == 0.5
    log_probs = np.asarray(jax.jit(MODEL.log_prob)(PARAMS, batch))
    assert (log_probs[2:] == -np.inf).all()
    np.testing.assert_allclose(value, -log_probs[:2].sum() / 7, rtol=1e-5)
    tokens[2:] = [[1, 1, 0, 0, 1], [1, 1, 1, 1, 0]]
    _, same = slopes(PARAMS, batch | {"tokens": np.array(tokens, np.int32)}, KEYS[:4])
    for one, two in zip(*map(jax.tree.leaves, (gradient, same)), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, two)


def test_collapse_by_hand():
    tokens = np.array([[0, 0, 2, 0, 1], [2, 2, 2, 2, 2], [1, 0, 1, 1, 0], [0, 1, 1, 1, 0]])
    valid = np.arange(5) < np.array([5, 5, 5, 2])[:, None]
    wanted = [[0, 0, 1, 9, 9], [9, 9, 9, 9, 9], [1, 0, 1, 0, 9], [0, 1, 9, 9, 9]]
    np.testing.assert_array_equal(collapse(jnp.asarray(tokens), valid, BLANK, 9), wanted)


ALIGNMENT = st.lists(st.integers(0, 3), min_size=6, max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(ALIGNMENT, st.integers(0, 6)), min_size=3, max_size=3))
def test_collapse_is_group_by(rows):
    tokens = np.array([row for row, _ in rows], np.int32)
    valid = np.arange(6) < np.array([length for _, length in rows])[:, None]
    got = jax.jit(collapse, static_argnums=(2, 3))(tokens, valid, 3, 7)
    for (row, length), out in zip(rows, np.asarray(got), strict=True):
        target = said(row[:length], 3)
        assert tuple(out) == target + (7,) * (6 - len(target))


def test_its_gradient_is_averaged_over_devices():
    batch = BATCH | {"length": np.full(8, 1, np.int32)}
    mesh, split = Mesh(np.array(jax.devices()[:4]), ("data",)), P("data")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), split, split), out_specs=P())
    def mapped(params, batch, keys):
        params = jax.lax.pcast(params, "data", to="varying")
        (value, _), gradient = jax.value_and_grad(MODEL.loss, has_aux=True)(params, batch, keys)
        return jax.lax.pmean((value, gradient), "data")

    value, gradient = mapped(PARAMS, batch, KEYS)
    (whole, _), wanted = slopes(PARAMS, batch, KEYS)
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    for one, two in zip(*map(jax.tree.leaves, (gradient, wanted)), strict=True):
        assert np.abs(two).max() > 0
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)


def test_samples_are_what_the_likeliest_alignment_says():
    model = CTCModel(NETWORK, 3)
    sampler = CTCSampler(model, eos=9)
    cond = {name: BATCH[name] for name in ("source", "source_length")}
    assert sampler.steps == sampler.nfe == 1
    assert sampler.conditions == ("source", "source_length")
    samples = np.asarray(sampling.generate(sampler, PARAMS, KEYS, Condition(**cond)))
    best = np.asarray(logits_of(model, PARAMS, cond).argmax(-1))
    for row, alignment, length in zip(samples, best, cond["source_length"], strict=True):
        target = said(alignment[: 3 * length])
        assert tuple(row) == target + (9,) * (9 - len(target))
    assert len(np.unique(samples, axis=0)) > 2
    padding = np.arange(3) >= cond["source_length"][:, None]
    other = Condition(**cond | {"source": np.where(padding, 1 - SOURCE, SOURCE)})
    np.testing.assert_array_equal(sampling.generate(sampler, PARAMS, KEYS, other), samples)


COPY = CTCModel(
    EncoderDecoder(dataclasses.replace(CONFIG, vocabulary=5, context=8, width=32), 1, copies=True),
    2,
)


def copies(key, number):
    """Sources of 2 to 4 tokens, repetitions among them; the target is the source."""
    keys = jax.random.split(key)
    source = jax.random.randint(keys[0], (number, 4), 0, 4)
    length = jax.random.randint(keys[1], (number,), 2, 5)
    return {"source": source, "source_length": length, "tokens": source, "length": length}


@jax.jit
def train_to_copy():
    steps, optimizer = 300, optax.adam(optax.cosine_decay_schedule(6e-3, 300))
    gradient = jax.value_and_grad(lambda p, b, k: COPY.loss(p, b, k)[0])

    def step(carry, key):
        params, state = carry
        value, slope = gradient(params, copies(key, 32), jax.random.split(key, 32))
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(params, updates), state), value

    params = random_params(COPY.network)
    keys = jax.random.split(jax.random.key(1), steps)
    (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params, values


def test_it_learns_to_copy():
    params, values = train_to_copy()
    test = copies(jax.random.key(2), 200)
    cond = {name: test[name] for name in ("source", "source_length")}
    keys = sampling.sample_keys(0, 0, 200)
    samples = sampling.generate(CTCSampler(COPY, eos=7), params, keys, Condition(**cond))
    inside = np.arange(4) < np.asarray(test["length"])[:, None]
    wanted = np.full((200, 8), 7)
    wanted[:, :4] = np.where(inside, test["tokens"], 7)
    assert (np.asarray(samples) == wanted).all(-1).mean() > 0.9
    assert values[-1] < values[0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CTCModel(NETWORK, 0), "factor must be at least 1, got 0"),
        (lambda: CTCModel(NETWORK, 1.5), "factor must be a whole number, got 1.5"),
        (lambda: CTCModel(NETWORK.decoder, 2), "network must be of type EncoderDecoder"),
        (lambda: CTCSampler(MODEL, -1), "eos must not be negative, got -1"),
        (
            lambda: sampling.generate(CTCSampler(MODEL, 0), PARAMS, KEYS),
            "give the condition 'source'",
        ),
        (
            lambda: sampling.generate(
                CTCSampler(MODEL, 0), PARAMS, KEYS, Condition(source=SOURCE + 2)
            ),
            "tokens of the source must be in 0 to 2, got 2 to 3",
        ),
        (
            lambda: sampling.generate(CTCSampler(MODEL, 0), {}, KEYS, Condition(source=SOURCE)),
            "parameters do not fit the CTCModel",
        ),
    ],
)
@unchecked_annotations()
def test_what_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
