"""CTC against the enumeration of all alignments, and what it decodes."""

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

from gen_jax import parallel, sampling, training
from gen_jax.config import TrainConfig
from gen_jax.models.masked.losses import NetworkDenoiser
from gen_jax.models.parallel.ctc import CTCSampler, collapse, ctc_loss
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.encoder_decoder import EncoderDecoder
from random_networks import random_params

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = TransformerConfig(
    vocabulary=3, context=12, layers=1, width=16, heads=2,
    causal=False, extra_inputs=1, memory=True,
)  # fmt: skip
NETWORK = EncoderDecoder(CONFIG, 1)
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

loss_of = jax.jit(ctc_loss, static_argnums=0, static_argnames="factor")


PARAMS = random_params(NETWORK)


@functools.partial(jax.jit, static_argnums=(0, 3))
def logits_of(network, params, batch, factor):
    """Logits of masks, those of a padded source counted out."""
    columns = batch["source"].shape[1] * factor
    exists = jnp.arange(columns) < factor * batch["source_length"][:, None]
    denoiser = NetworkDenoiser(network)
    prepared = denoiser.prepare(params)
    blank = jnp.full(exists.shape, denoiser.mask)
    return denoiser(prepared, blank, exists, denoiser.encode(prepared, batch))


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
    one = {"source": SOURCE[:1, :length], "source_length": np.array([length], np.int32)}
    logits = logits_of(NETWORK, PARAMS, one, factor)[0, : length * factor]
    log_prob = np.asarray(jax.nn.log_softmax(logits), np.float64)
    assert log_prob.std() > 0.3
    law = law_of(log_prob)
    targets = list(law)
    assert () in law
    tokens = np.zeros((len(law), 1, length * factor), np.int32)
    for row, target in zip(tokens, targets, strict=True):
        row[0, : len(target)] = target
    counts = np.array([[len(target)] for target in targets], np.int32)

    def row_loss(tokens, length):
        batch = one | {"tokens": tokens, "length": length}
        return ctc_loss(NETWORK, PARAMS, batch, KEYS[:1], factor=factor)

    values, metrics = jax.jit(jax.vmap(row_loss))(tokens, counts)
    total = np.asarray(values, np.float64) * np.maximum(counts[:, 0], 1)
    np.testing.assert_allclose(total, -np.log(list(law.values())), rtol=1e-4, atol=1e-4)
    assert np.exp(-total).sum() == pytest.approx(1, abs=1e-4)
    assert (np.asarray(metrics["unaligned"]) == 0).all()


def row_of(i):
    return {name: leaf[i : i + 1] for name, leaf in BATCH.items()}


def test_a_batch_is_the_mean_over_tokens():
    value, metrics = loss_of(NETWORK, PARAMS, BATCH, KEYS, factor=2)
    assert metrics["unaligned"] == 0
    values = [loss_of(NETWORK, PARAMS, row_of(i), KEYS[:1], factor=2)[0] for i in range(8)]
    total = np.array(values) @ np.maximum(BATCH["length"], 1)
    np.testing.assert_allclose(value, total / BATCH["length"].sum(), rtol=1e-5)


def test_padding_changes_nothing():
    value, _ = loss_of(NETWORK, PARAMS, BATCH, KEYS, factor=2)
    padded = dict(BATCH)
    for name, length, width in (("source", "source_length", 5), ("tokens", "length", 7)):
        wide = np.ones((8, width), np.int32)
        inside = np.arange(3) < BATCH[length][:, None]
        wide[:, :3] = np.where(inside, BATCH[name], 1 - BATCH[name])
        padded[name] = wide
    same, _ = loss_of(NETWORK, PARAMS, padded, KEYS, factor=2)
    np.testing.assert_allclose(same, value, rtol=1e-5)
    other, _ = loss_of(NETWORK, PARAMS, BATCH | {"tokens": 1 - BATCH["tokens"]}, KEYS, factor=2)
    assert abs(other - value) > 1e-3


def test_targets_without_an_alignment_do_not_count():
    # Four columns hold 0 1 0 1 and 0 0 1, but not 0 0 1 1 or five tokens.
    tokens = [[0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 1, 0]]
    batch = {
        "source": SOURCE[:4, :2],
        "source_length": np.full(4, 2, np.int32),
        "tokens": np.array(tokens, np.int32),
        "length": np.array([4, 3, 4, 5], np.int32),
    }
    fitting = {name: leaf[:2] for name, leaf in batch.items()}
    wanted, metrics = loss_of(NETWORK, PARAMS, fitting, KEYS[:2], factor=2)
    assert metrics["unaligned"] == 0
    slopes = jax.value_and_grad(functools.partial(ctc_loss, NETWORK, factor=2), has_aux=True)
    slopes = jax.jit(slopes)
    (value, metrics), gradient = slopes(PARAMS, batch, KEYS[:4])
    assert metrics["unaligned"] == 0.5
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    tokens[2:] = [[1, 1, 0, 0, 1], [1, 1, 1, 1, 0]]
    _, same = slopes(PARAMS, batch | {"tokens": np.array(tokens, np.int32)}, KEYS[:4])
    for one, two in zip(*map(jax.tree.leaves, (gradient, same)), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, two)


def test_collapse_by_hand():
    tokens = np.array([[0, 0, 2, 0, 1], [2, 2, 2, 2, 2], [1, 0, 1, 1, 0], [0, 1, 1, 1, 0]])
    exists = np.arange(5) < np.array([5, 5, 5, 2])[:, None]
    wanted = [[0, 0, 1, 9, 9], [9, 9, 9, 9, 9], [1, 0, 1, 0, 9], [0, 1, 9, 9, 9]]
    np.testing.assert_array_equal(collapse(jnp.asarray(tokens), exists, BLANK, 9), wanted)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=6, max_size=6), st.integers(0, 6)),
                min_size=3, max_size=3))  # fmt: skip
def test_collapse_is_group_by(rows):
    tokens = np.array([row for row, _ in rows], np.int32)
    exists = np.arange(6) < np.array([length for _, length in rows])[:, None]
    got = jax.jit(collapse, static_argnums=(2, 3))(tokens, exists, 3, 7)
    for (row, length), out in zip(rows, np.asarray(got), strict=True):
        target = said(row[:length], 3)
        assert tuple(out) == target + (7,) * (6 - len(target))


def test_it_trains_over_devices():
    batch = BATCH | {"length": np.full(8, 1, np.int32)}
    mesh = Mesh(np.array(jax.devices()[:4]), (parallel.AXIS,))
    config = TrainConfig(batch=8, steps=2, ema=0, warmup=0)
    optimizer = training.make_optimizer(config)
    loss = functools.partial(ctc_loss, NETWORK, factor=2)
    step = training.make_step(loss, optimizer, config, mesh)
    state = training.init_state(jax.tree.map(jnp.asarray, PARAMS), optimizer).replace(ema=None)
    state = parallel.replicate(mesh, state)
    arrays, flags = parallel.split(mesh, batch), parallel.split(mesh, np.zeros(4, np.int32))
    state, first = step(state, arrays, flags)
    state, second = step(state, arrays, flags)
    whole, _ = loss_of(NETWORK, PARAMS, batch, KEYS, factor=2)
    np.testing.assert_allclose(first["loss"], whole, rtol=1e-5)
    assert second["loss"] != first["loss"]
    assert first["skipped"] == second["skipped"] == 0
    assert first["gradient_norm"] > 0


def test_samples_are_what_the_likeliest_alignment_says():
    sampler = CTCSampler(NETWORK, 3, end=9)
    cond = {name: BATCH[name] for name in ("source", "source_length")}
    assert sampler.steps == sampler.nfe == 1
    samples = np.asarray(sampling.generate(sampler, PARAMS, KEYS, cond))
    best = np.asarray(logits_of(NETWORK, PARAMS, cond, 3).argmax(-1))
    for row, alignment, length in zip(samples, best, cond["source_length"], strict=True):
        target = said(alignment[: 3 * length])
        assert tuple(row) == target + (9,) * (9 - len(target))
    assert len(np.unique(samples, axis=0)) > 2
    padding = np.arange(3) >= cond["source_length"][:, None]
    other = cond | {"source": np.where(padding, 1 - SOURCE, SOURCE)}
    np.testing.assert_array_equal(sampling.generate(sampler, PARAMS, KEYS, other), samples)


COPY = EncoderDecoder(
    TransformerConfig(
        vocabulary=5, context=8, layers=1, width=32, heads=2,
        causal=False, extra_inputs=1, memory=True,
    ),
    1,
    copies=True,
)  # fmt: skip


def copies(key, number):
    """Sources of 2 to 4 tokens, repetitions among them; the target is the source."""
    keys = jax.random.split(key)
    source = jax.random.randint(keys[0], (number, 4), 0, 4)
    length = jax.random.randint(keys[1], (number,), 2, 5)
    return {"source": source, "source_length": length, "tokens": source, "length": length}


@jax.jit
def train_to_copy():
    steps, optimizer = 300, optax.adam(optax.cosine_decay_schedule(6e-3, 300))
    gradient = jax.value_and_grad(lambda p, b, k: ctc_loss(COPY, p, b, k, factor=2)[0])

    def step(carry, key):
        params, state = carry
        value, slope = gradient(params, copies(key, 32), jax.random.split(key, 32))
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(params, updates), state), value

    params = random_params(COPY)
    keys = jax.random.split(jax.random.key(1), steps)
    (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params, values


def test_it_learns_to_copy():
    params, values = train_to_copy()
    test = copies(jax.random.key(2), 200)
    cond = {name: test[name] for name in ("source", "source_length")}
    keys = sampling.sample_keys(0, 0, 200)
    samples = sampling.generate(CTCSampler(COPY, 2, end=7), params, keys, cond)
    inside = np.arange(4) < np.asarray(test["length"])[:, None]
    wanted = np.full((200, 8), 7)
    wanted[:, :4] = np.where(inside, test["tokens"], 7)
    assert (np.asarray(samples) == wanted).all(-1).mean() > 0.9
    assert values[-1] < values[0]
