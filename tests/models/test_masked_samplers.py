"""Parallel decoding in rounds: laws with an exact denoiser, and what every round leaves alone."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from scipy import stats

from gen_jax import sampling
from gen_jax.data.exact_sets import NoisyMixture, binary_chain, even_parity
from gen_jax.metrics import gaps
from gen_jax.metrics.repair import repair_curve
from gen_jax.models.masked.losses import ExactDenoiser, NetworkDenoiser, blanks
from gen_jax.models.masked.samplers import (
    AbsorbingDiffusion,
    InOrder,
    MaskGIT,
    MaskPredict,
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
from random_networks import random_params

pytestmark = pytest.mark.usefixtures("quick_compile")

DRAWS = 20_000
CHAIN = binary_chain(5, 0.85)
SHORT_CHAIN = binary_chain(4, 0.85)
MIXTURE = NoisyMixture(3, 4, 3, 0.2, (0.5, 0.3, 0.2)).data
PARITY = even_parity(5)

SMALL = TransformerConfig(
    vocabulary=7, context=10, layers=1, width=16, heads=2, causal=False, extra_inputs=4
)
L, T, MASK = 8, 4, 7
NETWORK = NetworkDenoiser(TokenNetwork(SMALL))
PAIR = NetworkDenoiser(EncoderDecoder(dataclasses.replace(SMALL, memory=True), 1))
HOLE = None
TEMPLATES = [
    [],
    [1, 2, 3],
    [HOLE, 4, HOLE, HOLE, 0, HOLE, 6],
    [HOLE, 5],
    [3, 3, HOLE, HOLE, 3],
    [HOLE, 2, 1, 0, 6, 5, 4, HOLE],
    [1, 2, 3, 4],
]
LENGTHS = [8, 8, 8, 5, 5, 8, 4]

SAMPLERS = {
    "mask_predict": MaskPredict(NETWORK, L, T),
    "maskgit": MaskGIT(NETWORK, L, T),
    "in_order": InOrder(NETWORK, L, T),
    "absorbing": AbsorbingDiffusion(NETWORK, L, T),
    "remasking": AbsorbingDiffusion(NETWORK, L, T, Cosine(), remask=0.7),
    "repair": Repair(NETWORK, L, T, count=2),
    "repair_least": Repair(NETWORK, L, T, "least_likely"),
}
EVERY = pytest.mark.parametrize("name", SAMPLERS)
CALLS = []


@dataclasses.dataclass(frozen=True)
class Counting:
    """A denoiser that writes down each of its evaluations."""

    inner: NetworkDenoiser

    @property
    def vocabulary(self):
        return self.inner.vocabulary

    @property
    def mask(self):
        return self.inner.mask

    def prepare(self, params):
        return self.inner.prepare(params)

    def encode(self, params, cond):
        return self.inner.encode(params, cond)

    def __call__(self, params, tokens, exists, context):
        jax.debug.callback(lambda: CALLS.append(len(tokens)))
        return self.inner(params, tokens, exists, context)


PARAMS = random_params(NETWORK.network, 2)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(denoiser, params, tokens, cond):
    prepared = denoiser.prepare(params)
    length = cond.get("length", jnp.full(len(tokens), tokens.shape[1]))
    exists = jnp.arange(tokens.shape[1]) < length[:, None]
    return denoiser(prepared, tokens, exists, denoiser.encode(prepared, cond))


def holes():
    return blanks(NETWORK, L, TEMPLATES, LENGTHS)


def generate(sampler, cond, seed=0, params=PARAMS):
    number = len(jax.tree.leaves(cond)[0])
    keys = sampling.sample_keys(seed, 0, number)
    return np.asarray(sampling.generate(sampler, params, keys, cond))


def collect(*args, **kwargs):
    return np.concatenate([chunk.samples for chunk in sampling.generate_many(*args, **kwargs)])


@functools.cache
def history(name):
    """Tokens [1 + T, B, L] of `holes` before and after each round, the samples, and the calls."""
    sampler = dataclasses.replace(SAMPLERS[name], denoiser=Counting(NETWORK))
    keys, cond = sampling.sample_keys(0, 0, len(TEMPLATES)), holes()
    CALLS.clear()
    samples, states = sampling.generate(sampler, PARAMS, keys, cond, trajectory=True)
    jax.block_until_ready(samples)
    jax.effects_barrier()
    return np.asarray(states.tokens), np.asarray(samples), tuple(CALLS)


def exact_run(dist, make, number=DRAWS, seed=0):
    """Samples of a sampler with the exact denoiser, and its states."""
    sampler = make(ExactDenoiser(dist.vocabulary))
    params = {"support": dist.support, "prob": dist.prob}
    keys = sampling.sample_keys(seed, 0, number)
    samples, states = sampling.generate(sampler, params, keys, trajectory=True)
    return np.asarray(samples), jax.tree.map(np.asarray, states.replace(keys=None))


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
    drawn, states = exact_run(CHAIN, lambda denoiser: InOrder.of_groups(denoiser, groups))
    law = gaps.law_of_groups(CHAIN, groups)
    assert p_value(drawn, law) > 1e-4
    if gaps.kl_of_groups(CHAIN, groups) > 1e-6:  # the test tells it from the model's
        assert p_value(drawn, CHAIN.dense()) < 1e-6
    q = np.exp(states.log_prob[-1].sum(-1))
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
    drawn, states = exact_run(dist, lambda denoiser: InOrder(denoiser, length, rounds, schedule))
    law, gap = gaps.law_of_rounds(dist, sizes), gaps.random_order_gap(dist.entropy_profile, sizes)
    assert p_value(drawn, law) > 1e-4
    if rounds == length:
        np.testing.assert_allclose(law, dist.dense(), atol=1e-12)
    weight = np.exp(dist.log_prob(drawn) - states.log_prob[-1].sum(-1))
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
    _, states = exact_run(dist, lambda denoiser: Repair(denoiser, 4, 4, erase, count))
    laws = repair_curve(dist, rule, (0, 1, 2, 4))
    for law, tokens in zip(laws[1:], states.tokens[np.array([0, 1, 3])], strict=True):
        assert p_value(tokens, law) > 1e-4
    assert p_value(states.tokens[3], laws[0]) < 1e-6


def test_gibbs_sampling_tends_to_the_model():
    drawn, _ = exact_run(SHORT_CHAIN, lambda denoiser: Repair(denoiser, 4, 60))
    (law,) = repair_curve(SHORT_CHAIN, "random_one", (60,))
    assert gaps.total_variation(law, SHORT_CHAIN.dense()) < 1e-3
    assert p_value(drawn, SHORT_CHAIN.dense()) > 1e-4


@pytest.mark.parametrize(
    ("schedule", "remask"), [(Power(), 0.0), (Power(), 0.5), (Power(), 1.0), (Logarithmic(), 1.0)]
)
def test_the_number_of_masks_is_binomial(schedule, remask):
    drawn, states = exact_run(
        PARITY, lambda denoiser: AbsorbingDiffusion(denoiser, 5, 4, schedule, 1.0, remask), 5_000
    )
    masked = states.tokens == 2
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
    drawn, _ = exact_run(SHORT_CHAIN, lambda denoiser: AbsorbingDiffusion(denoiser, 4, 4))
    observed = np.zeros((2,) * 4)
    np.add.at(observed, tuple(drawn.T), 1 / DRAWS)
    one_shot = gaps.law_of_groups(SHORT_CHAIN, (tuple(range(4)),))
    worst = gaps.total_variation(one_shot, SHORT_CHAIN.dense())
    assert gaps.total_variation(observed, SHORT_CHAIN.dense()) < 0.5 * worst


@EVERY
def test_given_tokens_stay_and_no_mask_is_left(name):
    tokens, samples, _ = history(name)
    given = holes()
    exists = np.arange(L) < np.array(LENGTHS)[:, None]
    fixed = exists & (given["tokens"] != MASK)
    for now in (*tokens, samples):
        np.testing.assert_array_equal(now[fixed], given["tokens"][fixed])
        assert (now[~exists] == 0).all()
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
    rows = len(TEMPLATES)
    assert calls[0] == rows
    assert set(calls[1:]) == {rows * L if name == "repair_least" else rows}
    assert sampler.steps == T


@pytest.mark.parametrize("name", ["maskgit", "in_order", "absorbing"])
def test_each_position_is_revealed_once(name):
    tokens, _, _ = history(name)
    given = holes()["tokens"]
    exists = np.arange(L) < np.array(LENGTHS)[:, None]
    before = np.where(exists, given, 0)
    for now in tokens:
        known = before != MASK
        np.testing.assert_array_equal(now[known], before[known])
        before = now
    assert (before != MASK).all()


@pytest.mark.parametrize("name", ["mask_predict", "maskgit", "in_order"])
def test_counts_follow_the_schedule(name):
    tokens, _, _ = history(name)
    free = (holes()["tokens"] == MASK) & (np.arange(L) < np.array(LENGTHS)[:, None])
    assert sorted(set(free.sum(-1).tolist())) == [0, 2, 4, 5, 8]  # more, and fewer, than rounds
    wanted = masked_after(SAMPLERS[name].schedule, L, T)[free.sum(-1)]
    np.testing.assert_array_equal((tokens == MASK).sum(-1).T, wanted)


@pytest.mark.parametrize("name", ["in_order", "repair_least"])
def test_the_loop_is_its_steps_in_python(name):
    sampler, cond = SAMPLERS[name], holes()
    keys = sampling.sample_keys(0, 0, len(TEMPLATES))
    prepared = sampler.prepare(PARAMS)
    state, step = jax.jit(sampler.init)(prepared, keys, cond), jax.jit(sampler.step)
    for i in range(sampler.steps):
        state = step(prepared, state, jnp.int32(i))
    _, samples, _ = history(name)
    np.testing.assert_array_equal(sampler.finish(prepared, state), samples)


@EVERY
def test_a_sample_does_not_know_its_batch_or_device(name):
    sampler, cond = SAMPLERS[name], holes()
    _, whole, _ = history(name)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    alone = collect(sampler, PARAMS, 0, 7, cond=cond, micro_batch=4, mesh=mesh)  # one on each
    np.testing.assert_array_equal(alone, whole)


@pytest.mark.parametrize("name", ["mask_predict", "maskgit", "in_order"])
def test_columns_that_do_not_exist_change_nothing(name):
    templates, lengths = [[], [HOLE, 3], [], [5]], [3, 5, 6, 6]
    drawn = []
    for columns in (6, 9):
        sampler = dataclasses.replace(SAMPLERS[name], length=columns, rounds=3)
        drawn.append(generate(sampler, blanks(NETWORK, columns, templates, lengths)))
    np.testing.assert_array_equal(drawn[0], drawn[1][:, :6])
    assert (drawn[1][:, 6:] == 0).all()


def test_one_round_is_the_one_shot_decoder():
    template = [1, HOLE, 2, HOLE, 0, 5, 6, 6]
    cond = blanks(NETWORK, L, [template] * 6_000)
    one = [
        MaskGIT(NETWORK, L, 1),
        InOrder(NETWORK, L, 1),
        AbsorbingDiffusion(NETWORK, L, 1),
        Repair(NETWORK, L, 0),
    ]
    drawn = [generate(sampler, cond) for sampler in one]
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])
    logits = logits_of(NETWORK, PARAMS, cond["tokens"][:1], {})
    p = np.asarray(jax.nn.softmax(logits), np.float64)[0, [1, 3]]
    p /= p.sum(-1, keepdims=True)
    assert p.max() < 0.9
    assert p_value(drawn[0][:, [1, 3]], p[0][:, None] * p[1]) > 1e-4


def test_one_round_without_temperature_is_the_argmax():
    cond = holes()
    logits = logits_of(NETWORK, PARAMS, np.where(cond["tokens"] == MASK, MASK, cond["tokens"]), {
        "length": np.array(LENGTHS)
    })  # fmt: skip
    best = np.asarray(logits).argmax(-1)
    wanted = np.where(cond["tokens"] == MASK, best, cond["tokens"])
    wanted = np.where(np.arange(L) < np.array(LENGTHS)[:, None], wanted, 0)
    for sampler in (
        MaskPredict(NETWORK, L, 1),
        MaskGIT(NETWORK, L, 1, temperature=0.0),
    ):
        np.testing.assert_array_equal(generate(sampler, cond), wanted)


def log_softmax(row):
    row = np.asarray(row, np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def random_templates(number, most, seed=0):
    """Rows of 8 tokens, up to `most` of which are given."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 7, (number, L))
    given = generator.random((number, L)).argsort(axis=1)
    hidden = given >= generator.integers(0, most + 1, (number, 1))
    return [[HOLE if h else int(t) for t, h in zip(*pair, strict=True)]
            for pair in zip(rows, hidden, strict=True)]  # fmt: skip


def log_probs_alone(row):
    logits = logits_of(NETWORK, PARAMS, row[None], {})[0]
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


@functools.cache
def deterministic(sampler, seed=0):
    """Tokens [T, 24, L] after each round, of rows of which at least four are to be filled."""
    cond, keys = blanks(NETWORK, L, random_templates(24, 4)), sampling.sample_keys(seed, 0, 24)
    _, states = sampling.generate(sampler, PARAMS, keys, cond, trajectory=True)
    return np.asarray(states.tokens)


@pytest.mark.parametrize(
    ("sampler", "reference"),
    [
        (MaskPredict(NETWORK, L, 4), mask_predict_of_the_paper),
        (MaskGIT(NETWORK, L, 4, Cosine(), 0.0, 0.0), maskgit_of_the_paper),
    ],
)
def test_tokens_are_those_of_the_papers(sampler, reference):
    got = deterministic(sampler)
    for b, row in enumerate(blanks(NETWORK, L, random_templates(24, 4))["tokens"]):
        np.testing.assert_array_equal(got[:, b], reference(row, 4))
    np.testing.assert_array_equal(got, deterministic(sampler, seed=1))


def test_mask_predict_revises():
    tokens, revised = deterministic(MaskPredict(NETWORK, L, 4)), 0
    for one, other in itertools.combinations(tokens, 2):
        revised += ((one != MASK) & (other != MASK) & (one != other)).sum()
    assert revised > 0


def test_no_condition_is_all_masks():
    sampler, keys = SAMPLERS["in_order"], sampling.sample_keys(0, 0, 5)
    init = jax.jit(sampler.init)
    prepared, blank = sampler.prepare(PARAMS), blanks(NETWORK, L, number=5)
    for one, other in zip(
        jax.tree.leaves(init(prepared, keys, None).replace(keys=None)),
        jax.tree.leaves(init(prepared, keys, blank).replace(keys=None)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_labels_are_tokens_before_the_sequence():
    tokens = blanks(NETWORK, L, [[1, HOLE, 2]] * 3)["tokens"]
    labels = np.arange(3)
    logits = logits_of(NETWORK, PARAMS, tokens, {"label": labels})
    longer = np.concatenate([MASK + 1 + labels[:, None], tokens], axis=1)
    plain = jax.jit(NETWORK.network)(PARAMS, longer)[:, 1:]
    np.testing.assert_allclose(logits, plain, atol=1e-5)
    assert np.abs(logits[0] - logits[1]).max() > 0.05
    assert np.abs(logits[1] - logits[2]).max() > 0.05
    cond = blanks(NETWORK, L, number=30) | {"label": np.repeat(labels, 10)}
    drawn = generate(MaskPredict(NETWORK, L, T), cond)
    assert len({row.tobytes() for row in drawn}) in (2, 3)  # it hangs on the label alone


def source_cond(source, length, number=6):
    tokens = blanks(PAIR, L, random_templates(number, 3))["tokens"]
    return {"tokens": tokens, "source": source, "source_length": length}


def test_sources_are_read_up_to_their_length():
    params = random_params(PAIR.network)
    generator = np.random.default_rng(0)
    source = generator.integers(0, 7, (6, 5)).astype(np.int32)
    other = (source + 1) % 7
    length = np.array([1, 2, 3, 4, 5, 3], np.int32)
    beyond = np.arange(5) >= length[:, None]
    padded = source_cond(np.where(beyond, other, source), length)
    cond, swapped = source_cond(source, length), source_cond(other, length)
    tokens = cond["tokens"]
    logits, same, different = (
        logits_of(PAIR, params, tokens, one) for one in (cond, padded, swapped)
    )
    np.testing.assert_allclose(logits, same, atol=1e-5)
    assert (np.abs(logits - different).max((1, 2)) > 0.01).all()
    sampler = Repair(PAIR, L, 2, "least_likely")
    drawn = [generate(sampler, one, params=params) for one in (cond, padded, swapped)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    given = tokens != MASK
    np.testing.assert_array_equal(drawn[0][given], tokens[given])
    context = jax.jit(lambda params, cond: PAIR.encode(PAIR.prepare(params), cond))(params, cond)
    read = {"tokens": tokens, "context": context}
    np.testing.assert_array_equal(generate(sampler, read, params=params), drawn[0])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MaskPredict(NETWORK, L, 0), "the number of rounds must be at least 1, got 0"),
        (lambda: MaskGIT(NETWORK, L, 9), "9 rounds are more than the 8 positions"),
        (lambda: InOrder(NETWORK, 3, 2, order=(0, 2)), "names each of 3 positions once"),
        (lambda: InOrder.of_groups(NETWORK, ((0, 1), (1, 2))), "names each of 4 positions once"),
        (lambda: AbsorbingDiffusion(NETWORK, L, 2, Fixed((4, 4))), "needs a curve"),
        (lambda: AbsorbingDiffusion(NETWORK, L, 2, remask=1.5), r"in \[0, 1\], got 1\.5"),
        (lambda: Repair(NETWORK, L, -1), "must not be negative, got -1"),
        (lambda: Repair(NETWORK, L, 1, count=9), r"in 1 \.\. 8, the positions, got 9"),
        (lambda: Repair(NETWORK, L, 1, count=0), r"in 1 \.\. 8, the positions, got 0"),
        (lambda: Repair(NETWORK, L, 1, "least_likely", 2), "set count to 1"),
        (
            lambda: generate(MaskPredict(NETWORK, L, 2), blanks(NETWORK, 7, number=2)),
            r"a condition of \(2, 7\), a sampler of \(2, 8\)",
        ),
    ],
)
def test_what_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
