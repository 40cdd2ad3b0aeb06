"""The forward process and the bound against closed forms and brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gen_jax.models.diffusion import losses as diffusion
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.losses import Schedule, at

LINEAR = DiffusionConfig()
COSINE = DiffusionConfig(schedule="cosine")
KEYS = jax.random.split(jax.random.key(0), 8)


def gaussian_oracle(config, deviation):
    """The exact prediction for pixels drawn from N(0, deviation^2)."""
    schedule = Schedule(config)

    def network(params, x, t, label=None, keys=None):
        alpha_bar = at(schedule.alpha_bar, t)
        total = alpha_bar * deviation**2 + 1 - alpha_bar
        epsilon = jnp.sqrt(1 - alpha_bar) * x / total
        x0 = jnp.sqrt(alpha_bar) * deviation**2 * x / total
        v = jnp.sqrt(alpha_bar) * epsilon - jnp.sqrt(1 - alpha_bar) * x0
        return {"epsilon": epsilon, "x0": x0, "v": v}[config.prediction]

    return network


def test_known_constants_of_the_schedules():
    assert Schedule(LINEAR).alpha_bar[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    assert Schedule(LINEAR).beta[[0, -1]] == pytest.approx([1e-4, 0.02])
    cosine = Schedule(COSINE)
    assert cosine.beta.max() == 0.999
    middle = np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert cosine.alpha_bar[499] == pytest.approx(middle, rel=1e-9)


@pytest.mark.parametrize("config", [LINEAR, COSINE])
def test_signal_falls_all_the_way(config):
    alpha_bar = Schedule(config).alpha_bar
    assert (np.diff(alpha_bar) < 0).all()
    assert alpha_bar[0] > 0.999 > 1e-3 > alpha_bar[-1] > 0


@pytest.mark.parametrize("config", [LINEAR, COSINE])
def test_posterior_is_the_product_of_its_two_gaussians(config):
    schedule, x0, x = Schedule(config), 0.3, -1.2
    weights = diffusion.posterior_mean_weights(schedule.alpha_bar, schedule.alpha_bar_before)
    for t in (1, 10, 500, 998):
        # q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0).
        alpha, before = 1 - schedule.beta[t], schedule.alpha_bar_before[t]
        precision = alpha / schedule.beta[t] + 1 / (1 - before)
        mean = np.sqrt(alpha) * x / schedule.beta[t] + np.sqrt(before) * x0 / (1 - before)
        assert schedule.posterior_variance[t] == pytest.approx(1 / precision, rel=1e-9)
        assert weights[0][t] * x0 + weights[1][t] * x == pytest.approx(mean / precision, rel=1e-9)
    assert schedule.posterior_variance[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_the_target_gives_the_clean_image_back(prediction):
    config = DiffusionConfig(prediction=prediction, schedule="cosine")
    schedule = Schedule(config)
    x0, noise = (jax.random.normal(jax.random.key(i), (8, 4, 4, 3)) for i in range(2))
    t = jnp.array([0, 1, 50, 200, 500, 700, 800, 900])
    x = diffusion.diffuse(schedule, x0, t, noise)
    output = diffusion.target(config, schedule, x0, t, noise)
    np.testing.assert_allclose(
        diffusion.predicted_x0(config, schedule, x, t, output), x0, atol=2e-5
    )


@pytest.mark.parametrize(
    ("deviation", "floor"), [(0.5, 0.173053), (1.0, 0.275513), (2.0, 0.395407)]
)
def test_loss_of_the_exact_predictor_is_the_floor(deviation, floor):
    alpha_bar = Schedule(LINEAR).alpha_bar
    exact = alpha_bar * deviation**2 / (alpha_bar * deviation**2 + 1 - alpha_bar)
    assert exact.mean() == pytest.approx(floor, abs=1e-6)
    x = deviation * jax.random.normal(jax.random.key(1), (4096, 8, 8, 1))
    network = gaussian_oracle(LINEAR, deviation)
    keys = jax.random.split(jax.random.key(2), 4096)
    # Images are given on the scale of uint8, which the loss maps to [-1, 1].
    loss, _ = jax.jit(
        lambda batch: diffusion.loss(LINEAR, network, {}, batch, keys)
    )({"image": (x + 1) * 127.5})  # fmt: skip
    assert loss.item() == pytest.approx(floor, abs=4 * exact.std() / np.sqrt(4096) + 1e-3)


def test_decoder_is_a_distribution_over_the_256_levels():
    levels = jnp.arange(256) / 127.5 - 1
    for mean in (-1.4, -0.7, 0.0, 0.4321, 1.0, 2.0):
        for scale in (1e-3, 0.02, 0.3, 2.0):
            log_mass = diffusion.discretised_log_likelihood(levels, mean, np.log(scale))
            assert np.isfinite(log_mass).all()
            assert np.exp(np.float64(log_mass)).sum() == pytest.approx(1, abs=3e-4)


def test_decoder_agrees_with_the_normal_distribution():
    x, mean, scale = np.float64(50 / 127.5 - 1), -0.5, 0.07
    exact = stats.norm.logcdf(x + 1 / 255, mean, scale) + np.log1p(
        -stats.norm.cdf(x - 1 / 255, mean, scale) / stats.norm.cdf(x + 1 / 255, mean, scale)
    )
    got = diffusion.discretised_log_likelihood(jnp.float32(x), mean, np.log(scale))
    assert float(got) == pytest.approx(exact, rel=1e-3)


def test_divergence_of_normals():
    p, q = stats.norm(0.3, 0.8), stats.norm(-0.5, 1.7)
    exact = p.expect(lambda x: p.logpdf(x) - q.logpdf(x))
    got = diffusion.normal_divergence(0.3, 2 * np.log(0.8), -0.5, 2 * np.log(1.7))
    assert float(got) == pytest.approx(exact, rel=1e-5)


def test_bound_of_a_network_that_knows_the_image():
    # With the clean image known and beta-tilde as the variance, every reverse step is exact:
    # what is left is the prior and a decoder centred on the image.
    config = DiffusionConfig(prediction="x0", variance="fixed_small", timesteps=50)
    images = jax.random.randint(jax.random.key(3), (8, 4, 4, 3), 1, 255).astype(jnp.uint8)
    signal = diffusion.to_signal(images)
    report = diffusion.bits_per_dim(
        config, lambda params, x, t, label, keys: signal, {}, {"image": images}, KEYS
    )
    np.testing.assert_allclose(report["rate"], 0, atol=1e-4)
    scale = np.exp(0.5 * Schedule(config).posterior_log_variance[0])
    mass = stats.norm.cdf(1 / 255, 0, scale) - stats.norm.cdf(-1 / 255, 0, scale)
    np.testing.assert_allclose(report["decoder"], -np.log2(mass), rtol=1e-3)
    alpha_bar = Schedule(config).alpha_bar[-1]
    prior = 0.5 * (
        -np.log1p(-alpha_bar) - alpha_bar + alpha_bar * np.asarray(signal, np.float64) ** 2
    )
    np.testing.assert_allclose(report["prior"], prior.mean((1, 2, 3)) / np.log(2), rtol=1e-3)
    np.testing.assert_allclose(
        report["bits_per_dim"], report["prior"] + report["rate"] + report["decoder"], rtol=1e-6
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_bound_is_above_the_entropy_and_close_for_the_exact_predictor(prediction):
    # Pixels are rounded draws of a normal: their entropy is that of the normal less log of the
    # bin. For normal data beta is the best variance (2006.11239 section 3.2), and a thousand
    # small steps of the exact predictor then lose little; with beta-tilde they lose 0.7 bits.
    deviation = 0.25
    config = DiffusionConfig(prediction=prediction, variance="fixed_large")
    x = deviation * jax.random.normal(jax.random.key(4), (64, 8, 8, 1))
    images = jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)
    entropy = (np.log(deviation * np.sqrt(2 * np.pi * np.e)) - np.log(2 / 255)) / np.log(2)
    keys = jax.random.split(jax.random.key(5), 64)
    bound = jax.jit(
        lambda batch: diffusion.bits_per_dim(
            config, gaussian_oracle(config, deviation), {}, batch, keys
        )
    )
    bits = np.asarray(bound({"image": images})["bits_per_dim"], np.float64)
    error = bits.std() / np.sqrt(len(bits))
    assert entropy - 4 * error < bits.mean() < entropy + 0.15 + 4 * error


def test_stratified_draws_estimate_the_full_sum():
    config = DiffusionConfig(timesteps=100, variance="fixed_large")
    x = 0.5 * jax.random.normal(jax.random.key(6), (128, 4, 4, 1))
    batch = {"image": jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)}
    keys = jax.random.split(jax.random.key(7), 128)

    def rate(draws):
        report = diffusion.bits_per_dim(
            config, gaussian_oracle(config, 0.4), {}, batch, keys, draws=draws
        )
        return np.asarray(report["rate"], np.float64)

    full, estimate = rate(None), rate(10)
    error = np.hypot(full.std(), estimate.std()) / np.sqrt(len(full))
    assert abs(full.mean() - estimate.mean()) < 4 * error


def test_learned_variance_spans_the_two_fixed_ones():
    config = DiffusionConfig(variance="learned")
    schedule, t = Schedule(config), jnp.array([0, 1, 500, 999])
    ones = jnp.ones((4, 2, 2, 3))
    for sign, fixed in ((1, np.log(schedule.beta)), (-1, schedule.posterior_log_variance)):
        got = diffusion.reverse_log_variance(config, schedule, t, sign * ones)
        np.testing.assert_allclose(got, jnp.broadcast_to(at(fixed, t), ones.shape), rtol=1e-5)
    with pytest.raises(ValueError, match="second half"):
        diffusion.reverse_log_variance(config, schedule, t)


def test_the_bound_trains_the_variance_alone():
    config = DiffusionConfig(variance="learned", bound_weight=1.0, timesteps=10)
    images = jax.random.randint(jax.random.key(8), (8, 4, 4, 3), 0, 256).astype(jnp.uint8)

    def network(params, x, t, label, keys):
        return jnp.concatenate([params["mean"] * x, params["variance"] + 0 * x], axis=-1)

    def gradient(weight):
        changed = dataclasses.replace(config, bound_weight=weight)
        params = {"mean": jnp.float32(0.5), "variance": jnp.float32(0.2)}
        return jax.grad(
            lambda p: diffusion.loss(changed, network, p, {"image": images}, KEYS)[0]
        )(params)  # fmt: skip

    with_bound, without = jax.device_get((gradient(1.0), gradient(0.0)))
    assert with_bound["mean"] == pytest.approx(without["mean"], rel=1e-6)
    assert without["variance"] == 0 != with_bound["variance"]


def test_labels_are_hidden_at_the_rate_asked_for():
    config = DiffusionConfig(label_dropout=0.25)
    seen = []

    def network(params, x, t, label, keys):
        seen.append(label)
        return x

    keys = jax.random.split(jax.random.key(9), 4000)
    batch = {"image": jnp.zeros((4000, 1, 1, 1), jnp.uint8), "label": jnp.full(4000, 3)}
    diffusion.loss(config, network, {}, batch, keys)
    assert set(np.unique(seen[0])) == {-1, 3}
    share = np.mean(np.asarray(seen[0]) == -1)
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)


def test_noise_of_an_example_does_not_know_its_batch():
    config = DiffusionConfig()
    images = jax.random.randint(jax.random.key(10), (8, 4, 4, 3), 0, 256).astype(jnp.uint8)

    def loss(rows):
        network = gaussian_oracle(config, 0.5)
        return diffusion.loss(config, network, {}, {"image": images[rows]}, KEYS[rows])[0].item()

    whole = loss(slice(0, 8))
    halves = (loss(slice(0, 4)) + loss(slice(4, 8))) / 2
    assert whole == pytest.approx(halves, rel=1e-6)
