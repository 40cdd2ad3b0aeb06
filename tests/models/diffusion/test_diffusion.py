"""The forward process, the loss and the bound against closed forms and brute force."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_networks import FunctionNetwork, GaussianNetwork
from scipy import stats

from annotations import unchecked_annotations
from gen_jax.models.diffusion import DiffusionConfig, DiffusionModel, Schedule
from gen_jax.models.diffusion import process as forward
from gen_jax.models.diffusion import vlb as bound
from gen_jax.models.diffusion.process import at
from gen_jax.models.diffusion.schedule import posterior_mean_weights, step_variances, x0_weights

LINEAR = DiffusionConfig()
COSINE = DiffusionConfig(schedule="cosine")
SCALED = DiffusionConfig(schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
KEYS = jax.random.split(jax.random.key(0), 8)


def to_levels(x):
    """Signals around 0 as uint8 images."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


def test_importing_what_the_command_line_needs_loads_no_jax():
    code = (
        "import sys\n"
        "from gen_jax.models.diffusion import DDIM, DiffusionConfig, Solver, TimeGrid, Schedule\n"
        "DDIM(steps=3).table(DiffusionConfig())\n"
        "assert not {'jax', 'flax', 'kernels'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "sigmoid"}, "schedule must be one of 'linear', 'scaled_linear', 'cos"),
        ({"prediction": "eps"}, "prediction must be one of 'epsilon', 'x0', 'v', got 'eps'"),
        ({"variance": "large"}, "variance must be one of"),
        ({"timesteps": 0}, "timesteps must be at least 1"),
        ({"timesteps": 10.0}, "timesteps must be a whole number"),
        ({"beta_start": 0.5}, "need 0 < beta_start <= beta_end < 1"),
        ({"beta_end": float("nan")}, "beta_end must be finite"),
        ({"time_shift": 0.0}, "time_shift must be positive"),
        ({"time_shift": 2.0, "variance": "learned"}, "time_shift must be 1 where the variance is"),
        ({"reference": -1}, "reference must not be negative, got -1"),
        ({"vlb_weight": -1.0}, "vlb_weight must not be negative"),
        ({"label_dropout": 1.0}, r"label_dropout must be in \[0, 1\)"),
    ],
)
def test_a_process_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**values)


@unchecked_annotations()
def test_a_model_that_cannot_be():
    with pytest.raises(ValueError, match="shape must be a tuple of 3"):
        DiffusionModel(GaussianNetwork(LINEAR), LINEAR, (8, 8))
    with pytest.raises(ValueError, match="shape must be"):
        DiffusionModel(GaussianNetwork(LINEAR), LINEAR, (8, 8, 0))
    with pytest.raises(ValueError, match="prediction must be"):
        x0_weights("eps", np.ones(3))


def test_known_constants_of_the_schedules():
    assert Schedule(LINEAR).alpha_bar[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    assert Schedule(LINEAR).beta[[0, -1]] == pytest.approx([1e-4, 0.02])
    scaled = Schedule(SCALED)
    assert scaled.beta[[0, -1]] == pytest.approx([0.0015, 0.0195])
    np.testing.assert_allclose(np.diff(np.sqrt(scaled.beta), n=2), 0, atol=1e-15)
    cosine = Schedule(COSINE)
    assert cosine.beta.max() == 0.999
    middle = np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert cosine.alpha_bar[499] == pytest.approx(middle, rel=1e-9)


@pytest.mark.parametrize("process", [LINEAR, COSINE])
def test_signal_falls_all_the_way(process):
    alpha_bar = Schedule(process).alpha_bar
    assert (np.diff(alpha_bar) < 0).all()
    assert alpha_bar[0] > 0.999 > 1e-3 > alpha_bar[-1] > 0


@pytest.mark.parametrize("process", [LINEAR, COSINE, SCALED])
def test_posterior_is_the_product_of_its_two_gaussians(process):
    schedule, x0, x = Schedule(process), 0.3, -1.2
    weights = posterior_mean_weights(schedule.alpha_bar, schedule.alpha_bar_before)
    for t in (1, 10, 500, 998):
        # q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0).
        alpha, before = 1 - schedule.beta[t], schedule.alpha_bar_before[t]
        precision = alpha / schedule.beta[t] + 1 / (1 - before)
        mean = np.sqrt(alpha) * x / schedule.beta[t] + np.sqrt(before) * x0 / (1 - before)
        assert schedule.posterior_variance[t] == pytest.approx(1 / precision, rel=1e-9)
        assert weights[0][t] * x0 + weights[1][t] * x == pytest.approx(mean / precision, rel=1e-9)
    assert schedule.posterior_variance[0] == pytest.approx(0, abs=1e-12)
    steps = step_variances(schedule.alpha_bar, schedule.alpha_bar_before)
    np.testing.assert_allclose(steps[0], schedule.posterior_variance, rtol=1e-6, atol=1e-15)
    np.testing.assert_allclose(steps[1], schedule.beta, rtol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_the_target_gives_the_clean_image_back(prediction):
    schedule = Schedule(DiffusionConfig(prediction=prediction, schedule="cosine"))
    x0, noise = (jax.random.normal(jax.random.key(i), (8, 4, 4, 3)) for i in range(2))
    t = jnp.array([0, 1, 50, 200, 500, 700, 800, 900])
    x = forward.diffuse(schedule, x0, t, noise)
    output = forward.target(schedule, x0, t, noise)
    np.testing.assert_allclose(forward.predicted_x0(schedule, x, t, output), x0, atol=2e-5)


@pytest.mark.parametrize("process", [LINEAR, COSINE])
def test_stable_targets_are_means_given_the_noisy_image(process):
    """By the weights q(x_t | x_i) in float64, over the image itself and others that are no copy."""
    schedule, shape = Schedule(process), (3, 2, 2, 1)
    x0, noise = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    others = jax.random.normal(jax.random.key(2), (5, 2, 2, 1)).at[3].set(x0[1])
    allowed = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
    for step in (0, 300, 600, 999):
        t = jnp.full(3, step)
        x = forward.diffuse(schedule, x0, t, noise)
        got = jax.jit(forward.stable_x0, static_argnums=0)(schedule, x0, x, t, others, allowed)
        alpha_bar = schedule.alpha_bar[step]
        for i in range(3):
            kept = [np.asarray(o, np.float64) for o, a in zip(others, allowed[i], strict=True) if a]
            images = [np.asarray(x0[i], np.float64)]
            images += [image for image in kept if (image != images[0]).any()]
            distance = [((x[i] - np.sqrt(alpha_bar) * image) ** 2).sum() for image in images]
            weights = np.exp(-0.5 * (np.array(distance) - min(distance)) / (1 - alpha_bar))
            mean = sum(w * image for w, image in zip(weights / weights.sum(), images, strict=True))
            np.testing.assert_allclose(got[i], mean, atol=1e-4)
        if step == 0:
            np.testing.assert_allclose(got, x0, atol=1e-5)
    np.testing.assert_array_equal(got[2], x0[2])


def test_the_noise_between_two_images_is_what_diffused_one():
    schedule, t = Schedule(COSINE), jnp.array([0, 500, 990])
    x0, noise = (jax.random.normal(jax.random.key(i), (3, 2, 2, 1)) for i in range(2))
    x = forward.diffuse(schedule, x0, t, noise)
    np.testing.assert_allclose(forward.noise_between(schedule, x0, x, t), noise, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_stable_targets_of_a_whole_set_are_the_exact_predictors(prediction):
    """With all images as reference the loss of the exact denoiser of the set is zero."""
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 1), np.uint8)
    process = DiffusionConfig(prediction=prediction, schedule="cosine", reference=6)
    schedule, signal = Schedule(process), jnp.asarray(images, jnp.float32) / 127.5 - 1

    def denoise(params, x, t, label=None, keys=None):
        square = jnp.square(x[:, None] - at(np.sqrt(schedule.alpha_bar), t)[:, None] * signal[None])
        variance = at(1 - schedule.alpha_bar, t)[:, 0, 0]
        weights = jax.nn.softmax(-0.5 * square.sum((2, 3, 4)) / variance, axis=1)
        x0 = jnp.einsum("bn,nhwc->bhwc", weights, signal)
        return forward.target(schedule, x0, t, forward.noise_between(schedule, x0, x, t))

    keys = jax.random.split(jax.random.key(0), 600)
    batch = {"image": np.repeat(images, 100, 0), "reference": images}
    exact = DiffusionModel(FunctionNetwork(denoise), process, (2, 2, 1))
    assert exact.loss({}, batch, keys)[0] < 1e-5
    alone = dataclasses.replace(exact, process=dataclasses.replace(process, reference=0))
    assert alone.loss({}, batch, keys)[0] > 0.01
    assert (exact.shared, alone.shared) == (("reference",), ())
    with pytest.raises(ValueError, match='the batch needs "reference" images'):
        exact.loss({}, {"image": images}, keys[:6])


def test_loss_of_the_exact_predictor_is_the_floor():
    alpha_bar = Schedule(LINEAR).alpha_bar
    model = DiffusionModel(GaussianNetwork(LINEAR), LINEAR, (8, 8, 1))
    unit = jax.random.normal(jax.random.key(1), (4096, 8, 8, 1))
    keys = jax.random.split(jax.random.key(2), 4096)

    @jax.jit
    def loss(deviation):
        # Images are given on the scale of uint8, which the loss maps to [-1, 1]; rounding to it
        # adds a variance of 1e-5 at most.
        images = (deviation * unit + 1) * 127.5
        batch = {"image": jnp.round(images).astype(jnp.int32)}
        return model.loss({"deviation": deviation}, batch, keys)

    for deviation, floor in ((0.5, 0.173053), (1.0, 0.275513), (2.0, 0.395407)):
        exact = alpha_bar * deviation**2 / (alpha_bar * deviation**2 + 1 - alpha_bar)
        assert exact.mean() == pytest.approx(floor, abs=1e-6)
        value, metrics = loss(jnp.float32(deviation))
        assert value.item() == pytest.approx(floor, abs=4 * exact.std() / np.sqrt(4096) + 1e-3)
        assert metrics == {}


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shifted_times_have_their_density(shift):
    """The loss of the exact predictor is a mean over times, of which each has a known share."""
    process = DiffusionConfig(timesteps=20, beta_end=0.3, time_shift=shift)
    alpha_bar = Schedule(process).alpha_bar
    exact = alpha_bar  # what is left of the noise, for pixels of unit variance
    ends = np.arange(21) / 20
    share = np.diff(ends / (shift - (shift - 1) * ends))
    assert share.sum() == pytest.approx(1)
    model = DiffusionModel(GaussianNetwork(process), process, (8, 8, 1))
    keys = jax.random.split(jax.random.key(2), 4096)
    images = jnp.round((jax.random.normal(jax.random.key(1), (4096, 8, 8, 1)) + 1) * 127.5)
    batch = {"image": images.astype(jnp.int32)}
    value, _ = jax.jit(model.loss)({"deviation": jnp.float32(1.0)}, batch, keys)
    expected = float((share * exact).sum())
    assert abs(expected - exact.mean()) > 0.05
    assert value.item() == pytest.approx(expected, abs=4 * exact.std() / np.sqrt(4096) + 1e-3)


def test_decoder_is_a_distribution_over_the_256_levels():
    levels = jnp.arange(256) / 127.5 - 1
    means = jnp.array([-1.4, -0.7, 0.0, 0.4321, 1.0, 2.0])[:, None]
    log_scales = jnp.log(jnp.array([1e-3, 0.02, 0.3, 2.0]))[:, None, None]
    log_mass = jax.jit(bound.discretised_log_likelihood)(
        levels[None, None], means[None], log_scales
    )
    assert np.isfinite(log_mass).all()
    np.testing.assert_allclose(np.exp(np.float64(log_mass)).sum(-1), 1, atol=3e-4)


def test_decoder_agrees_with_the_normal_distribution():
    x, mean, scale = np.float64(50 / 127.5 - 1), -0.5, 0.07
    exact = stats.norm.logcdf(x + 1 / 255, mean, scale) + np.log1p(
        -stats.norm.cdf(x - 1 / 255, mean, scale) / stats.norm.cdf(x + 1 / 255, mean, scale)
    )
    got = jax.jit(bound.discretised_log_likelihood)(jnp.float32(x), mean, np.log(scale))
    assert float(got) == pytest.approx(exact, rel=1e-3)


def test_kl_of_normals():
    p, q = stats.norm(0.3, 0.8), stats.norm(-0.5, 1.7)
    exact = p.expect(lambda x: p.logpdf(x) - q.logpdf(x))
    got = bound.normal_kl(0.3, 2 * np.log(0.8), -0.5, 2 * np.log(1.7))
    assert float(got) == pytest.approx(exact, rel=1e-5)


def test_images_on_another_scale_are_refused():
    network = FunctionNetwork(lambda params, x, t, label: x)
    model = DiffusionModel(network, DiffusionConfig(variance="fixed_small"), (4, 4, 3))
    images = jnp.zeros((8, 4, 4, 3))
    with pytest.raises(ValueError, match="images must be integers from 0 to 255"):
        model.loss({}, {"image": images}, KEYS)


def test_bound_of_a_network_that_knows_the_image():
    # With the clean image known and beta-tilde as the variance, every reverse step is exact:
    # what is left is the prior and a decoder centred on the image.
    process = DiffusionConfig(prediction="x0", variance="fixed_small", timesteps=50)
    images = jax.random.randint(jax.random.key(3), (8, 4, 4, 3), 1, 255).astype(jnp.uint8)
    signal = forward.to_signal(images)
    network = FunctionNetwork(lambda params, x, t, label: params)
    model = DiffusionModel(network, process, (4, 4, 3))
    report = jax.jit(model.bits_per_dim)(signal, {"image": images}, KEYS)
    np.testing.assert_allclose(report["rate"], 0, atol=1e-4)
    scale = np.exp(0.5 * model.schedule.posterior_log_variance[0])
    mass = stats.norm.cdf(1 / 255, 0, scale) - stats.norm.cdf(-1 / 255, 0, scale)
    np.testing.assert_allclose(report["decoder"], -np.log2(mass), rtol=1e-3)
    alpha_bar = model.schedule.alpha_bar[-1]
    prior = 0.5 * (
        -np.log1p(-alpha_bar) - alpha_bar + alpha_bar * np.asarray(signal, np.float64) ** 2
    )
    np.testing.assert_allclose(report["prior"], prior.mean((1, 2, 3)) / np.log(2), rtol=1e-3)
    np.testing.assert_allclose(
        report["bits_per_dim"], report["prior"] + report["rate"] + report["decoder"], rtol=1e-6
    )


@functools.cache
def gaussian_bound(prediction, draws=None):
    """Compiled (deviation that the network assumes, images, keys) -> bits of `bits_per_dim`."""
    process = DiffusionConfig(prediction=prediction, variance="fixed_large")
    model = DiffusionModel(GaussianNetwork(process), process, (8, 8, 1))
    return jax.jit(
        lambda deviation, image, keys: model.bits_per_dim(
            {"deviation": deviation}, {"image": image}, keys, draws
        )
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_bound_is_above_the_entropy_and_close_for_the_exact_predictor(prediction):
    # Pixels are rounded draws of a normal: their entropy is that of the normal less log of the
    # bin. For normal data beta is the best variance (2006.11239 section 3.2), and a thousand
    # small steps of the exact predictor then lose little; with beta-tilde they lose 0.7 bits.
    deviation = 0.25
    images = to_levels(deviation * jax.random.normal(jax.random.key(4), (64, 8, 8, 1)))
    entropy = (np.log(deviation * np.sqrt(2 * np.pi * np.e)) - np.log(2 / 255)) / np.log(2)
    keys = jax.random.split(jax.random.key(5), 64)
    report = gaussian_bound(prediction)(jnp.float32(deviation), images, keys)
    bits = np.asarray(report["bits_per_dim"], np.float64)
    error = bits.std() / np.sqrt(len(bits))
    assert entropy - 4 * error < bits.mean() < entropy + 0.15 + 4 * error


def test_stratified_draws_estimate_the_full_sum():
    images = to_levels(0.5 * jax.random.normal(jax.random.key(6), (64, 8, 8, 1)))
    keys = jax.random.split(jax.random.key(7), 64)

    def rate(draws):
        report = gaussian_bound("epsilon", draws)(jnp.float32(0.4), images, keys)
        return np.asarray(report["rate"], np.float64)

    full, estimate = rate(None), rate(10)
    error = np.hypot(full.std(), estimate.std()) / np.sqrt(len(full))
    assert abs(full.mean() - estimate.mean()) < 4 * error
    with pytest.raises(ValueError, match="draws must be at least 1"):
        gaussian_bound("epsilon", 0)(jnp.float32(0.4), images, keys)


def test_learned_variance_spans_the_two_fixed_ones():
    schedule, t = Schedule(DiffusionConfig(variance="learned")), jnp.array([0, 1, 500, 999])
    ones = jnp.ones((4, 2, 2, 3))
    for sign, fixed in ((1, np.log(schedule.beta)), (-1, schedule.posterior_log_variance)):
        got = bound.reverse_log_variance(schedule, t, sign * ones)
        np.testing.assert_allclose(got, jnp.broadcast_to(at(fixed, t), ones.shape), rtol=1e-5)
    with pytest.raises(ValueError, match="second half"):
        bound.reverse_log_variance(schedule, t)


def test_the_bound_trains_the_variance_alone():
    process = DiffusionConfig(variance="learned", vlb_weight=0.7, timesteps=10)
    images = jax.random.randint(jax.random.key(8), (8, 4, 4, 3), 0, 256).astype(jnp.uint8)
    network = FunctionNetwork(
        lambda params, x, t, label: jnp.concatenate(
            [params["mean"] * x, params["variance"] + 0 * x], axis=-1
        )
    )
    model = DiffusionModel(network, process, (4, 4, 3))

    def loss_and_simple(params):
        loss, metrics = model.loss(params, {"image": images}, KEYS)
        values = {"loss": loss, "simple": metrics["simple"]}
        return values, values | metrics

    params = {"mean": jnp.float32(0.5), "variance": jnp.float32(0.2)}
    gradient, values = jax.device_get(jax.jit(jax.jacrev(loss_and_simple, has_aux=True))(params))
    assert values["loss"] == pytest.approx(values["simple"] + 0.7 * values["vlb"], rel=1e-6)
    assert gradient["loss"]["mean"] == pytest.approx(gradient["simple"]["mean"], rel=1e-6)
    assert gradient["simple"]["variance"] == 0 != gradient["loss"]["variance"]


def test_a_network_with_another_number_of_channels_is_refused():
    images, keys = jnp.zeros((8, 4, 4, 3), jnp.uint8), KEYS
    network = FunctionNetwork(lambda params, x, t, label: x)
    process = DiffusionConfig(variance="learned")
    model = DiffusionModel(network, process, (4, 4, 3))
    with pytest.raises(ValueError, match="'learned' the network must predict 6 channels, not 3"):
        model.loss({}, {"image": images}, keys)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_labels_are_hidden_at_the_rate_asked_for(dtype):
    # The target is -1 everywhere and the network predicts the label: a hidden one, which is -1,
    # costs nothing, and a class 3 that is seen costs 16.
    process = DiffusionConfig(label_dropout=0.25, prediction="x0")
    network = FunctionNetwork(
        lambda params, x, t, label: label.astype(jnp.float32)[:, None, None, None] + 0 * x
    )
    model = DiffusionModel(network, process, (1, 1, 1))
    keys = jax.random.split(jax.random.key(9), 4000)
    batch = {"image": np.zeros((4000, 1, 1, 1), np.uint8), "label": np.full(4000, 3, dtype)}
    seen = float(jax.jit(model.loss)({}, batch, keys)[0]) / 16
    assert seen * 4000 == pytest.approx(round(seen * 4000), abs=0.01)
    assert abs(1 - seen - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)


def test_noise_of_an_example_does_not_know_its_batch():
    images = jax.random.randint(jax.random.key(10), (8, 4, 4, 3), 0, 256).astype(jnp.uint8)
    model = DiffusionModel(GaussianNetwork(LINEAR), LINEAR, (4, 4, 3))
    compiled = jax.jit(model.loss)

    def loss(rows):
        params = {"deviation": jnp.float32(0.5)}
        return compiled(params, {"image": images[rows]}, KEYS[rows])[0].item()

    whole = loss(slice(0, 8))
    halves = (loss(slice(0, 4)) + loss(slice(4, 8))) / 2
    assert whole == pytest.approx(halves, rel=1e-6)
