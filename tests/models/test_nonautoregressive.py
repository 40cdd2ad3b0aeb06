"""The parallel decoder: its likelihood and bounds, what it can learn at best, and its sampler."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from scipy import stats

import random_networks
from gen_jax import sampling
from gen_jax.data.exact_sets import NoisyMixture, even_parity, modes
from gen_jax.models.autoregressive import losses as autoregressive
from gen_jax.models.masked import losses as masked
from gen_jax.models.masked.config import MaskConfig
from gen_jax.models.masked.samplers import InOrder, MaskGIT, MaskPredict
from gen_jax.models.parallel import losses as nonautoregressive
from gen_jax.models.parallel.config import LatentConfig
from gen_jax.models.parallel.losses import (
    ParallelDecoder,
    ParallelSampler,
    masked_loss,
    one_shot,
    one_shot_loss,
)
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import TokenNetwork

pytestmark = pytest.mark.usefixtures("quick_compile")

DRAWS = 20_000
NONE, CODES, GAUSSIAN = (
    LatentConfig(),
    LatentConfig("categorical", 3),
    LatentConfig("gaussian", 2),
)
BITS = TransformerConfig(
    vocabulary=2, context=8, layers=1, width=16, heads=2, causal=False, extra_inputs=5
)
FIVE = dataclasses.replace(BITS, vocabulary=5, context=10)
FLAT = ParallelDecoder(TokenNetwork(FIVE), 7)
PAIR = ParallelDecoder(EncoderDecoder(dataclasses.replace(FIVE, memory=True), 1, True), 7)

ROWS = 24
rng = np.random.default_rng(0)
TOKENS = rng.integers(0, 5, (ROWS, 7)).astype(np.int32)
LENGTH = rng.choice(np.array([3, 7], np.int32), ROWS)
INSIDE = np.arange(7) < LENGTH[:, None]
LABEL = {"label": rng.integers(0, 4, ROWS).astype(np.int32)}
SOURCE = {
    "source": rng.integers(0, 5, (ROWS, 6)).astype(np.int32),
    "source_length": rng.integers(1, 7, ROWS).astype(np.int32),
}
TARGET = {"tokens": TOKENS, "length": LENGTH}
KEYS = sampling.sample_keys(0, 0, ROWS)

loss_of = jax.jit(one_shot_loss, static_argnames=("model", "smoothing"))
masked_loss_of = jax.jit(masked_loss, static_argnames=("model", "config", "smoothing"))
plain_masked_loss = jax.jit(masked.loss, static_argnums=0, static_argnames="config")
log_prob = jax.jit(nonautoregressive.log_prob, static_argnums=0)
draw = functools.partial(sampling.generate, trajectory=True)
cross_entropies = optax.softmax_cross_entropy_with_integer_labels


def bits_model(latent=NONE, columns=4, ending="end"):
    return ParallelDecoder(TokenNetwork(BITS), columns, ending, latent)


def every(length):
    return np.array(list(itertools.product(range(2), repeat=length)), np.int32)


def _deviation(names):
    if names[0] == "length" or (names[0] == "latent" and "posterior" not in names):
        return 2.0 if names[-1] == "kernel" else 0.6
    return None


def random_params(model, seed=1):
    """Those of all parts at once, a latent of codes where the model has none."""
    if not isinstance(model, TokenNetwork) and model.latent == NONE:
        model = dataclasses.replace(model, latent=CODES)
    return random_networks.random_params(model, seed, _deviation)


def without_latent(model):
    return dataclasses.replace(model, latent=NONE)


@functools.partial(jax.jit, static_argnums=0)
def latents(model, params, batch):
    """Parameters of prior and posterior, all columns of the sequences read."""
    context = model.denoiser.condition(params["network"], batch)
    exists = jnp.ones(batch["tokens"].shape, bool)
    summary = model.summarise(params["network"], context, len(exists))
    return model.prior(params, summary), model.posterior(params, batch["tokens"], exists, context)


def of_codes(model, params, tokens):
    """log p(x | z) of all codes, float64 [B, K]."""
    plain, table = without_latent(model), params["latent"]["table"]
    tiles = [np.broadcast_to(code, (len(tokens), *code.shape)) for code in table]
    values = [log_prob(plain, params, tokens, {"added": tile}) for tile in tiles]
    return np.stack(values, axis=1).astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def row_losses(model, params, tokens):
    """The loss of each sequence alone, and its divergence."""
    keys = jax.random.split(jax.random.key(0), (len(tokens), 1))
    row = jax.vmap(lambda tokens, key: one_shot_loss(model, params, {"tokens": tokens}, key))
    values, metrics = row(tokens[:, None], keys)
    return values, metrics["divergence"]


@functools.partial(jax.jit, static_argnums=0)
def one_shot_logits(model, params, cond, length):
    """Logits [B, L, V] of masks alone, from parameters that are not prepared."""
    blank = jnp.full((len(length), model.columns), model.denoiser.mask)
    exists = jnp.arange(model.columns) < length[:, None]
    context = model.denoiser.condition(params["network"], cond)
    return model.denoiser.train(params["network"], blank, exists, context)


@functools.partial(jax.jit, static_argnums=0)
def length_logits(model, params, cond):
    context = model.denoiser.condition(params["network"], cond)
    summary = model.summarise(params["network"], context, ROWS)
    length = cond.get("source_length", jnp.zeros(ROWS, jnp.int32))
    return model.length_logits(params, summary, length)


def test_the_loss_of_all_columns_is_minus_the_log_likelihood():
    model = dataclasses.replace(FLAT, ending="end")
    params = random_params(FLAT)
    likelihood = log_prob(model, params, TOKENS, LABEL)
    assert np.std(likelihood) > 0.3
    value, metrics = loss_of(model, params, TARGET | LABEL, KEYS)
    np.testing.assert_allclose(value, -likelihood.sum() / TOKENS.size, rtol=1e-5)
    assert metrics == {}
    logits = one_shot_logits(model, params, LABEL, np.full(ROWS, 7))
    smooth = 0.7 * cross_entropies(logits, TOKENS) - 0.3 * jax.nn.log_softmax(logits).mean(-1)
    value, _ = loss_of(model, params, TARGET | LABEL, KEYS, smoothing=0.3)
    np.testing.assert_allclose(value, smooth.mean(), rtol=1e-5)


def test_the_loss_with_lengths_is_that_of_sequences_alone():
    params, total = random_params(PAIR), 0.0
    for length in (3, 7):
        rows = length == LENGTH
        cond = {name: leaf[rows] for name, leaf in SOURCE.items()}
        total -= log_prob(PAIR, params, TOKENS[rows, :length], cond).sum()
    of_length = cross_entropies(length_logits(PAIR, params, SOURCE), LENGTH - 1)
    value, metrics = loss_of(PAIR, params, TARGET | SOURCE, KEYS)
    np.testing.assert_allclose(metrics["length_loss"], of_length.mean(), rtol=1e-5)
    np.testing.assert_allclose(value, (total + of_length.sum()) / LENGTH.sum(), rtol=1e-5)


@pytest.mark.parametrize(("ending", "same"), [("length", 1), ("end_masked", 1), ("end", 0)])
def test_what_follows_the_end_counts_only_where_all_columns_do(ending, same):
    model, params = dataclasses.replace(FLAT, ending=ending), random_params(FLAT)
    batch = TARGET | LABEL
    other = batch | {"tokens": np.where(INSIDE, TOKENS, 4 - TOKENS)}
    one, two = (loss_of(model, params, some, KEYS)[0] for some in (batch, other))
    assert (one == two) == same
    if ending == "end_masked":  # all columns are read all the same
        logits = one_shot_logits(model, params, LABEL, np.full(ROWS, 7))
        values = np.asarray(cross_entropies(logits, TOKENS))
        np.testing.assert_allclose(one, values[INSIDE].mean(), rtol=1e-5)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_bound_is_off_by_the_divergence_from_the_exact_posterior(seed):
    model, tokens = bits_model(CODES), every(4)
    params = random_params(model, seed)
    likelihood = np.asarray(log_prob(model, params, tokens), np.float64)
    np.testing.assert_allclose(np.exp(likelihood).sum(), 1, rtol=1e-5)
    prior, posterior = latents(model, params, {"tokens": tokens})
    log_q = np.asarray(jax.nn.log_softmax(posterior), np.float64)
    joint = np.asarray(jax.nn.log_softmax(prior), np.float64) + of_codes(model, params, tokens)
    np.testing.assert_allclose(likelihood, np.logaddexp.reduce(joint, axis=1), rtol=1e-5)
    gap = (np.exp(log_q) * (log_q - joint + likelihood[:, None])).sum(-1)
    values, _ = row_losses(model, params, tokens)
    np.testing.assert_allclose(4 * values + likelihood, gap, atol=1e-5)
    assert gap.min() > 1e-4


@dataclasses.dataclass(frozen=True)
class ExactPosterior(ParallelDecoder):
    """With p(z | x) in place of the network that learns it."""

    def posterior(self, params, tokens, exists, context, keys=None):
        plain, table = without_latent(self), params["latent"]["table"]
        tiles = [jnp.broadcast_to(code, (len(tokens), *code.shape)) for code in table]
        given = [
            nonautoregressive.log_prob(plain, params, tokens, {"added": tile}) for tile in tiles
        ]
        summary = self.summarise(params["network"], context, len(tokens))
        return self.prior(params, summary) + jnp.stack(given, axis=1)


def test_the_bound_is_tight_with_the_exact_posterior():
    model, tokens = bits_model(CODES), every(4)
    params = random_params(model)
    exact = ExactPosterior(model.network, 4, "end", CODES)
    values, divergence = row_losses(exact, params, tokens)
    np.testing.assert_allclose(4 * values, -log_prob(model, params, tokens), rtol=1e-5)
    assert divergence.max() > 0.1


def test_the_divergence_of_gaussians():
    model, tokens = bits_model(GAUSSIAN), every(4)
    params = random_params(model)
    prior, posterior = (
        np.asarray(x, np.float64) for x in latents(model, params, {"tokens": tokens})
    )
    (m, s), (m0, s0) = ((x[:, :2], np.exp(x[:, 2:])) for x in (posterior, prior))
    expected = 0.5 * (s / s0 + (m - m0) ** 2 / s0 - 1 - np.log(s / s0)).sum(-1)
    values, divergence = row_losses(model, params, tokens)
    np.testing.assert_allclose(divergence, expected, rtol=1e-4)
    assert expected.min() > 0.05
    # Where the posterior is the prior nothing diverges; without variance the latent is the mean.
    mean = jnp.array([0.7, -0.4])
    latent = params["latent"] | {
        "posterior_kernel": 0 * params["latent"]["posterior_kernel"],
        "prior_kernel": 0 * params["latent"]["prior_kernel"],
        "prior_bias": jnp.array([*mean, -60, -60]),
    }
    still = params | {"latent": latent}
    values, divergence = row_losses(model, still, tokens)
    np.testing.assert_allclose(divergence, 0, atol=1e-6)
    added = np.tile(jnp.einsum("z,zld->ld", mean, latent["table"]), (16, 1, 1))
    likelihood = log_prob(without_latent(model), params, tokens, {"added": added})
    np.testing.assert_allclose(4 * values, -likelihood, rtol=1e-5)
    with pytest.raises(ValueError, match="no closed form"):
        nonautoregressive.log_prob(model, params, tokens)


def test_free_nats_are_not_punished():
    model, batch, keys = bits_model(CODES), {"tokens": every(4)}, sampling.sample_keys(0, 0, 16)
    free = dataclasses.replace(model, latent=dataclasses.replace(CODES, free_nats=5.0))
    params = random_params(model)
    # Codes that all say the same leave nothing but the divergence to learn.
    params = params | {"latent": params["latent"] | {"table": 0 * params["latent"]["table"]}}
    slopes = jax.jit(jax.value_and_grad(one_shot_loss, 1, has_aux=True), static_argnums=0)
    (value, metrics), gradient = slopes(model, params, batch, keys)
    (floored, same), none = slopes(free, params, batch, keys)
    np.testing.assert_allclose(metrics["divergence"], same["divergence"], rtol=1e-5)
    assert 0.01 < metrics["divergence"] < 4
    np.testing.assert_allclose(4 * (floored - value), 5 - metrics["divergence"], rtol=1e-4)
    assert np.abs(gradient["latent"]["posterior_kernel"]).max() > 1e-4
    assert np.abs(none["latent"]["posterior_kernel"]).max() < 1e-6


def test_dropout_is_drawn_from_the_keys():
    model = bits_model(CODES)
    network = TokenNetwork(dataclasses.replace(BITS, dropout=0.3))
    params, batch = random_params(model), {"tokens": every(4)}
    dropped = dataclasses.replace(model, network=network)
    keys = [sampling.sample_keys(seed, 0, 16) for seed in (0, 0, 1)]
    one, again, other = (loss_of(dropped, params, batch, some)[0] for some in keys)
    assert one == again != other
    assert np.isfinite(one)


def test_the_masked_loss_has_that_of_the_length_besides():
    params, config, batch = random_params(FLAT), MaskConfig(), TARGET | LABEL
    value, metrics = masked_loss_of(FLAT, params, batch, KEYS, config=config)
    inner = jax.vmap(lambda key: jax.random.split(key, 2))(KEYS)[:, 1]
    plain, _ = plain_masked_loss(FLAT.network, params["network"], batch, inner, config=config)
    of_length = cross_entropies(length_logits(FLAT, params, LABEL), LENGTH - 1)
    np.testing.assert_allclose(metrics["length_loss"], of_length.mean(), rtol=1e-5)
    np.testing.assert_allclose(value, plain + of_length.sum() / LENGTH.sum(), rtol=1e-5)


FOUR = every(4)
TRAINED = dataclasses.replace(BITS, context=5, extra_inputs=1)
DECODER = ParallelDecoder(TokenNetwork(TRAINED), 4, "end")
CODED = dataclasses.replace(DECODER, latent=LatentConfig("categorical", 2))
CAUSAL = TokenNetwork(dataclasses.replace(TRAINED, causal=True))
MIXTURE = NoisyMixture(2, 4, 2, 0.1).data
SKEWED = modes((0.7, 0.3), 4)
PARITY = even_parity(4)


def sequence_loss(model, params, tokens, key):
    """The loss of one sequence, in nats."""
    kind = one_shot_loss if isinstance(model, ParallelDecoder) else autoregressive.loss
    return 4 * kind(model, params, {"tokens": tokens[None]}, key[None])[0]


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def _train(model, prob, params, steps=300):
    keys = jax.random.split(jax.random.key(0), 16)  # nothing is drawn
    rows = jax.vmap(functools.partial(sequence_loss, model), (None, 0, 0))
    expected = jax.value_and_grad(lambda params: prob @ rows(params, FOUR, keys))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, steps))

    def step(carry, _):
        params, state = carry
        value, gradient = expected(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return params, values


def train(model, dist, seed=2):
    """Parameters after full batches of all sequences, and the expected losses on the way."""
    prob = dist.dense().reshape(-1).astype(np.float32)
    params, values = _train(model, prob, random_params(model, seed))
    return params, np.asarray(values, np.float64)


def gap_of(likelihood, dist):
    """KL(p || q) as a share of the total correlation."""
    likelihood = np.asarray(likelihood, np.float64)
    np.testing.assert_allclose(np.exp(likelihood).sum(), 1, rtol=1e-4)
    return (-dist.dense().reshape(-1) @ likelihood - dist.entropy) / dist.total_correlation()


@pytest.mark.parametrize("dist", [SKEWED, MIXTURE, PARITY], ids=["modes", "mixture", "parity"])
def test_in_parallel_the_best_are_the_marginals(dist):
    params, values = train(DECODER, dist)
    best = dist.entropy + dist.total_correlation()
    assert values[0] > best + 0.001
    assert values.min() > best - 1e-5
    assert values[-1] < 1.01 * best
    prob = np.exp(log_prob(DECODER, params, FOUR))
    drawn = prob @ (FOUR[:, :, None] == np.arange(2)).reshape(16, -1)
    np.testing.assert_allclose(drawn.reshape(4, 2), dist.marginals, atol=0.01)
    assert gap_of(np.log(prob), dist) == pytest.approx(1, abs=0.02)


def test_one_after_the_other_there_is_no_gap():
    params, _ = train(CAUSAL, MIXTURE)
    likelihood = jax.jit(autoregressive.log_prob, static_argnums=0)(CAUSAL, params, FOUR).sum(-1)
    assert gap_of(likelihood, MIXTURE) < 0.02


@pytest.mark.parametrize(("dist", "closed"), [(MIXTURE, True), (PARITY, False)])
def test_a_latent_closes_the_gap_of_as_many_modes_as_codes(dist, closed):
    params, values = train(CODED, dist)
    likelihood = log_prob(CODED, params, FOUR)
    assert values[-1] > -dist.dense().reshape(-1) @ np.asarray(likelihood) - 1e-3
    gap = gap_of(likelihood, dist)
    assert gap < 0.02 if closed else gap > 0.5


def p_value(drawn, law):
    return stats.chisquare(np.bincount(drawn @ [4, 2, 1], minlength=8), law * DRAWS).pvalue


@pytest.mark.parametrize(("latent", "label"), [(NONE, 1), (CODES, None), (CODES, 1)])
def test_samples_have_the_law_of_the_likelihood(latent, label):
    model = bits_model(latent, 3)
    params = random_params(model, 3)
    cond = {} if label is None else {"label": np.full(DRAWS, label, np.int32)}
    few = {name: leaf[:8] for name, leaf in cond.items()}
    law = np.exp(np.asarray(log_prob(model, params, every(3), few), np.float64))
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-5)
    keys = sampling.sample_keys(0, 0, DRAWS)
    drawn = np.asarray(
        sampling.generate(ParallelSampler(model, one_shot(model)), params, keys, cond)
    )
    assert p_value(drawn, law / law.sum()) > 1e-4
    product = product_of(law @ every(3))
    if latent == NONE:
        np.testing.assert_allclose(law, product, rtol=1e-4)
    else:
        assert p_value(drawn, product) < 1e-6
    if label is not None:
        other = log_prob(model, params, every(3), {"label": np.zeros(8, np.int32)})
        other = np.exp(np.asarray(other, np.float64))
        assert p_value(drawn, other / other.sum()) < 1e-6


def product_of(ones):
    """The law of independent bits, float64 [8]."""
    law = np.where(every(3), ones, 1 - ones).prod(-1)
    return law / law.sum()


def test_temperature_divides_the_logits():
    model = bits_model(NONE, 3)
    params = random_params(model, 3)
    logits = one_shot_logits(model, params, {}, np.full(1, 3))[0]
    law, warm = (
        product_of(np.asarray(jax.nn.softmax(logits / t), np.float64)[:, 1]) for t in (1, 3)
    )
    keys = sampling.sample_keys(0, 0, DRAWS)
    drawn = sampling.generate(ParallelSampler(model, one_shot(model, 3.0)), params, keys)
    assert p_value(np.asarray(drawn), warm) > 1e-4
    assert p_value(np.asarray(drawn), law) < 1e-6


def test_the_gaussian_latent_has_the_law_of_its_prior():
    model = bits_model(GAUSSIAN, 3)
    params, keys = random_params(model, 3), sampling.sample_keys(0, 0, 5_000)
    sampler = ParallelSampler(model, one_shot(model), latent_temperature=0.5)
    _, states = draw(sampler, params, keys)
    table, bias = params["latent"]["table"], params["latent"]["prior_bias"]
    added = np.asarray(states.context["added"][0]).reshape(len(keys), -1)
    z = added @ np.linalg.pinv(table.reshape(2, -1))
    for values, mean, log_var in zip(z.T, bias[:2], bias[2:], strict=True):
        normal = stats.norm(mean, 0.5 * np.exp(0.5 * log_var))
        assert stats.kstest(values, normal.cdf).pvalue > 1e-4
    assert abs(stats.pearsonr(*z.T).statistic) < 0.06


@pytest.mark.parametrize("latent", [GAUSSIAN, CODES], ids=["gaussian", "codes"])
def test_without_noise_the_latent_is_its_mode(latent):
    model = dataclasses.replace(FLAT, latent=latent)
    params = random_params(model)
    cold = ParallelSampler(model, one_shot(model, 0.0), latent_temperature=0.0)
    cond = {"length": LENGTH}
    samples, states = draw(cold, params, KEYS, cond)
    prior, _ = latents(model, params, TARGET)
    table = params["latent"]["table"]
    if latent == GAUSSIAN:
        added = jnp.einsum("bz,zld->bld", prior[:, :2], table)
    else:
        added = table[prior.argmax(-1)]
    np.testing.assert_allclose(states.context["added"][0], added, atol=1e-5)
    logits = one_shot_logits(model, params, {"added": added}, LENGTH)
    best = np.where(INSIDE, logits.argmax(-1), 0)
    np.testing.assert_array_equal(samples, best)
    other, _ = draw(cold, params, sampling.sample_keys(9, 0, ROWS), cond)
    np.testing.assert_array_equal(other, samples)


ALONE = ParallelSampler(FLAT, one_shot(FLAT), end=4)


def test_lengths_come_from_the_head_and_end_fills_what_follows():
    params = random_params(FLAT)
    logits = length_logits(FLAT, params, LABEL)
    likeliest = np.asarray(logits.argmax(-1)) + 1
    assert len(set(likeliest.tolist())) > 1
    assert likeliest.min() < 7
    samples, states = draw(ALONE, params, KEYS, LABEL)
    exists = np.arange(7) < likeliest[:, None]
    np.testing.assert_array_equal(states.exists[0], exists)
    ended = 0
    tokens = np.asarray(states.tokens[0])
    for free, row, length in zip(tokens, np.asarray(samples), likeliest, strict=True):
        first = [*free[:length], 4].index(4)
        ended += first < length - 1
        np.testing.assert_array_equal(row[:first], free[:first])
        assert (row[first:] == 4).all()
    assert ended > 2


def test_the_surest_of_several_lengths_is_kept():
    params, several = random_params(FLAT), 3
    likeliest = np.asarray(length_logits(FLAT, params, LABEL)).argsort(-1)[:, ::-1] + 1
    tokens, scores = [], []
    for place in range(several):
        keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, place)
        length = likeliest[:, place].astype(np.int32)
        samples, states = draw(ALONE, params, keys, LABEL | {"length": length})
        drawn, exists = np.asarray(states.tokens[0]), np.arange(7) < length[:, None]
        np.testing.assert_array_equal(states.exists[0], exists)
        of_all = jax.nn.log_softmax(one_shot_logits(FLAT, params, LABEL, length))
        own = np.take_along_axis(np.asarray(of_all), drawn[..., None], axis=-1)[..., 0]
        scores.append(np.where(exists, own, 0).sum(-1) / length)
        tokens.append(np.asarray(samples))
        assert (tokens[-1][~exists] == 4).all()
    best = np.argmax(scores, axis=0)
    assert len(set(best.tolist())) == several
    sampler = dataclasses.replace(ALONE, lengths=several)
    samples = sampling.generate(sampler, params, KEYS, LABEL)
    np.testing.assert_array_equal(samples, np.stack(tokens)[best, np.arange(ROWS)])


@pytest.mark.parametrize("several", [1, 4])
def test_predicted_lengths_hold_the_tokens_that_are_given(several):
    params = random_params(FLAT)
    likeliest = np.asarray(length_logits(FLAT, params, LABEL)).argmax(-1) + 1
    place = 5
    assert (likeliest <= place).any()
    assert (likeliest > place).any()
    tokens = np.full((ROWS, 7), FLAT.denoiser.mask, np.int32)
    tokens[:, place] = 3
    sampler = ParallelSampler(FLAT, MaskPredict(FLAT.denoiser, 7, 3), lengths=several)
    samples, states = draw(sampler, params, KEYS, LABEL | {"tokens": tokens})
    assert (np.asarray(samples)[:, place] == 3).all()
    lengths = np.asarray(states.exists[0]).sum(-1).reshape(ROWS, several)
    assert (lengths > place).all()
    fits = likeliest > place
    np.testing.assert_array_equal(lengths[fits, 0], likeliest[fits])


@pytest.mark.parametrize("latent", [NONE, CODES, GAUSSIAN], ids=lambda latent: latent.kind)
def test_evaluations(latent):
    model, more = bits_model(latent), latent.kind != "none"
    sampler = ParallelSampler(model, one_shot(model))
    assert (sampler.steps, sampler.nfe) == (1, 1 + more)
    sampler = ParallelSampler(model, MaskPredict(model.denoiser, 4, 3))
    assert (sampler.steps, sampler.nfe) == (3, 3 + more)


def test_fewer_columns_use_the_parameters_of_more():
    params, short = random_params(FLAT), dataclasses.replace(FLAT, columns=4)
    whole = length_logits(FLAT, params, LABEL)
    sampler = ParallelSampler(short, one_shot(short, 0.0))
    samples, states = draw(sampler, params, KEYS, LABEL)
    length = np.asarray(whole[:, :4]).argmax(-1) + 1
    np.testing.assert_array_equal(np.asarray(states.exists[0]).sum(-1), length)
    logits = one_shot_logits(FLAT, params, LABEL, length.astype(np.int32))[:, :4]
    best = np.where(np.arange(4) < length[:, None], logits.argmax(-1), 0)
    np.testing.assert_array_equal(samples, best)


def test_the_loop_is_that_of_python():
    model = bits_model(CODES, 5, "length")
    params, mask = random_params(model), model.denoiser.mask
    sampler = ParallelSampler(model, InOrder(model.denoiser, 5, 3), lengths=2)
    tokens = np.tile(np.array([mask, 1, mask, 0, mask], np.int32), (ROWS, 1))
    cond = {"tokens": tokens, "length": np.tile(np.array([4, 5], np.int32), ROWS // 2)}
    prepared = sampler.prepare(params)
    state = jax.jit(sampler.init)(prepared, KEYS, cond)
    added = np.asarray(state.context["added"]).reshape(ROWS, 2, -1)
    np.testing.assert_array_equal(added[:, 0], added[:, 1])  # lengths share the latent
    assert len(np.unique(added[:, 0], axis=0)) == 3
    step = jax.jit(sampler.step)
    for i in range(sampler.steps):
        state = step(prepared, state, i)
    samples = np.asarray(sampling.generate(sampler, params, KEYS, cond))
    np.testing.assert_array_equal(sampler.finish(prepared, state), samples)
    assert samples.dtype == np.int32
    assert (samples[:, [1, 3]] == [1, 0]).all()  # given tokens stay
    assert (samples[::2, 4] == 0).all()
    assert samples[1::2, 4].any()
    assert samples.max() == 1


CODED_PAIR = dataclasses.replace(PAIR, latent=CODES)
IN_ROUNDS = ParallelSampler(CODED_PAIR, MaskGIT(CODED_PAIR.denoiser, 7, 3), lengths=2, end=4)


def test_padding_of_the_source_changes_nothing():
    params, batch = random_params(CODED_PAIR), TARGET | SOURCE
    inside = np.arange(6) < SOURCE["source_length"][:, None]
    same = {"source": np.where(inside, SOURCE["source"], 4 - SOURCE["source"])}
    other = {"source": 4 - SOURCE["source"]}
    samples = np.asarray(sampling.generate(IN_ROUNDS, params, KEYS, SOURCE))
    np.testing.assert_array_equal(
        sampling.generate(IN_ROUNDS, params, KEYS, SOURCE | same), samples
    )
    assert (sampling.generate(IN_ROUNDS, params, KEYS, SOURCE | other) != samples).any()
    values = [loss_of(CODED_PAIR, params, batch | source, KEYS)[0] for source in ({}, same, other)]
    assert values[0] == values[1] != values[2]


def test_devices_and_batches_change_nothing():
    params = random_params(CODED_PAIR)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    samples = sampling.generate(IN_ROUNDS, params, KEYS, SOURCE)
    chunks = sampling.generate_many(
        IN_ROUNDS, params, 0, ROWS, cond=SOURCE, micro_batch=16, mesh=mesh
    )
    many = np.concatenate([chunk.samples for chunk in chunks])
    np.testing.assert_array_equal(many, samples)


def test_what_it_refuses():
    model = PAIR
    for columns in (0, 11):
        with pytest.raises(ValueError, match=r"columns must be in 1 .. 10, the context"):
            ParallelDecoder(PAIR.network, columns)
    with pytest.raises(ValueError, match="rounds over 5 positions for a model of 7"):
        ParallelSampler(model, InOrder(model.denoiser, 5, 1))
    for lengths in (0, 8):
        with pytest.raises(ValueError, match=r"lengths must be in 1 .. 7, the table"):
            ParallelSampler(model, one_shot(model), lengths=lengths)
    ends = dataclasses.replace(model, ending="end")
    with pytest.raises(ValueError, match="several lengths are for a model that predicts"):
        ParallelSampler(ends, one_shot(ends), lengths=2)
    with pytest.raises(ValueError, match="a masked model has no latent"):
        masked_loss(CODED_PAIR, {}, TARGET, KEYS, config=MaskConfig())
