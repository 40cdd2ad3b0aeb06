"""Gaussian signals whose entropy, predictors and one-step generator are known in closed form."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from gen_jax.data.streams import check_batch, generator, shard_of_step

__all__ = [
    "GaussianSource",
    "correlated_pair",
    "gaussian_kl",
    "levinson",
    "sinusoid",
    "sinusoid_autocovariance",
    "sinusoid_gap",
]


@dataclass(frozen=True, eq=False)
class GaussianSource:
    """Signals of L real values, jointly Gaussian with mean 0.

    Attributes:
      covariance: symmetric and positive definite, with L >= 1.

    Raises:
      ValueError: another dtype or shape, or no covariance.
    """

    covariance: Float64[np.ndarray, "L L"]

    def __post_init__(self):
        covariance = self.covariance
        square = covariance.ndim == 2 and len(set(covariance.shape)) == 1 and covariance.size
        if covariance.dtype != np.float64 or not square:
            raise ValueError(
                "covariance must be float64 [L, L] with L >= 1, "
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
        """L, the number of values."""
        return len(self.covariance)

    @cached_property
    def cholesky(self) -> Float64[np.ndarray, "L L"]:
        """The lower triangular matrix with cholesky @ cholesky.T = covariance."""
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
    def predictor(self) -> tuple[Float64[np.ndarray, "L L"], Float64[np.ndarray, " L"]]:
        """The autoregressive model: each value given those before it.

        Returns:
          Coefficients, strictly lower triangular, and variances: x_i given the past is Gaussian
          with mean coefficients[i] @ x and variance variances[i].
        """
        scale = np.diag(self.cholesky)
        whitening = np.linalg.inv(self.cholesky)
        return np.tril(-scale[:, None] * whitening, -1), scale**2

    def one_step(self, noise: Float64[np.ndarray, "B L"]) -> Float64[np.ndarray, "B L"]:
        """The exact one-step generator, an inverse autoregressive flow: x = cholesky z.

        Every value is computed at once from the noise, as by the student of probability density
        distillation (van den Oord et al., 2017, arXiv 1711.10433).

        Args:
          noise: standard normal.

        Returns:
          Signals, distributed as this source.
        """
        return noise @ self.cholesky.T

    def autoregress(self, noise: Float64[np.ndarray, "B L"]) -> Float64[np.ndarray, "B L"]:
        """The same signals from the same noise, drawn value by value with the predictor.

        Args:
          noise: standard normal.
        """
        coefficients, variances = self.predictor
        signal = np.zeros_like(noise)
        for i in range(self.length):
            signal[:, i] = signal @ coefficients[i] + np.sqrt(variances[i]) * noise[:, i]
        return signal

    def log_prob(self, signal: Float[Any, "B L"]) -> Float64[np.ndarray, " B"]:
        """The log-density of signals, in nats."""
        white = np.linalg.solve(self.cholesky, np.asarray(signal, np.float64).T)
        constant = self.length * 0.5 * np.log(2 * np.pi) + np.log(np.diag(self.cholesky)).sum()
        return -0.5 * (white**2).sum(axis=0) - constant

    def sample(self, seed: int, number: int) -> Float64[np.ndarray, "{number} L"]:
        """Independent signals, a pure function of the arguments.

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
          "signal": float32 [B, L], with B = size / count.

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
      length: L, from 3 up.
      cycles: whole periods in the signal; above 0 and below L / 2.
      noise: above 0.

    Raises:
      ValueError: an argument is out of range.
    """
    _check_sinusoid(length, cycles, noise)
    return GaussianSource(_toeplitz(sinusoid_autocovariance(length, cycles, noise)))


def sinusoid_autocovariance(
    length: int, cycles: int, noise: float
) -> Float64[np.ndarray, " {length}"]:
    """E[x_0 x_t] of `sinusoid` at t = 0, 1, ...: cos(w t), and the noise's variance at t = 0."""
    _check_sinusoid(length, cycles, noise)
    result = np.cos(2 * np.pi * cycles * np.arange(length) / length)
    result[0] += noise
    return result


def sinusoid_gap(length: int, noise: float) -> float:
    """The one-shot gap of `sinusoid` in closed form, in nats, for any number of cycles.

    The covariance has the eigenvalue noise + L / 2 twice and noise L - 2 times; with s2 = noise
    the gap is 1/2 [L ln(1 + s2) - (L - 2) ln s2 - 2 ln(s2 + L / 2)].

    Raises:
      ValueError: an argument is out of range.
    """
    _check_sinusoid(length, 1, noise)
    tone = 2 * np.log(noise + length / 2)
    return float(0.5 * (length * np.log1p(noise) - (length - 2) * np.log(noise) - tone))


def levinson(
    autocovariance: Float64[np.ndarray, " L"],
) -> tuple[Float64[np.ndarray, "L L"], Float64[np.ndarray, " L"]]:
    """Predicts each value of a stationary signal from those before it, in O(L^2).

    The recursion of Levinson (1946) and Durbin (1960).

    Args:
      autocovariance: r_t = E[x_0 x_t] at t = 0, 1, ..., positive definite; L >= 1.

    Returns:
      Coefficients and variances, as `GaussianSource.predictor` of the covariance r_|i-j|.

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


def gaussian_kl(p: Float64[np.ndarray, "L L"], q: Float64[np.ndarray, "L L"]) -> float:
    """KL(p || q), in nats, of Gaussians with mean 0 and these covariances."""
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
