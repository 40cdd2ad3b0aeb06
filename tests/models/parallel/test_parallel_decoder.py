"""The parallel decoder: its likelihood and bounds, what it can learn at best, and its sampler."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import random_networks
from annotations import unchecked_annotations
from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.data.exact_sets import NoisyMixture, even_parity, modes
from gen_jax.models.autoregressive.losses import AutoregressiveModel
from gen_jax.models.masked.config import MaskConfig
from gen_jax.models.masked.losses import MaskedModel, infill
from gen_jax.models.masked.samplers import MaskGIT, MaskPredict, OrderedGroups
from gen_jax.models.parallel.config import LatentConfig
from gen_jax.models.parallel.losses import ParallelModel
from gen_jax.models.parallel.samplers import ParallelSampler, one_shot
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.encoder_decoder import EncoderDecoder
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.testing import check_sampler

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
FLAT = ParallelModel(TokenNetwork(FIVE), 7)
PAIR = ParallelModel(EncoderDecoder(dataclasses.replace(FIVE, memory=True), 1, True), 7)

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

loss_of = jax.jit(ParallelModel.loss, static_argnums=0)
plain_masked_loss = jax.jit(MaskedModel.loss, static_argnums=0)
log_prob = jax.jit(ParallelModel.log_prob, static_argnums=0)
cross_entropies = optax.softmax_cross_entropy_with_integer_labels


def look(state):
    """What is looked at after each step."""
    return {"tokens": state.tokens, "valid": state.valid, "added": state.context.get("added")}


def draw(sampler, params, keys, cond=None):
    """Samples, and the state after the first step by name."""
    cond = Condition(**cond or {})
    samples, states = sampling.generate(sampler, params, keys, cond, trajectory=look)
    return np.asarray(samples), {
        name: None if leaf is None else np.asarray(leaf[0]) for name, leaf in states.items()
    }


def generate(sampler, params, cond=None, keys=KEYS):
    return np.asarray(sampling.generate(sampler, params, keys, Condition(**cond or {})))


def bits_model(latent=NONE, length=4, ending="eos"):
    return ParallelModel(TokenNetwork(BITS), length, ending, latent)


def every(length):
    return np.array(list(itertools.product(range(2), repeat=length)), np.int32)


def _deviation(names):
    if names[0] == "length" or (names[0] == "latent" and "posterior" not in names):
        return 2.0 if names[-1] == "kernel" else 0.6
    return None


def random_params(model, seed=1):
    """Those of the model; without a latent they are those beside a latent of codes."""
    if isinstance(model, AutoregressiveModel):
        return random_networks.random_params(model, seed, _deviation)
    latent = CODES if model.latent == NONE else model.latent
    whole = dataclasses.replace(model, latent=latent, mask=None)
    params = random_networks.random_params(whole, seed, _deviation)
    return {name: params[name] for name in jax.eval_shape(model.init, jax.random.key(0))}


def without_latent(model, params):
    plain = dataclasses.replace(model, latent=NONE)
    return plain, {name: leaf for name, leaf in params.items() if name != "latent"}


@functools.partial(jax.jit, static_argnums=0)
def latents(model, params, batch):
    """Parameters of prior and posterior, all positions of the sequences read."""
    context = model.denoiser.condition(params["network"], batch)
    valid = jnp.ones(batch["tokens"].shape, bool)
    summary = model.summarise(params["network"], context, len(valid))
    return model.prior(params, summary), model.posterior(params, batch["tokens"], valid, context)


@functools.partial(jax.jit, static_argnums=0)
def one_shot_logits(model, params, cond, length, added=None):
    """Logits [B, L, V] of masks alone, from parameters that are not prepared."""
    blank = jnp.full((len(length), model.max_length), model.denoiser.mask)
    valid = jnp.arange(model.max_length)[None] < length[:, None]
    context = model.denoiser.condition(params["network"], cond)
    if added is not None:
        context |= {"added": added}
    return model.denoiser.logits(params["network"], blank, valid, context)


def of_code(model, params, tokens, code):
    """log p(x | z) [B], where z adds `code` [L, D] to the inputs."""
    added = jnp.broadcast_to(code[None], (len(tokens), *code.shape))
    length = jnp.full(len(tokens), model.max_length)
    logits = one_shot_logits(model, params, {}, length, added)
    return -cross_entropies(logits, tokens).sum(-1)


def of_codes(model, params, tokens):
    """log p(x | z) of all codes, float64 [B, K]."""
    values = [of_code(model, params, tokens, code) for code in params["latent"]["table"]]
    return np.stack(values, axis=1).astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def row_losses(model, params, tokens):
    """The loss of each sequence alone, and its KL."""
    keys = jax.random.split(jax.random.key(0), (len(tokens), 1))
    row = jax.vmap(lambda tokens, key: model.loss(params, {"tokens": tokens}, key))
    values, metrics = row(tokens[:, None], keys)
    return values, metrics["kl"]


@functools.partial(jax.jit, static_argnums=0)
def length_logits(model, params, cond):
    context = model.denoiser.condition(params["network"], cond)
    summary = model.summarise(params["network"], context, ROWS)
    length = cond.get("source_length", jnp.zeros(ROWS, jnp.int32))
    return model.length_logits(params, summary, length)


def test_the_loss_of_all_positions_is_minus_the_log_likelihood():
    model = dataclasses.replace(FLAT, ending="eos")
    params = random_params(model)
    likelihood = log_prob(model, params, TARGET | LABEL)
    assert np.std(likelihood) > 0.3
    value, metrics = loss_of(model, params, TARGET | LABEL, KEYS)
    np.testing.assert_allclose(value, -likelihood.sum() / TOKENS.size, rtol=1e-5)
    assert metrics == {}
    logits = one_shot_logits(model, params, LABEL, np.full(ROWS, 7))
    smooth = 0.7 * cross_entropies(logits, TOKENS) - 0.3 * jax.nn.log_softmax(logits).mean(-1)
    value, _ = loss_of(dataclasses.replace(model, smoothing=0.3), params, TARGET | LABEL, KEYS)
    np.testing.assert_allclose(value, smooth.mean(), rtol=1e-5)


def test_the_loss_with_lengths_is_that_of_sequences_alone():
    params = random_params(PAIR)
    whole = np.asarray(log_prob(PAIR, params, TARGET | SOURCE))
    rows = LENGTH == 3
    cond = {name: leaf[rows] for name, leaf in SOURCE.items()}
    alone = log_prob(PAIR, params, {"tokens": TOKENS[rows, :3]} | cond)
    np.testing.assert_allclose(whole[rows], alone, rtol=1e-5)
    of_length = cross_entropies(length_logits(PAIR, params, SOURCE), LENGTH - 1)
    value, metrics = loss_of(PAIR, params, TARGET | SOURCE, KEYS)
    np.testing.assert_allclose(metrics["length_loss"], of_length.mean(), rtol=1e-5)
    np.testing.assert_allclose(value, -whole.sum() / LENGTH.sum(), rtol=1e-5)


@pytest.mark.parametrize(("ending", "same"), [("length", 1), ("eos_masked", 1), ("eos", 0)])
def test_what_follows_eos_counts_only_where_all_positions_do(ending, same):
    model = dataclasses.replace(FLAT, ending=ending)
    params, batch = random_params(model), TARGET | LABEL
    other = batch | {"tokens": np.where(INSIDE, TOKENS, 4 - TOKENS)}
    one, two = (loss_of(model, params, some, KEYS)[0] for some in (batch, other))
    assert (one == two) == same
    if ending == "eos_masked":  # all positions are read all the same
        logits = one_shot_logits(model, params, LABEL, np.full(ROWS, 7))
        values = np.asarray(cross_entropies(logits, TOKENS))
        np.testing.assert_allclose(one, values[INSIDE].mean(), rtol=1e-5)


def test_sequences_up_to_eos_have_a_law():
    model = bits_model(ending="eos_masked")
    tokens, length = np.eye(5, 4, dtype=np.int32), np.array([1, 2, 3, 4, 4], np.int32)  # EOS is 1
    likelihood = log_prob(model, random_params(model), {"tokens": tokens, "length": length})
    assert np.exp(likelihood).sum() == pytest.approx(1, abs=1e-5)
    assert np.std(likelihood) > 0.3


@pytest.mark.parametrize("seed", [1, 2])
def test_the_bound_is_off_by_the_kl_from_the_exact_posterior(seed):
    model, tokens = bits_model(CODES), every(4)
    params = random_params(model, seed)
    likelihood = np.asarray(log_prob(model, params, {"tokens": tokens}), np.float64)
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
class ExactPosterior(ParallelModel):
    """With p(z | x) in place of the network that learns it."""

    def posterior(self, params, tokens, valid, context, keys=None):
        given = [of_code(self, params, tokens, code) for code in params["latent"]["table"]]
        summary = self.summarise(params["network"], context, len(tokens))
        return self.prior(params, summary) + jnp.stack(given, axis=1)


def test_the_bound_is_tight_with_the_exact_posterior():
    model, tokens = bits_model(CODES), every(4)
    params = random_params(model)
    exact = ExactPosterior(model.network, 4, "eos", CODES)
    values, kl = row_losses(exact, params, tokens)
    np.testing.assert_allclose(4 * values, -log_prob(model, params, {"tokens": tokens}), rtol=1e-5)
    assert kl.max() > 0.1


def test_the_kl_of_gaussians():
    model, tokens = bits_model(GAUSSIAN), every(4)
    params = random_params(model)
    prior, posterior = (
        np.asarray(x, np.float64) for x in latents(model, params, {"tokens": tokens})
    )
    (m, s), (m0, s0) = ((x[:, :2], np.exp(x[:, 2:])) for x in (posterior, prior))
    expected = 0.5 * (s / s0 + (m - m0) ** 2 / s0 - 1 - np.log(s / s0)).sum(-1)
    values, kl = row_losses(model, params, tokens)
    np.testing.assert_allclose(kl, expected, rtol=1e-4)
    assert expected.min() > 0.05
    # Where the posterior is the prior the KL is 0; without variance the latent is the mean.
    mean = jnp.array([0.7, -0.4])
    latent = params["latent"] | {
        "posterior_kernel": 0 * params["latent"]["posterior_kernel"],
        "prior_kernel": 0 * params["latent"]["prior_kernel"],
        "prior_bias": jnp.array([*mean, -60, -60]),
    }
    values, kl = row_losses(model, params | {"latent": latent}, tokens)
    np.testing.assert_allclose(kl, 0, atol=1e-6)
    added = jnp.einsum("z,zld->ld", mean, latent["table"])
    np.testing.assert_allclose(4 * values, -of_code(model, params, tokens, added), rtol=1e-5)
    with pytest.raises(ValueError, match="no closed form"):
        model.log_prob(params, {"tokens": tokens})


def test_free_nats_are_not_punished():
    model, batch, keys = bits_model(CODES), {"tokens": every(4)}, sampling.sample_keys(0, 0, 16)
    free = dataclasses.replace(model, latent=dataclasses.replace(CODES, free_nats=5.0))
    params = random_params(model)
    # Where all codes say the same, nothing but the KL is left to learn.
    params = params | {"latent": params["latent"] | {"table": 0 * params["latent"]["table"]}}

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
    def slopes(model, kernel):
        latent = params["latent"] | {"posterior_kernel": kernel}
        return model.loss(params | {"latent": latent}, batch, keys)

    kernel = params["latent"]["posterior_kernel"]
    (value, metrics), gradient = slopes(model, kernel)
    (floored, same), none = slopes(free, kernel)
    np.testing.assert_allclose(metrics["kl"], same["kl"], rtol=1e-5)
    assert 0.01 < metrics["kl"] < 4
    np.testing.assert_allclose(4 * (floored - value), 5 - metrics["kl"], rtol=1e-4)
    assert np.abs(gradient).max() > 1e-4
    assert np.abs(none).max() < 1e-6


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
    model = dataclasses.replace(FLAT, mask=MaskConfig())
    params, batch = random_params(model), TARGET | LABEL
    value, metrics = loss_of(model, params, batch, KEYS)
    inner = jax.vmap(lambda key: jax.random.split(key, 2))(KEYS)[:, 1]
    plain, _ = plain_masked_loss(model.denoiser, params["network"], batch, inner)
    of_length = cross_entropies(length_logits(FLAT, params, LABEL), LENGTH - 1)
    np.testing.assert_allclose(metrics["length_loss"], of_length.mean(), rtol=1e-5)
    np.testing.assert_allclose(value, plain + of_length.sum() / LENGTH.sum(), rtol=1e-5)


FOUR = every(4)
TRAINED = dataclasses.replace(BITS, context=5, extra_inputs=1)
DECODER = ParallelModel(TokenNetwork(TRAINED), 4, "eos")
CODED = dataclasses.replace(DECODER, latent=LatentConfig("categorical", 2))
CAUSAL = AutoregressiveModel(TokenNetwork(dataclasses.replace(TRAINED, causal=True)))
MIXTURE = NoisyMixture(2, 4, 2, 0.1).data
SKEWED = modes((0.7, 0.3), 4)
PARITY = even_parity(4)


def sequence_loss(model, params, tokens, key):
    """The loss of one sequence, in nats."""
    return 4 * model.loss(params, {"tokens": tokens[None]}, key[None])[0]


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
    prob = np.exp(log_prob(DECODER, params, {"tokens": FOUR}))
    drawn = prob @ (FOUR[:, :, None] == np.arange(2)).reshape(16, -1)
    np.testing.assert_allclose(drawn.reshape(4, 2), dist.marginals, atol=0.01)
    assert gap_of(np.log(prob), dist) == pytest.approx(1, abs=0.02)


def test_one_after_the_other_there_is_no_gap():
    params, _ = train(CAUSAL, MIXTURE)
    assert gap_of(jax.jit(CAUSAL.log_prob)(params, {"tokens": FOUR}), MIXTURE) < 0.02


@pytest.mark.parametrize(("dist", "closed"), [(MIXTURE, True), (PARITY, False)])
def test_a_latent_closes_the_gap_of_as_many_modes_as_codes(dist, closed):
    params, values = train(CODED, dist)
    likelihood = log_prob(CODED, params, {"tokens": FOUR})
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
    few = {"tokens": every(3)} | {name: leaf[:8] for name, leaf in cond.items()}
    law = np.exp(np.asarray(log_prob(model, params, few), np.float64))
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-5)
    keys = sampling.sample_keys(0, 0, DRAWS)
    drawn = generate(ParallelSampler(model, one_shot(model)), params, cond, keys)
    assert p_value(drawn, law / law.sum()) > 1e-4
    product = product_of(law @ every(3))
    if latent == NONE:
        np.testing.assert_allclose(law, product, rtol=1e-4)
    else:
        assert p_value(drawn, product) < 1e-6
    if label is not None:
        other = log_prob(model, params, few | {"label": np.zeros(8, np.int32)})
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
    drawn = generate(ParallelSampler(model, one_shot(model, 3.0)), params, keys=keys)
    assert p_value(drawn, warm) > 1e-4
    assert p_value(drawn, law) < 1e-6


def test_the_gaussian_latent_has_the_law_of_its_prior():
    model = bits_model(GAUSSIAN, 3)
    params, keys = random_params(model, 3), sampling.sample_keys(0, 0, 5_000)
    sampler = ParallelSampler(model, one_shot(model), latent_temperature=0.5)
    _, state = draw(sampler, params, keys)
    table, bias = params["latent"]["table"], params["latent"]["prior_bias"]
    z = state["added"].reshape(len(keys), -1) @ np.linalg.pinv(table.reshape(2, -1))
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
    samples, state = draw(cold, params, KEYS, cond)
    prior, _ = latents(model, params, TARGET)
    table = params["latent"]["table"]
    if latent == GAUSSIAN:
        added = jnp.einsum("bz,zld->bld", prior[:, :2], table)
    else:
        added = table[prior.argmax(-1)]
    np.testing.assert_allclose(state["added"], added, atol=1e-5)
    logits = one_shot_logits(model, params, {}, LENGTH, added)
    best = np.where(INSIDE, logits.argmax(-1), 0)
    np.testing.assert_array_equal(samples, best)
    other, _ = draw(cold, params, sampling.sample_keys(9, 0, ROWS), cond)
    np.testing.assert_array_equal(other, samples)


ALONE = ParallelSampler(FLAT, one_shot(FLAT), eos=4)


def test_lengths_come_from_the_head_and_eos_fills_what_follows():
    params = random_params(FLAT)
    logits = length_logits(FLAT, params, LABEL)
    likeliest = np.asarray(logits.argmax(-1)) + 1
    assert len(set(likeliest.tolist())) > 1
    assert likeliest.min() < 7
    samples, state = draw(ALONE, params, KEYS, LABEL)
    np.testing.assert_array_equal(state["valid"], np.arange(7) < likeliest[:, None])
    ended = 0
    for free, row, length in zip(state["tokens"], samples, likeliest, strict=True):
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
        samples, state = draw(ALONE, params, keys, LABEL | {"length": length})
        drawn, valid = state["tokens"], np.arange(7) < length[:, None]
        np.testing.assert_array_equal(state["valid"], valid)
        of_all = jax.nn.log_softmax(one_shot_logits(FLAT, params, LABEL, length))
        own = np.take_along_axis(np.asarray(of_all), drawn[..., None], axis=-1)[..., 0]
        scores.append(np.where(valid, own, 0).sum(-1) / length)
        tokens.append(samples)
        assert (tokens[-1][~valid] == 4).all()
    best = np.argmax(scores, axis=0)
    assert len(set(best.tolist())) == several
    samples = generate(dataclasses.replace(ALONE, lengths=several), params, LABEL)
    np.testing.assert_array_equal(samples, np.stack(tokens)[best, np.arange(ROWS)])


@pytest.mark.parametrize("several", [1, 4])
def test_predicted_lengths_hold_the_tokens_that_are_given(several):
    params = random_params(FLAT)
    likeliest = np.asarray(length_logits(FLAT, params, LABEL)).argmax(-1) + 1
    place = 5
    assert (likeliest <= place).any()
    assert (likeliest > place).any()
    given = infill(FLAT.denoiser, 7, [[None] * place + [3]] * ROWS)
    sampler = ParallelSampler(FLAT, MaskPredict(FLAT.denoiser, 7, 3), lengths=several)
    samples, state = draw(sampler, params, KEYS, LABEL | given.fields())
    assert (samples[:, place] == 3).all()
    lengths = state["valid"].sum(-1).reshape(ROWS, several)
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


def test_a_shorter_sampler_uses_the_same_parameters():
    params, sampler = random_params(FLAT), ParallelSampler(FLAT, one_shot(FLAT, 0.0, 4))
    whole = length_logits(FLAT, params, LABEL)
    samples, state = draw(sampler, params, KEYS, LABEL)
    length = np.asarray(whole[:, :4]).argmax(-1) + 1
    np.testing.assert_array_equal(state["valid"].sum(-1), length)
    logits = one_shot_logits(FLAT, params, LABEL, length.astype(np.int32))[:, :4]
    best = np.where(np.arange(4) < length[:, None], logits.argmax(-1), 0)
    np.testing.assert_array_equal(samples, best)


def test_lengths_share_the_latent_and_given_tokens_stay():
    model = bits_model(CODES, 5, "length")
    params = random_params(model)
    sampler = ParallelSampler(model, OrderedGroups(model.denoiser, 5, 3), lengths=2)
    cond = infill(model.denoiser, 5, [[None, 1, None, 0]] * ROWS, [4, 5] * (ROWS // 2))
    samples, state = draw(sampler, params, KEYS, cond.fields())
    added = state["added"].reshape(ROWS, 2, -1)
    np.testing.assert_array_equal(added[:, 0], added[:, 1])
    assert len(np.unique(added[:, 0], axis=0)) == 3
    assert samples.dtype == np.int32
    assert (samples[:, [1, 3]] == [1, 0]).all()
    assert (samples[::2, 4] == 0).all()
    assert samples[1::2, 4].any()
    assert samples.max() == 1


CODED_PAIR = dataclasses.replace(PAIR, latent=CODES)
IN_ROUNDS = ParallelSampler(CODED_PAIR, MaskGIT(CODED_PAIR.denoiser, 7, 3), lengths=2, eos=4)


def test_padding_of_the_source_changes_nothing():
    params, batch = random_params(CODED_PAIR), TARGET | SOURCE
    inside = np.arange(6) < SOURCE["source_length"][:, None]
    same = {"source": np.where(inside, SOURCE["source"], 4 - SOURCE["source"])}
    other = {"source": 4 - SOURCE["source"]}
    samples = generate(IN_ROUNDS, params, SOURCE)
    np.testing.assert_array_equal(generate(IN_ROUNDS, params, SOURCE | same), samples)
    assert (generate(IN_ROUNDS, params, SOURCE | other) != samples).any()
    values = [loss_of(CODED_PAIR, params, batch | source, KEYS)[0] for source in ({}, same, other)]
    assert values[0] == values[1] != values[2]


def test_the_laws_of_all_samplers():
    cond = Condition(**{name: leaf[:6] for name, leaf in SOURCE.items()})
    check_sampler(IN_ROUNDS, random_params(CODED_PAIR), cond, uncounted=1)  # the latent


def test_conditions_are_those_of_the_model():
    given = ("given", "is_given")
    assert ALONE.conditions == (*given, "length", "label")
    assert IN_ROUNDS.conditions == (*given, "length", "label", "source", "source_length")
    model = bits_model()
    assert ParallelSampler(model, one_shot(model)).conditions == (*given, "label")


EOS = dataclasses.replace(PAIR, ending="eos")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ParallelModel(PAIR.network, 0), r"max_length must be in 1 .. 10, the context"),
        (lambda: ParallelModel(PAIR.network, 11), r"max_length must be in 1 .. 10, the context"),
        (lambda: ParallelModel(PAIR.network, 7, "end"), "ending must be one of 'length', 'eos'"),
        (lambda: ParallelModel(CAUSAL.network, 4), "set causal to false"),
        (lambda: dataclasses.replace(CODED_PAIR, mask=MaskConfig()), "masked model has no latent"),
        (lambda: ParallelModel(PAIR.network, 7, "eos_masked", mask=MaskConfig()), "behind EOS"),
        (lambda: dataclasses.replace(FLAT, mask=MaskConfig(halton=0.5)), "set mask.halton to 0"),
        (lambda: ParallelModel(PAIR.network, 7, smoothing=1.0), r"smoothing must be in \[0, 1\)"),
        (lambda: LatentConfig("codes"), "kind must be one of 'none', 'gaussian', 'categorical'"),
        (lambda: LatentConfig(size=0), "size and layers of the latent must be at least 1"),
        (lambda: LatentConfig(free_nats=-1.0), "free_nats must not be negative, got -1.0"),
        (
            lambda: ParallelSampler(PAIR, OrderedGroups(PAIR.denoiser, 8, 1)),
            "rounds over 8 positions for a model of at most 7",
        ),
        (lambda: ParallelSampler(PAIR, one_shot(FLAT)), "a sampler of another network"),
        (lambda: ParallelSampler(PAIR, one_shot(PAIR), lengths=0), r"in 1 .. 7, the positions"),
        (lambda: ParallelSampler(PAIR, one_shot(PAIR), lengths=8), r"in 1 .. 7, the positions"),
        (lambda: ParallelSampler(EOS, one_shot(EOS), lengths=2), "several lengths are for"),
        (lambda: ParallelSampler(PAIR, one_shot(PAIR), eos=5), r"eos must be in 0 .. 4, got 5"),
        (
            lambda: ParallelSampler(PAIR, one_shot(PAIR), latent_temperature=-1.0),
            "latent_temperature must not be negative, got -1.0",
        ),
    ],
)
@unchecked_annotations()
def test_what_it_refuses(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("cond", "text"),
    [
        ({}, "give the condition 'source'"),
        (SOURCE | {"length": np.full(ROWS, 8)}, "lengths must be in 1 to 7, got 8 to 8"),
        (SOURCE | {"label": np.full(ROWS, 4)}, "labels must be in 0 to 3, got 4 to 4"),
        (SOURCE | {"prompt": np.zeros((ROWS, 1), int)}, "no use for the condition 'prompt'"),
    ],
)
@unchecked_annotations()
def test_conditions_that_are_refused(cond, text):
    with pytest.raises(ValueError, match=text):
        generate(IN_ROUNDS, random_params(CODED_PAIR), cond)


def test_other_parameters_are_refused():
    with pytest.raises(ValueError, match=r"do not fit the ParallelModel: latent\..* is missing"):
        generate(IN_ROUNDS, random_params(PAIR), SOURCE)


def test_a_masked_model_has_no_exact_likelihood():
    model = dataclasses.replace(FLAT, mask=MaskConfig())
    with pytest.raises(ValueError, match="use bound_terms"):
        model.log_prob(random_params(model), TARGET)
