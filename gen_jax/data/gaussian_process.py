"""Gaussian signals whose entropy, predictors and one-step generator are known in closed form."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gen_jax.data.streams import check_batch, generator, shard_of_step


@dataclass(frozen=True, eq=False)
class GaussianSource:
    """Vectors of N real values, jointly Gaussian with mean 0.

    Args:
        covariance: float64 [N, N], N >= 1; symmetric and positive definite.

    Raises:
        ValueError: another dtype or shape, or no covariance.
    """

    covariance: np.ndarray

    def __post_init__(self) -> None:
        covariance = self.covariance
        square = covariance.ndim == 2 and len(set(covariance.shape)) == 1 and covariance.size
        if covariance.dtype != np.float64 or not square:
            raise ValueError(
                "covariance must be float64 [N, N] with N >= 1, "
                f"not {covariance.dtype} {list(covariance.shape)}"
            )
        # A NaN is not equal to itself.
        if not np.allclose(covariance, covariance.T, rtol=1e-12, atol=0):
            raise ValueError("covariance is not symmetric")
        try:
            np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:
            raise ValueError("covariance is not positive definite") from None

    @property
    def length(self) -> int:
        """N, the number of values."""
        return len(self.covariance)

    @cached_property
    def cholesky(self) -> np.ndarray:
        """float64 [N, N]: lower triangular with cholesky @ cholesky.T = covariance."""
        return np.linalg.cholesky(self.covariance)

    @cached_property
    def entropy(self) -> float:
        """The differential entropy of a vector, in nats."""
        return float(
            self.length * 0.5 * np.log(2 * np.pi * np.e) + np.log(np.diag(self.cholesky)).sum()
        )

    @cached_property
    def one_shot_gap(self) -> float:
        """What drawing all values at once, independently, loses: -1/2 ln det(correlation), nats."""
        variances = np.diag(self.covariance)
        return float(0.5 * np.log(variances).sum() - np.log(np.diag(self.cholesky)).sum())

    @cached_property
    def predictor(self) -> tuple[np.ndarray, np.ndarray]:
        """The autoregressive model: each value given those before it.

        Returns:
            coefficients float64 [N, N], strictly lower triangular, and variances float64 [N]:
            x_i given the past is Gaussian with mean coefficients[i] @ x and variance variances[i].
        """
        scale = np.diag(self.cholesky)
        whitening = np.linalg.inv(self.cholesky)
        return np.tril(-scale[:, None] * whitening, -1), scale**2

    def one_step(self, noise: np.ndarray) -> np.ndarray:
        """The exact one-step generator, an inverse autoregressive flow: x = cholesky z.

        Every value is computed at once from the noise, as by the student of probability density
        distillation (van den Oord et al., 2017, arXiv 1711.10433).

        Args:
            noise: float64 [B, N], standard normal.

        Returns:
            float64 [B, N]: distributed as this source.
        """
        return noise @ self.cholesky.T

    def autoregress(self, noise: np.ndarray) -> np.ndarray:
        """The same signals from the same noise, drawn value by value with the predictor.

        Args:
            noise: float64 [B, N], standard normal.

        Returns:
            float64 [B, N].
        """
        coefficients, variances = self.predictor
        signal = np.zeros_like(noise)
        for i in range(self.length):
            signal[:, i] = signal @ coefficients[i] + np.sqrt(variances[i]) * noise[:, i]
        return signal

    def log_prob(self, signal: np.ndarray) -> np.ndarray:
        """The log-density of float64 [B, N] signals: float64 [B], in nats."""
        white = np.linalg.solve(self.cholesky, np.asarray(signal, np.float64).T)
        constant = self.length * 0.5 * np.log(2 * np.pi) + np.log(np.diag(self.cholesky)).sum()
        return -0.5 * (white**2).sum(axis=0) - constant

    def sample(self, seed: int, number: int) -> np.ndarray:
        """Independent signals: float64 [number, N], a pure function of its arguments.

        Args:
            seed: in [0, 2**64).
            number: from 1 up.

        Raises:
            ValueError: an argument is out of range.
        """
        check_batch(seed, 0, number)
        return self.one_step(generator(seed, 0).standard_normal((number, self.length)))

    def batch(
        self, seed: int, step: int, size: int, *, shard: tuple[int, int] = (0, 1)
    ) -> dict[str, np.ndarray]:
        """This shard of a batch of independent signals, a pure function of its arguments.

        Args:
            seed: in [0, 2**64).
            step: from 0 up.
            size: signals per global batch, over all shards.
            shard: (index, count); the shards in order, concatenated, are the whole batch.

        Returns:
            "signal": float32 [size / count, N].

        Raises:
            ValueError: an argument is out of range, or count does not divide size.
        """
        stream, mine = shard_of_step(seed, step, size, shard)
        noise = stream.standard_normal((size, self.length))[mine]
        return {"signal": self.one_step(noise).astype(np.float32)}


def correlated_pair(rho: float) -> GaussianSource:
    """Two values of variance 1 with correlation rho: drawn at once they lose -1/2 ln(1 - rho^2).

    Raises:
        ValueError: rho is not in (-1, 1).
    """
    return GaussianSource(np.array([[1, rho], [rho, 1]], np.float64))


def sinusoid(length: int, cycles: int, noise: float) -> GaussianSource:
    """A tone of random amplitude and phase in noise: a cos(w t) + b sin(w t) + n_t.

    a and b are standard normal, w = 2 pi cycles / length, and n_t has variance `noise`.

    Args:
        length: N, from 3 up.
        cycles: whole periods in the signal; above 0 and below N / 2.
        noise: above 0.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_sinusoid(length, cycles, noise)
    return GaussianSource(_toeplitz(sinusoid_autocovariance(length, cycles, noise)))


def sinusoid_autocovariance(length: int, cycles: int, noise: float) -> np.ndarray:
    """E[x_0 x_t] of `sinusoid`: cos(w t), and the noise's variance at t = 0; float64 [N]."""
    _check_sinusoid(length, cycles, noise)
    result = np.cos(2 * np.pi * cycles * np.arange(length) / length)
    result[0] += noise
    return result


def sinusoid_gap(length: int, noise: float) -> float:
    """The one-shot gap of `sinusoid` in closed form, in nats, for any number of cycles.

    The covariance has the eigenvalue noise + N / 2 twice and noise N - 2 times; s2 = noise:
    1/2 [N ln(1 + s2) - (N - 2) ln s2 - 2 ln(s2 + N / 2)].

    Raises:
        ValueError: an argument is out of range.
    """
    _check_sinusoid(length, 1, noise)
    tone = 2 * np.log(noise + length / 2)
    return float(0.5 * (length * np.log1p(noise) - (length - 2) * np.log(noise) - tone))


def levinson(autocovariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predicts each value of a stationary signal from those before it, in O(N^2).

    The recursion of Levinson (1946) and Durbin (1960).

    Args:
        autocovariance: float64 [N], N >= 1: r_t = E[x_0 x_t], positive definite.

    Returns:
        coefficients float64 [N, N], strictly lower triangular, and variances float64 [N], as
        `GaussianSource.predictor` of the covariance r_|i-j|.

    Raises:
        ValueError: it is no autocovariance of a signal that has something new at every step.
    """
    length = len(autocovariance)
    coefficients, variances = np.zeros((length, length)), np.zeros(length)
    variance, newest_first = autocovariance[0], np.zeros(0)
    for i in range(length):
        if i:
            surprise = autocovariance[i] - newest_first @ autocovariance[i - 1 : 0 : -1]
            reflection = surprise / variance
            newest_first = np.append(newest_first - reflection * newest_first[::-1], reflection)
            variance = variance * (1 - reflection**2)
        if not variance > 0:
            raise ValueError(f"autocovariance is not positive definite from lag {i} on")
        coefficients[i, :i], variances[i] = newest_first[::-1], variance
    return coefficients, variances


def gaussian_kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) of Gaussians with mean 0, in nats.

    Args:
        p: float64 [N, N], a covariance.
        q: float64 [N, N], a covariance.
    """
    log_ratio = np.linalg.slogdet(q)[1] - np.linalg.slogdet(p)[1]
    return float(0.5 * (np.trace(np.linalg.solve(q, p)) - len(p) + log_ratio))


def _toeplitz(row: np.ndarray) -> np.ndarray:
    lag = np.abs(np.arange(len(row))[:, None] - np.arange(len(row)))
    return row[lag]


def _check_sinusoid(length: int, cycles: int, noise: float) -> None:
    if not 0 < 2 * cycles < length or not 0 < noise < np.inf:
        raise ValueError(
            f"{cycles} cycles in {length} values with noise {noise}: cycles are above 0 and below "
            "half the length, the noise is above 0"
        )
