"""Masked models: the bound, its exact value, what is hidden, and what the loss does not see."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from annotations import unchecked_annotations
from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.data.exact_sets import NoisyMixture, even_parity
from gen_jax.metrics.gaps import any_order_bound
from gen_jax.models import sequences
from gen_jax.models.masked import losses as masked
from gen_jax.models.masked.config import MaskConfig
from gen_jax.models.masked.losses import (
    ExactDenoiser,
    MaskedModel,
    bound_terms,
    estimate_bound,
    infill,
    log_prob_in_order,
)
from gen_jax.models.masked.orders import halton_order
from gen_jax.models.sequences import cross_entropy
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import TokenNetwork
from random_networks import random_params

MIXTURE = NoisyMixture(3, 4, 3, 0.2, (0.5, 0.3, 0.2)).data
OTHER = NoisyMixture(3, 4, 3, 0.5).data
PARITY = even_parity(5)
SMALL = TransformerConfig(
    vocabulary=3, context=6, layers=1, width=16, heads=2, causal=False, extra_inputs=2
)
MODEL = MaskedModel(TokenNetwork(SMALL))
COSINE = MaskedModel(MODEL.network, "cosine")
NUMBER = 8_000
FULL = {"length": np.full(32, 4, np.int32)}
BATCH, KEYS = {"tokens": MIXTURE.sample(0, 32)} | FULL, sampling.sample_keys(0, 0, 32)

terms_of = jax.jit(bound_terms, static_argnums=0)
loss_of = jax.jit(MaskedModel.loss, static_argnums=0)


PARAMS = jax.tree.map(jnp.asarray, random_params(MODEL.network))


def exact(dist):
    return {"support": dist.support, "prob": dist.prob}


def within(values, wanted, errors=4):
    values = np.asarray(values, np.float64)
    error = values.std(axis=0) / len(values) ** 0.5
    assert (np.abs(values.mean(axis=0) - wanted) <= errors * error + 1e-5).all()


@functools.cache
def exact_terms(dist):
    batch, keys = {"tokens": dist.sample(0, NUMBER)}, sampling.sample_keys(0, 0, NUMBER)
    return np.asarray(terms_of(ExactDenoiser(dist.vocabulary), exact(dist), batch, keys))


@pytest.mark.parametrize("dist", [MIXTURE, PARITY])
def test_the_exact_bound_is_the_entropy(dist):
    terms = exact_terms(dist)
    assert terms.shape == (NUMBER, dist.length)
    within(terms.sum(axis=1), dist.entropy)


@pytest.mark.parametrize("dist", [MIXTURE, PARITY])
def test_exact_terms_are_the_steps_of_the_entropy_profile(dist):
    terms = exact_terms(dist)
    within(terms[:, ::-1], np.diff(dist.entropy_profile))
    profile = masked.entropy_profile(terms)
    assert len(profile) == dist.length + 1
    assert profile[0] == 0
    assert profile[-1] == pytest.approx(terms.sum(axis=1, dtype=np.float64).mean())
    np.testing.assert_allclose(profile, dist.entropy_profile, atol=0.05)


def test_a_wrong_denoiser_has_a_larger_bound():
    batch, keys = {"tokens": MIXTURE.sample(0, NUMBER)}, sampling.sample_keys(0, 0, NUMBER)
    terms = np.asarray(terms_of(ExactDenoiser(3), exact(OTHER), batch, keys))
    wanted = any_order_bound(MIXTURE, functools.partial(OTHER.conditionals, mask_id=3))
    assert wanted > MIXTURE.entropy + 0.2
    within(terms.sum(axis=1), wanted)


@functools.cache
def network_bound():
    """The bound of the random network over all masks, in nats."""

    @jax.jit
    def softmax(tokens):
        prepared = MODEL.prepare(PARAMS)
        return jax.nn.softmax(MODEL(prepared, tokens, jnp.ones(tokens.shape, bool), {}))

    def denoise(contexts):
        tokens = np.zeros((128, 4), np.int32)
        tokens[: len(contexts)] = contexts
        return np.asarray(softmax(tokens), np.float64)[: len(contexts)]

    return any_order_bound(MIXTURE, denoise)


def test_the_bound_of_a_network():
    batch, keys = {"tokens": MIXTURE.sample(0, NUMBER)}, sampling.sample_keys(0, 0, NUMBER)
    terms = np.asarray(jax.jit(MODEL.bound_terms)(PARAMS, batch, keys))
    assert network_bound() > MIXTURE.entropy + 0.1
    within(terms.sum(axis=1), network_bound())


def test_the_loss_is_the_bound_per_position():
    keys, tokens = sampling.sample_keys(0, 0, NUMBER), MIXTURE.sample(0, NUMBER)

    @jax.jit
    @jax.vmap
    def each(row, key):
        return MODEL.loss(PARAMS, {"tokens": row[None]}, key[None])[0]

    values = each(tokens, keys)
    within(values, network_bound() / 4)
    whole, metrics = loss_of(MODEL, PARAMS, {"tokens": tokens[:32]} | FULL, KEYS)
    np.testing.assert_allclose(whole, np.mean(values[:32]), rtol=1e-4)
    assert metrics == {}


@pytest.mark.parametrize("draws", [1, 2, 3, 4, 7])
def test_few_terms_estimate_the_bound(draws):
    batch, keys = {"tokens": MIXTURE.sample(0, NUMBER)}, sampling.sample_keys(0, 0, NUMBER)
    estimate = jax.jit(estimate_bound, static_argnums=(0, 4))
    within(estimate(MODEL, PARAMS, batch, keys, draws), network_bound())


def test_as_many_draws_as_positions_are_all_numbers_once():
    """Of two tokens that are always equal, one hidden token costs nothing, and two cost ln 2 each:
    the estimate is then 0.5 (0 + ln 2) of two tokens, whatever the keys are."""
    support = np.array([[0, 0], [1, 1]], np.int32)
    pair, batch = {"support": support, "prob": np.array([0.5, 0.5])}, {"tokens": support}
    for seed in range(5):
        keys = sampling.sample_keys(seed, 0, 2)
        values = estimate_bound(ExactDenoiser(2), pair, batch, keys, 2)
        np.testing.assert_allclose(values, np.log(2), rtol=1e-6)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        estimate_bound(ExactDenoiser(2), pair, batch, keys, 0)


def test_the_estimate_counts_the_length():
    """Positions beyond the length do not matter."""
    tokens, length = MIXTURE.sample(0, 64), np.full(64, 2, np.int32)
    changed = np.where(np.arange(4) < 2, tokens, 2 - tokens)
    keys = sampling.sample_keys(0, 0, 64)
    ours, theirs = (
        estimate_bound(MODEL, PARAMS, {"tokens": some, "length": length}, keys, 2)
        for some in (tokens, changed)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_terms_end_at_the_length():
    tokens, keys = MIXTURE.sample(0, 4), sampling.sample_keys(0, 0, 4)
    length = np.array([1, 2, 3, 4], np.int32)
    terms = terms_of(MODEL, PARAMS, {"tokens": tokens, "length": length}, keys)
    np.testing.assert_array_equal(np.asarray(terms) > 0, np.arange(4) < length[:, None])
    changed = np.where(np.arange(4) < length[:, None], tokens, 2 - tokens)
    same = terms_of(MODEL, PARAMS, {"tokens": changed, "length": length}, keys)
    np.testing.assert_allclose(terms, same, atol=1e-6)


def test_the_law_of_an_order_sums_to_one_and_ends_at_the_length():
    every = np.indices((3,) * 4).reshape(4, -1).T.astype(np.int32)
    order, inside = np.array([2, 0, 3, 1]), np.arange(4) < 3
    law = jax.jit(log_prob_in_order, static_argnums=(0, 4))
    lengths = [{"length": np.full(81, length)} for length in (4, 3)]
    whole, short = (law(MODEL, PARAMS, every, order, (1, 3), one) for one in lengths)
    assert np.exp(whole).sum() == pytest.approx(1, abs=1e-4)
    assert np.std(whole) > 0.3
    assert np.exp(short)[every[:, 3] == 0].sum() == pytest.approx(1, abs=1e-4)
    other = law(MODEL, PARAMS, np.where(inside, every, 0), order, (1, 3), lengths[1])
    np.testing.assert_allclose(short, other, atol=1e-5)


def pearson(values, probability):
    observed = np.bincount(values, minlength=len(probability))
    assert len(observed) == len(probability)
    kept = probability > 0
    assert not observed[~kept].any()
    return stats.chisquare(observed[kept], probability[kept] * len(values)).pvalue


@pytest.mark.parametrize("length", [2, 7])
@pytest.mark.parametrize("counts", ["uniform", "cosine"])
def test_how_many_tokens_are_hidden(counts, length):
    uniform = jax.random.uniform(jax.random.key(length), (20_000,))
    count = masked._count(counts, uniform, jnp.full(20_000, length))
    number = np.arange(1, length + 1)
    if counts == "uniform":
        probability = np.full(length, 1 / length)
    else:
        probability = 2 / np.pi * (np.arccos((number - 1) / length) - np.arccos(number / length))
    assert pearson(np.asarray(count), np.append(0, probability)) > 1e-4
    ends = masked._count(counts, jnp.array([0.0, 1 - 2.0**-24]), jnp.full(2, length))
    assert sorted(np.asarray(ends).tolist()) == [1, length]


def test_hidden_positions_are_random_and_valid():
    keys = sampling.sample_keys(0, 0, 12_000)
    length = jnp.tile(jnp.array([3, 4, 6]), 4_000)
    count = jnp.tile(jnp.array([2, 4, 2]), 4_000)
    tokens = jnp.broadcast_to(jnp.arange(6) % 3, (12_000, 6))
    valid = sequences.valid_mask(tokens, length)
    seen, hidden = (
        np.asarray(x) for x in jax.jit(masked.hide, static_argnums=4)(keys, tokens, valid, count, 3)
    )
    np.testing.assert_array_equal(hidden.sum(-1), count)
    assert not (hidden & ~np.asarray(valid)).any()
    np.testing.assert_array_equal(seen, np.where(hidden, 3, tokens))
    for row, pairs in ((0, 3), (2, 15)):
        sets = np.unique(hidden[row::3] @ (1 << np.arange(6)), return_counts=True)[1]
        assert len(sets) == pairs
        assert stats.chisquare(sets).pvalue > 1e-4
    alone, _ = masked.hide(keys[:2], tokens[:2], valid[:2], count[:2], 3)
    np.testing.assert_array_equal(alone, seen[:2])


@pytest.mark.parametrize("grid", [(1,), (8,), (7,), (4, 4), (3, 5), (1, 6), (4, 6, 3)])
def test_halton_orders_are_those_of_the_sequence(grid):
    order = halton_order(grid)
    assert sorted(order) == list(range(math.prod(grid)))
    points = stats.qmc.Halton(len(grid), scramble=False).random(1 + 20 * len(order))[1:]
    cells = np.floor(points * grid + 1e-9).astype(int)
    reached = np.ravel_multi_index(cells.T, grid)
    assert list(order) == list(dict.fromkeys(reached.tolist()))[: len(order)]
    if grid == (8,):
        assert order == (4, 2, 6, 1, 5, 3, 7, 0)


def test_groups_of_a_halton_order_are_far_from_each_other():
    """Four positions at a time of 8 x 8: the nearest two are further apart than random ones."""

    def nearest(order):
        place = np.stack(np.unravel_index(np.array(order).reshape(-1, 4), (8, 8)), axis=-1)
        distance = np.abs(place[:, :, None] - place[:, None]).sum(-1)
        return distance[:, ~np.eye(4, dtype=bool)].reshape(len(place), -1).min(1).mean()

    random = [np.random.default_rng(seed).permutation(64) for seed in range(50)]
    assert nearest(halton_order((8, 8))) > max(map(nearest, random))


def test_a_share_of_the_sequences_hides_the_last_of_the_order():
    model = dataclasses.replace(MODEL, grid=(2, 3), halton=0.75)
    keys = sampling.sample_keys(0, 0, NUMBER)
    tokens, count = np.zeros((NUMBER, 6), np.int32), np.arange(NUMBER) % 5 + 1
    valid = np.ones_like(tokens, bool)
    _, hidden = masked._hide(model._order(keys, 6), tokens, valid, count, 3)
    assert (np.asarray(hidden).sum(1) == count).all()
    rank = np.argsort(halton_order((2, 3)))
    is_last = (np.asarray(hidden) == (rank >= 6 - count[:, None])).all(1)
    # The sets of each size are equally likely where the order is random.
    chance = np.mean([1 / math.comb(6, n) for n in range(1, 6)])
    within(is_last, 0.75 + 0.25 * chance)
    others = MaskedModel(MODEL.network)
    _, random = masked._hide(others._order(keys, 6), tokens, valid, count, 3)
    free = ~is_last
    within(np.asarray(hidden)[free & (count == 1)].mean(0), 1 / 6)
    assert (np.asarray(random)[free] == np.asarray(hidden)[free]).all()


def test_what_is_beyond_the_length_does_not_count():
    tokens, length = BATCH["tokens"], np.arange(32, dtype=np.int32) % 4 + 1
    valid = np.arange(4) < length[:, None]
    first, second, third = (
        loss_of(MODEL, PARAMS, {"tokens": some, "length": length}, KEYS)[0]
        for some in (
            tokens,
            np.where(valid, tokens, 2 - tokens),
            np.pad(tokens, ((0, 0), (0, 2))),
        )
    )
    assert first == second
    assert abs(first - third) < 1e-5
    all_of_it, _ = loss_of(MODEL, PARAMS, BATCH, KEYS)
    assert abs(first - all_of_it) > 1e-3


def test_gradients_reach_every_parameter():
    batch = BATCH | {"label": np.zeros(32, np.int32)}
    gradient = jax.jit(jax.grad(lambda params: COSINE.loss(params, batch, KEYS)[0]))(PARAMS)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 1e-7, path
    assert (np.abs(gradient["token"]).max(axis=1) > 0).all()  # the mask and the label are read
    assert (np.asarray(gradient["position"])[5:] == 0).all()


def test_label_smoothing_spreads_a_share_over_all_tokens():
    logits = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    targets = MIXTURE.sample(0, 5)
    values = np.asarray(cross_entropy(jnp.asarray(logits), targets, 0.3))
    log_prob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = (np.eye(3)[targets] * 0.7 + 0.3 / 3) * -log_prob
    np.testing.assert_allclose(values, wanted.sum(-1), rtol=1e-5)
    smooth, _ = loss_of(dataclasses.replace(MODEL, smoothing=0.2), PARAMS, BATCH, KEYS)
    plain, _ = loss_of(MODEL, PARAMS, BATCH, KEYS)
    assert abs(smooth - plain) > 1e-3


def test_dropout_depends_on_the_keys():
    network = TokenNetwork(dataclasses.replace(SMALL, dropout=0.5))
    model, plain = MaskedModel(network), loss_of(MODEL, PARAMS, BATCH, KEYS)[0]
    dropped = loss_of(model, PARAMS, BATCH, KEYS)[0]
    assert dropped == loss_of(model, PARAMS, BATCH, KEYS)[0]
    assert abs(dropped - plain) > 1e-3


def test_a_loss_with_a_source_and_with_a_context_that_is_known():
    model = MaskedModel(EncoderDecoder(dataclasses.replace(SMALL, memory=True), 1))
    params, keys = random_params(model.network), sampling.sample_keys(0, 0, 8)
    source = OTHER.sample(0, 8)
    batch = {"tokens": MIXTURE.sample(0, 8), "source": source, "label": np.zeros(8, np.int32)}
    value, _ = loss_of(model, params, batch, keys)
    context = jax.jit(model.condition)(params, batch)
    assert set(context) == {"label", "memory", "memory_mask"}
    known, _ = loss_of(model, params, {"tokens": batch["tokens"]}, keys, context)
    assert abs(value - known) < 1e-5
    other, _ = loss_of(model, params, batch | {"source": 2 - source}, keys)
    assert abs(value - other) > 1e-3


@pytest.mark.parametrize("dist", [MIXTURE, PARITY])
def test_the_exact_denoiser_has_the_exact_conditionals(dist):
    size, generator = dist.vocabulary, np.random.default_rng(0)
    tokens = generator.integers(0, size + 1, (200, dist.length)).astype(np.int32)
    hidden = tokens == size
    denoiser = ExactDenoiser(size)
    prepared = denoiser.prepare(exact(dist))
    assert denoiser.mask == size
    assert denoiser.encode(prepared, {"label": None}) == {}
    logits = denoiser(prepared, tokens, jnp.ones(tokens.shape, bool), {})
    wanted = dist.conditionals(tokens, size)
    assert (dist.vocabulary == 3) or (np.abs(wanted[hidden] - 0.5) < 1e-9).any()
    np.testing.assert_allclose(jax.nn.softmax(logits)[hidden], wanted[hidden], atol=1e-5)


def test_holes_and_lengths():
    assert MODEL.vocabulary == MODEL.mask == 3
    cond = infill(MODEL, 4, [[None, 2], [], [0, 1, None]], [2, 4, 3])
    np.testing.assert_array_equal(cond.given, [[0, 2, 0, 0], [0] * 4, [0, 1, 0, 0]])
    np.testing.assert_array_equal(cond.is_given.astype(int), [[0, 1, 0, 0], [0] * 4, [1, 1, 0, 0]])
    np.testing.assert_array_equal(cond.length, [2, 4, 3])
    assert cond.given.dtype == cond.length.dtype == np.int32
    assert set(infill(MODEL, 4, [[1]], [4]).fields()) == {"given", "is_given"}
    assert not infill(MODEL, 2, number=3).is_given.any()
    np.testing.assert_array_equal(infill(MODEL, 2, lengths=[1]).length, [1])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lengths": [4, 0]}, r"^a length of 0 is not possible: it must be in 1 to 4$"),
        ({"lengths": [5]}, r"^a length of 5 is not possible: it must be in 1 to 4$"),
        (
            {"templates": [[None, 1, 2]], "lengths": [2]},
            r"^position 2 is given, but the length is 2: give fewer tokens or a larger length$",
        ),
        ({"templates": [[0] * 5]}, r"^position 4 is given, but the length is 4"),
        ({"templates": [[0, 3]]}, r"^the token 3 is given; the model knows 0 to 2$"),
        ({"templates": [[-1]]}, r"^the token -1 is given; the model knows 0 to 2$"),
        ({"templates": [[0], []], "lengths": [4]}, r"^templates, lengths and number must be of"),
        ({"templates": [[0], []], "number": 1}, r"^templates, lengths and number must be of"),
        ({}, r"^templates, lengths and number must be of as many samples"),
    ],
)
@unchecked_annotations()
def test_infilling_that_is_refused(options, text):
    with pytest.raises(ValueError, match=text) as caught:
        infill(MODEL, 4, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"causal": True}, {"extra_inputs": 0}])
@pytest.mark.parametrize("pair", [False, True])
@unchecked_annotations()
def test_a_masked_model_sees_all_and_reads_a_mask(change, pair):
    config = dataclasses.replace(SMALL, memory=pair, **change)
    network = EncoderDecoder(config, 1) if pair else TokenNetwork(config)
    with pytest.raises(ValueError, match="set causal to false and extra_inputs to at least 1"):
        MaskedModel(network)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MaskedModel(MODEL.network, "most"), "counts must be one of 'uniform', 'cosine'"),
        (lambda: MaskedModel(MODEL.network, smoothing=1.0), r"smoothing must be in \[0, 1\)"),
        (lambda: MaskedModel(MODEL.network, halton=1.0), r"halton must be in \[0, 1\), got 1\.0"),
        (lambda: MaskedModel(MODEL.network, "all", halton=0.5), "set halton to 0"),
        (lambda: MaskConfig(halton=-0.1), r"mask\.halton must be in \[0, 1\), got -0\.1"),
        (lambda: MaskConfig("all", 0.5), "with all tokens hidden there is no order"),
        (lambda: halton_order(()), "one to three axes of at least one position"),
        (lambda: halton_order((4, 0)), "one to three axes of at least one position"),
        (lambda: MaskedModel(SMALL), "network must be of type TokenNetwork or of type Encoder"),
        (lambda: ExactDenoiser(0), "vocabulary must be at least 1, got 0"),
    ],
)
@unchecked_annotations()
def test_models_that_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"prob": np.ones(1)}, "parameters of an ExactDenoiser are"),
        ({"support": np.zeros((2, 5), int), "prob": np.full(2, 0.5)}, r"must be \[N, 4\] and"),
        ({"support": np.zeros((2, 4), int), "prob": np.ones(1)}, r"got \[2, 4\] and \[1\]"),
        ({"support": np.full((1, 4), 3), "prob": np.ones(1)}, "must be in 0 to 2"),
        ({"support": np.zeros((2, 4), int), "prob": np.ones(2)}, "sum to 1"),
        ({"support": np.zeros((2, 4), int), "prob": np.array([2, -1])}, "not be negative"),
    ],
)
@unchecked_annotations()
def test_distributions_that_are_refused(params, text):
    denoiser = ExactDenoiser(3)
    denoiser.check(exact(MIXTURE), Condition(), 4)
    with pytest.raises(ValueError, match=text):
        denoiser.check(params, Condition(), 4)
