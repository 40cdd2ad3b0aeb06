"""One round of decoding masked positions: tokens, their confidence, and which of them stay."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key

from kernels.dispatch import Operation
from kernels.typing import AnyArray, IntScalar, Scalar

__all__ = ["keep_most_confident", "mask_scores"]

_mask_scores = Operation("mask_scores", __name__)
_keep_most_confident = Operation("keep_most_confident", __name__)


def mask_scores(
    logits: Float[AnyArray, "B L V"],
    tokens: Int[AnyArray, "B L"],
    masked: Bool[AnyArray, "B L"],
    keys: Key[Array, " B"] | None,
    *,
    temperature: Scalar = 1.0,
    noise: Scalar | Float[Array, ""] = 0.0,
    implementation: str | None = None,
) -> tuple[Int32[Array, "B L"], Float32[Array, "B L"], Float32[Array, "B L"]]:
    """A token and a confidence for every masked position (MaskGIT, Chang et al. 2022, 2202.04200).

    At a masked position the token is drawn from softmax(logits / temperature) by Gumbel-max, its
    log-probability is that under softmax(logits), whatever the temperature, and its confidence
    is log-probability + noise * Gumbel noise. The token of a position depends only on its logits,
    its place and its key; further positions and other rows change the floats by rounding alone
    (compilers order a sum by its shape).

    Args:
      logits: [B, L, V]; computed with in float32. -inf excludes a token; every masked position
        has one that is not excluded.
      tokens: int32 [B, L], read where not masked.
      masked: bool [B, L].
      keys: [B] threefry keys, one per sample and round; None where nothing is drawn, that is
        with temperature 0 and noise 0.0.
      temperature: divides the logits, at least 1e-6; 0 takes the most probable token (the first
        of equals).
      noise: not negative; a float, or a float32 scalar that may be traced (then not checked).
      implementation: None for the platform's default, "reference", "tpu", which reads the logits
        once, or "gpu", which reads those of masked positions.

    Returns:
      tokens int32 [B, L], log-probabilities float32 [B, L], confidences float32 [B, L]; where
      not masked the token that was there, 0 and +inf.

    Raises:
      NotImplementedError: `implementation` is unknown or cannot take these arguments.
      ValueError: shapes do not agree, an argument is out of range, or keys are missing.
    """
    traced = isinstance(noise, jax.Array)
    if not (temperature == 0 or 1e-6 <= temperature < float("inf")):
        raise ValueError(f"mask_scores: temperature {temperature} is neither 0 nor in [1e-6, inf)")
    if traced and noise.shape != ():
        raise ValueError(f"mask_scores: noise is of shape {noise.shape}, not a scalar")
    if not traced and not 0 <= noise < float("inf"):
        raise ValueError(f"mask_scores: noise {noise} is not in [0, inf)")
    _check_shapes(logits, tokens, masked, keys)
    if not traced:
        noise = float(noise) or None
    if keys is None and (temperature > 0 or noise is not None):
        raise ValueError("mask_scores: keys may be None only with temperature 0 and noise 0.0")
    return _mask_scores(
        implementation, logits, tokens, masked, keys, temperature=temperature, noise=noise
    )


def _check_shapes(logits, tokens, masked, keys):
    if logits.ndim != 3 or not logits.shape[:2] == tokens.shape == masked.shape:
        raise ValueError(
            f"mask_scores: logits {logits.shape}, tokens {tokens.shape} and masked {masked.shape} "
            "are not [B, L, V], [B, L] and [B, L]"
        )
    if masked.dtype != bool:
        raise ValueError(f"mask_scores: masked is {masked.dtype}, not bool")
    if keys is not None and keys.shape != logits.shape[:1]:
        raise ValueError(f"mask_scores: {keys.shape} keys for {logits.shape[0]} samples")
    length, vocabulary = logits.shape[1:]
    if length * (vocabulary + 1) > 2**32:
        raise ValueError(f"mask_scores: no counters for {length} positions of {vocabulary} tokens")


def keep_most_confident(
    confidence: Float[AnyArray, "B L"],
    count: IntScalar | Int[AnyArray, ""] | Int[AnyArray, " B"],
    *,
    implementation: str | None = None,
) -> Bool[Array, "B L"]:
    """The `count` most confident positions of each row; of equals the lower positions.

    Args:
      confidence: float32 [B, L], infinite or not, but not NaN.
      count: integers [B], or one for all rows; below 0 as 0, above L as L.
      implementation: "reference" sorts. "threshold" finds the last kept value by bisection over
        the bits of a float. None takes what `kernels.bench` measured to be faster on a CPU:
        sorting up to B L = 64 (half the time of one row of 64), the threshold above (a half of
        one row of 256, a tenth of 64 rows).

    Returns:
      bool [B, L], exactly min(count, L) of each row True.

    Raises:
      NotImplementedError: `implementation` is unknown or cannot take these arguments.
      ValueError: shapes do not agree, or counts are not integers.
    """
    count = jnp.asarray(count)
    if confidence.ndim != 2 or count.shape not in ((), confidence.shape[:1]):
        raise ValueError(
            f"keep_most_confident: confidence {confidence.shape} and count {count.shape} are not "
            "[B, L] and [B]"
        )
    if not jnp.issubdtype(count.dtype, jnp.integer):
        raise ValueError(f"keep_most_confident: count is {count.dtype}, not integers")
    count = jnp.clip(count, 0, confidence.shape[1]).astype(jnp.int32)
    count = jnp.broadcast_to(count, confidence.shape[:1])
    return _keep_most_confident(implementation, confidence.astype(jnp.float32), count)
