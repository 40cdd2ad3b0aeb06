"""Denoising diffusion: the forward process, the losses, and the variational bound.

Ho et al. 2020 (2006.11239), Nichol & Dhariwal 2021 (2102.09672, cosine schedule and learned
variance), Salimans & Ho 2022 (2202.00512, v-prediction). Time steps count from 0 to T - 1 here,
from 1 to T in the papers. Samplers are in `diffusion_samplers`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gen_jax.models.diffusion.config import DiffusionConfig

# (params, x [B, H, W, C], t [B], label [B] or None, keys [B] or None) -> [B, H, W, C or 2C]
Network = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Constants of the forward process, [T] float64, computed once on the host."""

    config: DiffusionConfig

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """Product of 1 - beta up to and including t: q(x_t | x_0) has mean sqrt(alpha_bar) x_0."""
        return np.cumprod(1 - self.beta)

    @functools.cached_property
    def beta(self) -> np.ndarray:
        """Variance added in step t."""
        config = self.config
        if config.schedule == "linear":
            return np.linspace(config.beta_start, config.beta_end, config.timesteps)
        # 2102.09672 eq. 17, with s = 0.008 and beta at most 0.999.
        t = np.arange(config.timesteps + 1) / config.timesteps
        f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - f[1:] / f[:-1], 0.999)

    @property
    def alpha_bar_before(self) -> np.ndarray:
        """alpha_bar one step earlier; 1 before the first step."""
        return np.append(1.0, self.alpha_bar[:-1])

    @property
    def posterior_variance(self) -> np.ndarray:
        """beta-tilde, the variance of q(x_{t-1} | x_t, x_0) (2006.11239 eq. 7); 0 at t = 0."""
        return self.beta * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)

    @property
    def posterior_log_variance(self) -> np.ndarray:
        """log beta-tilde with the entry at t = 0 taken from t = 1, as in the paper's code."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1:2] if len(variance) > 1 else self.beta, variance[1:]))


def at(table: np.ndarray, t: jax.Array) -> jax.Array:
    """Entries of a [T] table at t [B], as float32 [B, 1, 1, 1]."""
    return jnp.asarray(table, jnp.float32)[t][:, None, None, None]


def diffuse(schedule: Schedule, x0, t, noise):
    """A draw of q(x_t | x_0) from unit noise (2006.11239 eq. 4); images [B, H, W, C], t [B]."""
    return at(np.sqrt(schedule.alpha_bar), t) * x0 + at(np.sqrt(1 - schedule.alpha_bar), t) * noise


def target(config: DiffusionConfig, schedule: Schedule, x0, t, noise):
    """What the network should predict at x_t, [B, H, W, C]."""
    if config.prediction == "epsilon":
        return noise
    if config.prediction == "x0":
        return x0
    alpha, sigma = at(np.sqrt(schedule.alpha_bar), t), at(np.sqrt(1 - schedule.alpha_bar), t)
    return alpha * noise - sigma * x0


def predicted_x0(config: DiffusionConfig, schedule: Schedule, x, t, output):
    """The clean image that the network's output implies at x_t, unclipped, [B, H, W, C]."""
    x_weight, output_weight = x0_weights(config.prediction, schedule.alpha_bar)
    return at(x_weight, t) * x + at(output_weight, t) * output


def x0_weights(prediction: str, alpha_bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with x0 = a x_t + b output, for each alpha_bar."""
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "x0":
        return np.zeros_like(alpha), np.ones_like(alpha)
    return alpha, -sigma


def to_signal(images: jax.Array) -> jax.Array:
    """uint8 images as float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def loss(config: DiffusionConfig, network: Network, params, batch, keys):
    """L_simple (2006.11239 eq. 14), plus the weighted bound when the variance is learned.

    Args:
      config: the process.
      network: predicts at (params, x, t, label, keys).
      params: of the network.
      batch: "image" uint8 [B, H, W, C], and "label" int32 [B] for a conditional network only.
      keys: [B] PRNG keys, one per example: time, noise, label dropout and dropout hang on them.

    Returns:
      (scalar, metrics): the mean loss over the batch, and its parts where it has more than one.
    """
    schedule = Schedule(config)
    x0 = to_signal(batch["image"])
    t_keys, noise_keys, label_keys, dropout_keys = split_each(keys, 4)
    t = jax.vmap(lambda key: jax.random.randint(key, (), 0, config.timesteps))(t_keys)
    noise = normal_each(noise_keys, x0.shape[1:])
    label = batch.get("label")
    if label is not None:
        label = _hide_labels(label, config.label_dropout, label_keys)

    x = diffuse(schedule, x0, t, noise)
    output, variance_output = _split_output(config, network(params, x, t, label, dropout_keys))
    simple = jnp.square(output - target(config, schedule, x0, t, noise)).mean()
    if config.variance != "learned":
        return simple, {}
    # 2102.09672 eq. 16: the bound trains the variance alone; T L_t estimates the sum over t.
    terms = bound_term(config, schedule, x0, x, t, jax.lax.stop_gradient(output), variance_output)
    bound = config.timesteps * terms.mean()
    total = simple + config.bound_weight * bound
    return total, {"simple": simple, "bound": bound}


def bound_term(config, schedule, x0, x, t, output, variance_output=None, clip=False):
    """L_t of the variational bound in bits per dimension (2006.11239 eq. 5), [B].

    For t > 0 the divergence of the reverse step from q(x_{t-1} | x_t, x_0); at t = 0 minus the
    log-likelihood of the discretised decoder (eq. 13).

    Args:
      config: the process.
      schedule: its constants.
      x0: [B, H, W, C] in [-1, 1], on the grid of 256 levels.
      x: [B, H, W, C], a draw of x_t.
      t: [B] int32.
      output: [B, H, W, C], the network's prediction at x.
      variance_output: [B, H, W, C], its second half when the variance is learned.
      clip: clip the predicted clean image to [-1, 1], as sampling does.
    """
    x0_predicted = predicted_x0(config, schedule, x, t, output)
    if clip:
        x0_predicted = jnp.clip(x0_predicted, -1, 1)
    x0_weight, x_weight = posterior_mean_weights(schedule.alpha_bar, schedule.alpha_bar_before)
    true_mean = at(x0_weight, t) * x0 + at(x_weight, t) * x
    mean = at(x0_weight, t) * x0_predicted + at(x_weight, t) * x
    true_log_variance = at(schedule.posterior_log_variance, t)
    log_variance = reverse_log_variance(config, schedule, t, variance_output)
    divergence = normal_divergence(true_mean, true_log_variance, mean, log_variance)
    decoder = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    nats = jnp.where((t == 0)[:, None, None, None], decoder, divergence)
    return nats.mean(axis=(1, 2, 3)) / np.log(2)


def posterior_mean_weights(alpha_bar, alpha_bar_before):
    """(a, b) with E q(x_s | x_t, x_0) = a x_0 + b x_t, s the step before t (2006.11239 eq. 7)."""
    alpha = alpha_bar / alpha_bar_before
    x0_weight = np.sqrt(alpha_bar_before) * (1 - alpha) / (1 - alpha_bar)
    x_weight = np.sqrt(alpha) * (1 - alpha_bar_before) / (1 - alpha_bar)
    return x0_weight, x_weight


def reverse_log_variance(config, schedule, t, variance_output=None):
    """Log of the reverse variance, broadcastable to [B, H, W, C].

    Raises:
      ValueError: the variance is learned and `variance_output` is missing.
    """
    small = schedule.posterior_log_variance
    large = np.log(schedule.beta)
    if config.variance == "fixed_small":
        return at(small, t)
    if config.variance == "fixed_large":
        # The paper's code takes beta-tilde at t = 0: a better decoder.
        return at(np.append(small[:1], large[1:]), t)
    if variance_output is None:
        raise ValueError("a learned variance needs the second half of the network's output")
    share = (variance_output + 1) / 2  # 2102.09672 eq. 15
    return share * at(large, t) + (1 - share) * at(small, t)


def normal_divergence(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL(N_1 || N_2) of scalar normals, elementwise, in nats."""
    return 0.5 * (
        log_variance_2
        - log_variance_1
        + jnp.exp(log_variance_1 - log_variance_2)
        + jnp.square(mean_1 - mean_2) * jnp.exp(-log_variance_2)
        - 1
    )


def discretised_log_likelihood(x, mean, log_scale):
    """Log mass of a normal on the bin of width 2/255 around x (2006.11239 eq. 13), elementwise.

    The first and last of the 256 bins extend to infinity. Far from the mean the mass is taken as
    the density times the width, which stays finite where the difference of two tails is zero.
    """
    inverse = jnp.exp(-log_scale)
    upper = inverse * (x - mean + 1 / 255)
    lower = inverse * (x - mean - 1 / 255)
    # The difference of two upper tails keeps its digits; mirror so that both are upper ones.
    mirrored = (upper + lower) < 0
    upper, lower = jnp.where(mirrored, -lower, upper), jnp.where(mirrored, -upper, lower)
    mass = jax.scipy.stats.norm.sf(lower) - jax.scipy.stats.norm.sf(upper)
    density = -0.5 * jnp.square(inverse * (x - mean)) - 0.5 * np.log(2 * np.pi)
    middle = jnp.where(
        mass > 1e-10, jnp.log(jnp.maximum(mass, 1e-10)), density - log_scale + np.log(2 / 255)
    )
    first = jax.scipy.stats.norm.logcdf(inverse * (x - mean + 1 / 255))
    last = jax.scipy.stats.norm.logsf(inverse * (x - mean - 1 / 255))
    return jnp.where(x < -0.999, first, jnp.where(x > 0.999, last, middle))


def prior_term(schedule: Schedule, x0):
    """L_T, KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, [B]."""
    alpha_bar = schedule.alpha_bar[-1]
    nats = normal_divergence(np.sqrt(alpha_bar) * x0, np.log1p(-alpha_bar), 0.0, 0.0)
    return nats.mean(axis=(1, 2, 3)) / np.log(2)


def bits_per_dim(config: DiffusionConfig, network: Network, params, batch, keys, *, draws=None):
    """The variational bound in bits per dimension of each image (2006.11239 eq. 5).

    Args:
      config: the process.
      network: predicts at (params, x, t, label, keys).
      params: of the network.
      batch: "image" uint8 [B, H, W, C], and "label" int32 [B] for a conditional network only.
      keys: [B] PRNG keys, one per image.
      draws: None for all T terms; a number for an unbiased estimate of the same sum from the
        decoder's term and that many stratified draws of the others.

    Returns:
      {"bits_per_dim", "prior", "rate", "decoder"}: each [B] float32; the first is the sum of the
      others.
    """
    schedule, total = Schedule(config), config.timesteps
    x0 = to_signal(batch["image"])
    label = batch.get("label")

    def term(t, keys):
        x = diffuse(schedule, x0, t, normal_each(keys, x0.shape[1:]))
        output, variance_output = _split_output(config, network(params, x, t, label, None))
        return bound_term(config, schedule, x0, x, t, output, variance_output, clip=True)

    def rate_term(i, carry):
        where_keys, noise_keys = split_each(fold_in_each(keys, i), 2)
        offset = 0.5 if draws is None else jax.vmap(jax.random.uniform)(where_keys)
        t = jnp.floor((i + offset) * (total - 1) / count) + jnp.ones(x0.shape[:1])
        t = jnp.minimum(t.astype(jnp.int32), total - 1)
        return carry + term(t, noise_keys) * (total - 1) / count

    count = total - 1 if draws is None else draws
    rate = jax.lax.fori_loop(0, count if total > 1 else 0, rate_term, jnp.zeros(x0.shape[:1]))
    decoder = term(jnp.zeros(x0.shape[:1], jnp.int32), fold_in_each(keys, total))
    prior = prior_term(schedule, x0)
    return {
        "bits_per_dim": prior + rate + decoder,
        "prior": prior,
        "rate": rate,
        "decoder": decoder,
    }


def split_each(keys, count):
    """[B] keys -> `count` arrays of [B] keys."""
    return jax.vmap(lambda key: tuple(jax.random.split(key, count)))(keys)


def fold_in_each(keys, data):
    """[B] keys with the same integer folded into each."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def normal_each(keys, shape):
    """One standard normal array of this shape per key, [B, *shape] float32."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _hide_labels(label, rate, keys):
    hidden = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
    return jnp.where(hidden, -1, label)


def _split_output(config, output):
    if config.variance != "learned":
        return output, None
    return jnp.split(output, 2, axis=-1)
