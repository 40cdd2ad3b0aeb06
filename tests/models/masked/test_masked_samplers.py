"""Parallel decoding in rounds: laws with an exact denoiser, and what every round leaves alone."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from scipy import stats

from annotations import unchecked_annotations
from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.config import choices, resolve
from gen_jax.data.exact_sets import NoisyMixture, binary_chain, even_parity
from gen_jax.metrics import gaps
from gen_jax.metrics.repair import repair_curve
from gen_jax.models.masked import config as options
from gen_jax.models.masked import samplers
from gen_jax.models.masked.losses import ExactDenoiser, MaskedModel, infill
from gen_jax.models.masked.orders import halton_order
from gen_jax.models.masked.samplers import (
    AbsorbingDiffusion,
    MaskGIT,
    MaskPredict,
    OrderedGroups,
    Repair,
)
from gen_jax.models.masked.schedules import (
    Cosine,
    Fixed,
    Logarithmic,
    Optimal,
    Power,
    masked_after,
)
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.testing import check_sampler
from random_networks import random_params

DRAWS = 20_000
CHAIN = binary_chain(5, 0.85)
SHORT_CHAIN = binary_chain(4, 0.85)
MIXTURE = NoisyMixture(3, 4, 3, 0.2, (0.5, 0.3, 0.2)).data
PARITY = even_parity(5)

SMALL = TransformerConfig(
    vocabulary=7, context=10, layers=1, width=16, heads=2, causal=False, extra_inputs=4
)
L, T, MASK = 8, 4, 7
MODEL = MaskedModel(TokenNetwork(SMALL))
PAIR = MaskedModel(EncoderDecoder(dataclasses.replace(SMALL, memory=True), 1))
PARAMS = random_params(MODEL.network, 2)
HOLE = None


def random_templates(number, most, seed=0):
    """Rows of 8 tokens, up to `most` of which are given."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 7, (number, L))
    given = generator.random((number, L)).argsort(axis=1)
    hidden = given >= generator.integers(0, most + 1, (number, 1))
    pairs = zip(rows, hidden, strict=True)
    return [[HOLE if h else int(t) for t, h in zip(*pair, strict=True)] for pair in pairs]


CHOSEN = [
    [],
    [1, 2, 3],
    [HOLE, 4, HOLE, HOLE, 0, HOLE, 6],
    [HOLE, 5],
    [3, 3, HOLE, HOLE, 3],
    [HOLE, 2, 1, 0, 6, 5, 4, HOLE],
    [1, 2, 3, 4],
]
ROWS = 24
TEMPLATES = CHOSEN + random_templates(ROWS - len(CHOSEN), 4)
LENGTHS = [8, 8, 8, 5, 5, 8, 4] + [L] * (ROWS - len(CHOSEN))
HOLES = infill(MODEL, L, TEMPLATES, LENGTHS)
VALID = np.arange(L) < np.array(LENGTHS)[:, None]
MASKED = np.where(HOLES.is_given, HOLES.given, MASK)
EDITABLE = (MASKED == MASK) & VALID

SAMPLERS = {
    "mask_predict": MaskPredict(MODEL, L, T),
    "maskgit": MaskGIT(MODEL, L, T),
    "maskgit_sure": MaskGIT(MODEL, L, T, Cosine(), 0.0, 0.0),
    "random_order": OrderedGroups(MODEL, L, T),
    "halton": OrderedGroups(MODEL, L, T, order=halton_order((2, 4))),
    "absorbing": AbsorbingDiffusion(MODEL, L, T),
    "remasking": AbsorbingDiffusion(MODEL, L, T, Cosine(), remask=0.7),
    "repair": Repair(MODEL, L, T, count=2),
    "repair_least": Repair(MODEL, L, T, "least_likely"),
}
EVERY = pytest.mark.parametrize("name", SAMPLERS)
CALLS = []


@dataclasses.dataclass(frozen=True)
class Counting:
    """A denoiser that writes down each of its evaluations."""

    inner: MaskedModel

    @property
    def vocabulary(self):
        return self.inner.vocabulary

    @property
    def mask(self):
        return self.inner.mask

    @property
    def conditions(self):
        return self.inner.conditions

    def check(self, params, cond, length):
        self.inner.check(params, cond, length)

    def prepare(self, params):
        return self.inner.prepare(params)

    def encode(self, params, cond):
        return self.inner.encode(params, cond)

    def __call__(self, params, tokens, valid, context):
        jax.debug.callback(lambda: CALLS.append(len(tokens)))
        return self.inner(params, tokens, valid, context)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, valid, cond):
    prepared = model.prepare(params)
    return model(prepared, tokens, valid, model.encode(prepared, cond))


def generate(sampler, cond, seed=0, params=PARAMS):
    number = len(jax.tree.leaves(cond)[0])
    keys = sampling.sample_keys(seed, 0, number)
    return np.asarray(sampling.generate(sampler, params, keys, cond))


def collect(*args, **kwargs):
    return np.concatenate([chunk.samples for chunk in sampling.generate_many(*args, **kwargs)])


def progress(state):
    """What is looked at after each round."""
    return state.tokens, state.log_prob


@functools.cache
def history(name, seed=0):
    """Tokens [1 + T, B, L] of `HOLES` before and after each round, the samples, and the calls."""
    sampler = dataclasses.replace(SAMPLERS[name], model=Counting(MODEL))
    keys = sampling.sample_keys(seed, 0, ROWS)
    CALLS.clear()
    samples, (tokens, _) = sampling.generate(sampler, PARAMS, keys, HOLES, trajectory=progress)
    jax.block_until_ready(samples)
    jax.effects_barrier()
    return np.asarray(tokens), np.asarray(samples), tuple(CALLS)


def vars_of(dist):
    """The parameters of its exact denoiser."""
    return {"support": dist.support, "prob": dist.prob}


def exact_run(dist, make, number=DRAWS, seed=0, cond=None):
    """Samples of a sampler with the exact denoiser, and tokens and log_prob after each round."""
    sampler = make(ExactDenoiser(dist.vocabulary))
    keys = sampling.sample_keys(seed, 0, number)
    samples, (tokens, log_prob) = sampling.generate(
        sampler, vars_of(dist), keys, cond, trajectory=progress
    )
    return np.asarray(samples), np.asarray(tokens), np.asarray(log_prob)


def p_value(drawn, law):
    """Of Pearson's test over all sequences, rare ones together."""
    index = np.ravel_multi_index(tuple(drawn.T), law.shape)
    observed, expected = np.bincount(index, minlength=law.size), law.reshape(-1) * len(drawn)
    assert expected.sum() == pytest.approx(len(drawn))
    if observed[expected == 0].any():
        return 0.0
    order = np.argsort(-expected)
    observed, expected = observed[order], expected[order]
    ends = np.arange((expected >= 8).sum())
    return stats.chisquare(np.add.reduceat(observed, ends), np.add.reduceat(expected, ends)).pvalue


def within(values, wanted, errors=4):
    values = np.asarray(values, np.float64)
    assert abs(values.mean() - wanted) <= errors * values.std() / len(values) ** 0.5 + 1e-5


GROUPS = {
    "halves": gaps.half_groups(5),
    "dyadic": gaps.dyadic_groups(5),
    "checkerboard": gaps.checkerboard_groups(5),
    "left_to_right": gaps.code_groups(5, 1),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_have_their_law(name):
    groups = GROUPS[name]
    drawn, _, log_prob = exact_run(CHAIN, lambda model: OrderedGroups.of_groups(model, groups))
    law = gaps.law_of_groups(CHAIN, groups)
    assert p_value(drawn, law) > 1e-4
    if gaps.kl_of_groups(CHAIN, groups) > 1e-6:  # the test tells it from the model's
        assert p_value(drawn, CHAIN.dense()) < 1e-6
    q = np.exp(log_prob[-1].sum(-1))
    np.testing.assert_allclose(q, law[tuple(drawn.T)], rtol=1e-4)


@pytest.mark.parametrize(
    ("dist", "schedule", "rounds"),
    [
        (MIXTURE, Cosine(), 2),
        (MIXTURE, Power(0.5), 3),
        (MIXTURE, Optimal(tuple(MIXTURE.entropy_profile.tolist())), 2),
        (PARITY, Cosine(), 2),
        (MIXTURE, Cosine(), 4),
        (PARITY, Power(), 5),
    ],
)
def test_rounds_in_a_random_order_have_their_law_and_gap(dist, schedule, rounds):
    sizes, length = schedule.sizes(dist.length, rounds), dist.length
    drawn, _, log_prob = exact_run(
        dist, lambda model: OrderedGroups(model, length, rounds, schedule)
    )
    law, gap = gaps.law_of_rounds(dist, sizes), gaps.random_order_gap(dist.entropy_profile, sizes)
    assert p_value(drawn, law) > 1e-4
    if rounds == length:
        np.testing.assert_allclose(law, dist.dense(), atol=1e-12)
    weight = np.exp(dist.log_prob(drawn) - log_prob[-1].sum(-1))
    within(weight, 1)
    within(weight * np.log(np.where(weight > 0, weight, 1)), gap)


@pytest.mark.parametrize(
    ("dist", "rule", "erase", "count"),
    [
        (SHORT_CHAIN, "random_one", "random", 1),
        (MIXTURE, "random_half", "random", 2),
        (SHORT_CHAIN, "confidence_one", "least_likely", 1),
        (MIXTURE, "confidence_one", "least_likely", 1),
    ],
)
def test_repair_has_the_laws_of_its_kernel(dist, rule, erase, count):
    _, tokens, _ = exact_run(dist, lambda model: Repair(model, 4, 4, erase, count))
    laws = repair_curve(dist, rule, (0, 1, 2, 4))
    for law, drawn in zip(laws[1:], tokens[np.array([0, 1, 3])], strict=True):
        assert p_value(drawn, law) > 1e-4
    assert p_value(tokens[3], laws[0]) < 1e-6


def test_gibbs_sampling_tends_to_the_model():
    drawn, *_ = exact_run(SHORT_CHAIN, lambda model: Repair(model, 4, 60), 5_000)
    (law,) = repair_curve(SHORT_CHAIN, "random_one", (60,))
    assert gaps.total_variation(law, SHORT_CHAIN.dense()) < 1e-3
    assert p_value(drawn, SHORT_CHAIN.dense()) > 1e-4


@pytest.mark.parametrize(
    ("schedule", "remask"), [(Power(), 0.0), (Power(), 0.5), (Power(), 1.0), (Logarithmic(), 1.0)]
)
def test_the_number_of_masks_is_binomial(schedule, remask):
    drawn, tokens, _ = exact_run(
        PARITY, lambda model: AbsorbingDiffusion(model, 5, 4, schedule, 1.0, remask), 5_000
    )
    masked = tokens == 2
    for i in range(3):
        share = schedule.gamma((i + 1) / 4, 5)
        counts = np.bincount(masked[i].sum(-1), minlength=6)
        expected = 5_000 * stats.binom.pmf(np.arange(6), 5, share)
        kept = expected >= 8
        assert counts[~kept].sum() <= 40
        counts, expected = counts[kept], expected[kept] * counts[kept].sum() / expected[kept].sum()
        assert len(counts) == 1 or stats.chisquare(counts, expected).pvalue > 1e-4
    assert not masked[3].any()
    again = (masked[1:] & ~masked[:-1]).any()
    assert again == (remask > 0)
    assert drawn.max() <= 1


def test_small_steps_of_absorbing_diffusion_are_nearly_exact():
    drawn, *_ = exact_run(SHORT_CHAIN, lambda model: AbsorbingDiffusion(model, 4, 4))
    observed = np.zeros((2,) * 4)
    np.add.at(observed, tuple(drawn.T), 1 / DRAWS)
    one_shot = gaps.law_of_groups(SHORT_CHAIN, (tuple(range(4)),))
    worst = gaps.total_variation(one_shot, SHORT_CHAIN.dense())
    assert gaps.total_variation(observed, SHORT_CHAIN.dense()) < 0.5 * worst


@EVERY
def test_given_tokens_stay_and_no_mask_is_left(name):
    tokens, samples, _ = history(name)
    fixed = VALID & HOLES.is_given
    for now in (*tokens, samples):
        np.testing.assert_array_equal(now[fixed], HOLES.given[fixed])
        assert (now[~VALID] == 0).all()
    assert samples.dtype == np.int32
    assert (samples >= 0).all()
    assert (samples < MASK).all()
    np.testing.assert_array_equal(samples, tokens[-1])
    assert len(np.unique(samples)) > 3


@EVERY
def test_evaluations_are_what_they_cost(name):
    _, _, calls = history(name)
    sampler = SAMPLERS[name]
    assert len(calls) == sampler.nfe == T + name.startswith("repair")
    assert calls[0] == ROWS
    assert set(calls[1:]) == {ROWS * L if name == "repair_least" else ROWS}
    assert sampler.steps == T


@pytest.mark.parametrize("name", ["maskgit", "random_order", "absorbing"])
def test_each_position_is_revealed_once(name):
    tokens, _, _ = history(name)
    before = np.where(VALID, MASKED, 0)
    for now in tokens:
        known = before != MASK
        np.testing.assert_array_equal(now[known], before[known])
        before = now
    assert (before != MASK).all()


@pytest.mark.parametrize("name", ["mask_predict", "maskgit", "random_order"])
def test_counts_follow_the_schedule(name):
    tokens, _, _ = history(name)
    number = EDITABLE.sum(-1)
    assert {0, 2, 4, 5, 8} <= set(number.tolist())  # more, and fewer, than rounds
    wanted = masked_after(SAMPLERS[name].schedule, L, T)[number]
    np.testing.assert_array_equal((tokens == MASK).sum(-1).T, wanted)


@EVERY
def test_the_laws_of_all_samplers(name):
    changes = {"model": ExactDenoiser(3), "length": 4, "rounds": 2}
    changes |= {"order": halton_order((2, 2))} if name == "halton" else {}
    cond = infill(changes["model"], 4, [[], [1], [HOLE, 2], [HOLE, HOLE, 0], [0, 1, 2, 1], [2]])
    check_sampler(dataclasses.replace(SAMPLERS[name], **changes), vars_of(MIXTURE), cond)


@pytest.mark.parametrize("name", ["maskgit", "repair_least"])
def test_a_sample_of_a_network_does_not_know_its_batch_or_device(name):
    _, whole, _ = history(name)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    alone = collect(SAMPLERS[name], PARAMS, 0, ROWS, cond=HOLES, micro_batch=4, mesh=mesh)
    np.testing.assert_array_equal(alone, whole)  # one on each device


@pytest.mark.parametrize("name", ["mask_predict", "maskgit_sure", "repair_least"])
def test_rounding_does_not_choose_among_equal_positions(name):
    """With rotary positions alone, all positions of a sequence of masks have the same logits."""
    config = dataclasses.replace(SMALL, position="rotary", width=64, heads=4, layers=2)
    model = MaskedModel(TokenNetwork(config))
    sampler = dataclasses.replace(SAMPLERS[name], model=model)
    params = random_params(model.network, 5)
    logits = logits_of(model, params, np.full((1, L), MASK), np.ones((1, L), bool), {})[0]
    np.testing.assert_allclose(logits, np.broadcast_to(logits[:1], logits.shape), atol=1e-5)
    keys = sampling.sample_keys(0, 0, ROWS)
    whole = np.asarray(sampling.generate(sampler, params, keys))
    for size in (1, 3, 8):
        parts = [
            sampling.generate(sampler, params, keys[first : first + size])
            for first in range(0, ROWS, size)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_of_equals_the_lower_positions_are_kept():
    rows = np.float32(
        [
            [1.0, 2.0, 2.0 + 4e-6, 2.0 - 4e-6, 3.0],
            [np.inf, 0.0, np.inf, -1.0, np.inf],
            [-np.inf, -np.inf, -2.0, -np.inf, -1.0],
            [1.0, 1.0 + 1e-3, 1.0, 1.0, 1.0],
        ]
    )
    wanted = {
        0: [[], [], [], []],
        2: [[1, 4], [0, 2], [2, 4], [0, 1]],
        3: [[1, 2, 4], [0, 2, 4], [0, 2, 4], [0, 1, 2]],
        5: [range(5)] * 4,
    }
    for count, positions in wanted.items():
        kept = samplers._most_confident(rows, np.full(4, count))
        assert [list(np.flatnonzero(row)) for row in kept] == [list(row) for row in positions]


@pytest.mark.parametrize("name", ["mask_predict", "maskgit", "random_order"])
def test_positions_that_are_not_valid_change_nothing(name):
    _, samples, _ = history(name)
    wider = dataclasses.replace(SAMPLERS[name], length=10)
    drawn = generate(wider, infill(MODEL, 10, TEMPLATES, LENGTHS))
    np.testing.assert_array_equal(drawn[:, :L], samples)
    assert (drawn[:, L:] == 0).all()


def test_one_round_is_the_one_shot_decoder():
    number, dist, template = 6_000, MIXTURE, [1, HOLE, 2, HOLE]
    cond = infill(ExactDenoiser(3), 4, [template] * number)
    one = [MaskGIT, OrderedGroups, AbsorbingDiffusion]
    makes = [functools.partial(lambda kind, model: kind(model, 4, 1), kind) for kind in one]
    makes.append(lambda model: Repair(model, 4, 0))
    drawn = [exact_run(dist, make, number, cond=cond)[0] for make in makes]
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])
    (p,) = dist.conditionals(np.array([[1, 3, 2, 3]]), 3)[:, [1, 3]]
    assert p.max() < 0.9
    assert p_value(drawn[0][:, [1, 3]], p[0][:, None] * p[1]) > 1e-4


def test_one_round_without_temperature_is_the_argmax():
    best = np.asarray(logits_of(MODEL, PARAMS, MASKED, VALID, {})).argmax(-1)
    wanted = np.where(VALID, np.where(EDITABLE, best, MASKED), 0)
    for sampler in (MaskPredict(MODEL, L, 1), MaskGIT(MODEL, L, 1, temperature=0.0)):
        np.testing.assert_array_equal(generate(sampler, HOLES), wanted)


def log_softmax(row):
    row = np.asarray(row, np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def log_probs_alone(row):
    logits = logits_of(MODEL, PARAMS, row[None], np.ones((1, L), bool), {})[0]
    return np.stack([log_softmax(one) for one in logits])


def mask_predict_of_the_paper(row, rounds):
    """Section 3.2 of Ghazvininejad et al. 2019, for one sequence: tokens after each round."""
    row, free = row.copy(), np.flatnonzero(row == MASK)
    probability, states = np.zeros(L), []
    for t in range(1, rounds + 1):
        scores = log_probs_alone(row)
        for i in free:
            if row[i] == MASK:
                row[i], probability[i] = scores[i].argmax(), scores[i].max()
        number = len(free) * (rounds - t) // rounds
        row[sorted(free, key=lambda i: probability[i])[:number]] = MASK
        states.append(row.copy())
    return states


def maskgit_of_the_paper(row, rounds):
    """Section 3.2 of Chang et al. 2022 without noise, for one sequence: tokens after each round."""
    row, number, states = row.copy(), (row == MASK).sum(), []
    for t in range(1, rounds + 1):
        scores, masked = log_probs_alone(row), np.flatnonzero(row == MASK)
        left = int(np.floor(number * np.cos(np.pi / 2 * t / rounds) + 1e-9))
        left = max(1, min(left, len(masked) - 1)) if t < rounds else 0
        sure = sorted(masked, key=lambda i: -scores[i].max())
        for i in sure[: len(masked) - left]:
            row[i] = scores[i].argmax()
        states.append(row.copy())
    return states


@pytest.mark.parametrize(
    ("name", "reference"),
    [("mask_predict", mask_predict_of_the_paper), ("maskgit_sure", maskgit_of_the_paper)],
)
def test_tokens_are_those_of_the_papers(name, reference):
    got, _, _ = history(name)
    for b in range(len(CHOSEN), ROWS):
        np.testing.assert_array_equal(got[:, b], reference(MASKED[b], T))
    np.testing.assert_array_equal(got, history(name, seed=1)[0])


def test_mask_predict_revises():
    tokens, revised = history("mask_predict")[0], 0
    for one, other in itertools.combinations(tokens, 2):
        revised += ((one != MASK) & (other != MASK) & (one != other)).sum()
    assert revised > 0


def test_no_condition_is_all_masks():
    model, keys = ExactDenoiser(3), sampling.sample_keys(0, 0, 5)
    sampler, prepared = OrderedGroups(model, 4, 2), model.prepare(vars_of(MIXTURE))
    states = [
        sampler.init(prepared, keys, cond) for cond in (Condition(), infill(model, 4, number=5))
    ]
    for one, other in zip(*(jax.tree.leaves(progress(state)) for state in states), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (states[0].tokens == 3).all()
    assert states[0].editable.all()


def test_labels_are_tokens_before_the_sequence():
    labels, number = np.arange(3), 10
    tokens = np.array([[1, MASK, 2] + [MASK] * 5] * 3, np.int32)
    logits = logits_of(MODEL, PARAMS, tokens, np.ones((3, L), bool), {"label": labels})
    longer = np.concatenate([MASK + 1 + labels[:, None], tokens], axis=1)
    plain = jax.jit(MODEL.network)(PARAMS, longer)[:, 1:]
    np.testing.assert_allclose(logits, plain, atol=1e-5)
    assert np.abs(logits[0] - logits[1]).max() > 0.05
    assert np.abs(logits[1] - logits[2]).max() > 0.05
    drawn = generate(MaskPredict(MODEL, L, T), Condition(label=np.repeat(labels, number)))
    assert len({row.tobytes() for row in drawn}) in (2, 3)  # it depends only on the label


def test_sources_are_read_up_to_their_length():
    params, generator = random_params(PAIR.network), np.random.default_rng(0)
    source = generator.integers(0, 7, (6, 5)).astype(np.int32)
    other, length = (source + 1) % 7, np.array([1, 2, 3, 4, 5, 3], np.int32)
    padded = np.where(np.arange(5) >= length[:, None], other, source)
    holes = infill(PAIR, L, random_templates(6, 3))
    tokens, valid = np.where(holes.is_given, holes.given, MASK), np.ones((6, L), bool)
    conds = [{"source": some, "source_length": length} for some in (source, padded, other)]
    logits, same, different = (logits_of(PAIR, params, tokens, valid, one) for one in conds)
    np.testing.assert_allclose(logits, same, atol=1e-5)
    assert (np.abs(logits - different).max((1, 2)) > 0.01).all()
    sampler = Repair(PAIR, L, 2, "least_likely")
    drawn = [generate(sampler, holes.replace(**one), params=params) for one in conds]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    np.testing.assert_array_equal(drawn[0][holes.is_given], tokens[holes.is_given])


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        (options.MaskPredictOptions(4), SAMPLERS["mask_predict"]),
        (options.MaskGITOptions(4), SAMPLERS["maskgit"]),
        (options.MaskGITOptions(4, "cosine", 0.0, 0.0), SAMPLERS["maskgit_sure"]),
        (options.RandomOrderOptions(4), SAMPLERS["random_order"]),
        (options.HaltonOptions(4, "cosine"), OrderedGroups(MODEL, L, 4, order=halton_order((L,)))),
        (
            options.HaltonOptions(12),
            OrderedGroups(MODEL, L, 8, Power(3.0), 1.0, halton_order((L,))),
        ),
        (options.AbsorbingDiffusionOptions(4, "cosine", remask=0.7), SAMPLERS["remasking"]),
        (options.RepairOptions(4, count=2), SAMPLERS["repair"]),
        (options.RepairOptions(12), Repair(MODEL, L, 12)),
        (options.MaskPredictOptions(12), MaskPredict(MODEL, L, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_options_make_their_samplers(chosen, wanted):
    assert choices(options.IterativeOptions)[chosen.name] is type(chosen)
    assert resolve(chosen.make)(chosen, MODEL, L) == wanted


def test_the_order_is_that_of_the_grid_of_the_model():
    grid = dataclasses.replace(MODEL, grid=(2, 4))
    assert OrderedGroups.halton(options.HaltonOptions(2), grid, L).order == halton_order((2, 4))
    assert halton_order((2, 4)) != halton_order((L,))


def test_conditions_are_those_of_the_model():
    given = ("given", "is_given")
    assert MaskGIT(ExactDenoiser(3), 4, 2).conditions == given
    assert SAMPLERS["maskgit"].conditions == (*given, "length", "label")
    pair = MaskGIT(PAIR, 4, 2)
    assert pair.conditions == (*given, "length", "label", "source", "source_length")


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MaskPredict(MODEL, L, 0), "the number of rounds must be at least 1, got 0"),
        (lambda: MaskGIT(MODEL, L, 9), "9 rounds are more than the 8 positions"),
        (lambda: MaskGIT(MODEL, L, 2.5), r"rounds must be a whole number, got 2\.5"),
        (lambda: MaskGIT(MODEL, L, 2, temperature=NAN), "temperature must be finite, got nan"),
        (lambda: MaskGIT(MODEL, L, 2, temperature=-1.0), "temperature must be 0 or at least 1e-06"),
        (lambda: MaskGIT(MODEL, L, 2, choice_temperature=-1.0), "must not be negative, got -1.0"),
        (lambda: MaskGIT(MODEL, L, 2, "cosine"), "schedule must be of type Schedule, got 'cosine'"),
        (lambda: MaskGIT(MODEL, L, 2, Fixed((4, 3))), "not of 2 over 8"),
        (lambda: MaskGIT(MODEL.network, L, 2), "model must be a Denoiser, .* not TokenNetwork"),
        (lambda: OrderedGroups(MODEL, 3, 2, order=(0, 2)), "names each of 3 positions once"),
        (lambda: OrderedGroups.of_groups(MODEL, ((0, 1), (1, 2))), "each of 4 positions once"),
        (
            lambda: OrderedGroups.halton(
                options.HaltonOptions(), MaskedModel(MODEL.network, grid=(2, 4)), 7
            ),
            r"a grid of \(2, 4\) has not the 7 positions of the sampler",
        ),
        (lambda: AbsorbingDiffusion(MODEL, L, 2, Fixed((4, 4))), "must be of type Curve"),
        (lambda: AbsorbingDiffusion(MODEL, L, 2, remask=1.5), r"in \[0, 1\], got 1\.5"),
        (lambda: Repair(MODEL, L, -1), "must not be negative, got -1"),
        (lambda: Repair(MODEL, L, 1, count=9), r"in 1 \.\. 8, the positions, got 9"),
        (lambda: Repair(MODEL, L, 1, count=0), r"in 1 \.\. 8, the positions, got 0"),
        (lambda: Repair(MODEL, L, 1, "least_likely", 2), "set count to 1"),
        (lambda: Repair(MODEL, L, 1, "best"), "erase must be one of 'random', 'least_likely'"),
        (lambda: options.MaskPredictOptions(0), "rounds must be at least 1, got 0"),
        (lambda: options.MaskGITOptions(temperature=1e-9), "must be 0 or at least 1e-06"),
        (lambda: options.MaskGITOptions(schedule="round"), "schedule must be one of 'cosine'"),
        (lambda: options.AbsorbingDiffusionOptions(remask=2), r"in \[0, 1\], got 2"),
        (lambda: options.RepairOptions(erase="least_likely", count=2), "set count to 1"),
    ],
)
@unchecked_annotations()
def test_what_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def given_at(place, token, length=L):
    given, is_given = np.zeros((2, length), np.int32), np.zeros((2, length), bool)
    given[0, place], is_given[0, place] = token, True
    return {"given": given, "is_given": is_given}


@pytest.mark.parametrize(
    ("cond", "text"),
    [
        (given_at(0, 1, 7), r"'given' has the shape \[2, 7\]; the sampler needs \[2, 8\]"),
        (given_at(0, 7), "given tokens must be in 0 to 6, got 7 to 7"),
        (given_at(0, -1), "given tokens must be in 0 to 6, got -1 to -1"),
        (given_at(5, 1) | {"length": np.array([5, 8])}, "given beyond the length"),
        ({"length": np.array([0, 8])}, "lengths must be in 1 to 8, got 0 to 8"),
        ({"length": np.array([9, 8])}, "lengths must be in 1 to 8, got 8 to 9"),
        ({"label": np.array([0, 3])}, "labels must be in 0 to 2, got 0 to 3"),
        ({"source": np.zeros((2, 3), int)}, "no use for the condition 'source'"),
    ],
)
@unchecked_annotations()
def test_conditions_that_are_refused(cond, text):
    with pytest.raises(ValueError, match=text):
        generate(MaskPredict(MODEL, L, 2), Condition(**cond))


@pytest.mark.parametrize(
    ("cond", "text"),
    [
        ({"label": np.zeros(2, int)}, "give the condition 'source'"),
        ({"source": np.full((2, 3), 7)}, "tokens of the source must be in 0 to 6, got 7 to 7"),
        (
            {"source": np.zeros((2, 3), int), "source_length": np.array([0, 3])},
            "source lengths must be in 1 to 3, got 0 to 3",
        ),
    ],
)
@unchecked_annotations()
def test_sources_that_are_refused(cond, text):
    with pytest.raises(ValueError, match=text):
        generate(MaskPredict(PAIR, L, 2), Condition(**cond), params=random_params(PAIR.network))


def test_other_parameters_are_refused():
    other = {name: leaf for name, leaf in PARAMS.items() if name != "token"}
    with pytest.raises(ValueError, match="do not fit the MaskedModel: token is missing"):
        generate(MaskPredict(MODEL, L, 2), HOLES, params=other)
