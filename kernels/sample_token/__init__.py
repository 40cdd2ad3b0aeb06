"""Choice of the next token: vocabulary product, filters, and a draw with a key per sample."""

from jaxtyping import Array, Float, Int32, Key

from kernels.dispatch import Operation
from kernels.sample_token.reference import filter_logits
from kernels.typing import AnyArray, IntScalar, Scalar

__all__ = ["filter_logits", "sample_logits", "sample_token"]

_sample_token = Operation("sample_token", __name__)
_sample_logits = Operation("sample_logits", __name__)


def sample_token(
    hidden: Float[AnyArray, "B D"],
    head: Float[AnyArray, "D V"],
    keys: Key[Array, " B"],
    *,
    implementation: str | None = None,
    **choice: Scalar,
) -> Int32[Array, " B"]:
    """A token for each row of hidden values: `sample_logits` of their product with the head.

    Args:
      hidden: [B, D] float32.
      head: [D, V], stored so that the product with a few rows reads memory in order.
      keys: [B] keys, one per sample; not read when the temperature is 0.
      implementation: as in `sample_logits`.
      **choice: `temperature`, `top_k`, `top_p`, `min_p` of `sample_logits`.

    Returns:
      int32 [B].

    Raises:
      NotImplementedError: `implementation` is unknown or cannot take these arguments.
      ValueError: an argument is out of range.
    """
    return _sample_token(implementation, hidden, head, keys, **_checked(**choice))


def sample_logits(
    logits: Float[AnyArray, "B V"],
    keys: Key[Array, " B"],
    *,
    temperature: Scalar = 1.0,
    top_k: IntScalar = 0,
    top_p: Scalar = 1.0,
    min_p: Scalar = 0.0,
    implementation: str | None = None,
) -> Int32[Array, " B"]:
    """A token for each row of logits, drawn from the filtered distribution (Gumbel-max).

    The filters apply in this order: temperature, top_k, top_p (of what top_k kept), min_p. Of
    equal logits at the edge top_k keeps the lower ids; the others keep all.

    Args:
      logits: [B, V]; computed with in float32. -inf excludes a token.
      keys: [B] threefry keys. Without filters row b is `jax.random.categorical(keys[b], ...)`.
      temperature: divides the logits, at least 1e-6; 0 takes the most probable token (the first
        of equals).
      top_k: keep the k most probable tokens; 0 for all.
      top_p: keep the smallest set of most probable tokens with at least this mass, in (0, 1].
      min_p: keep tokens at least this share as probable as the most probable one, in [0, 1].
      implementation: "reference" filters the whole vocabulary. "indices" (the default where
        top_k is given) goes on with k values and their ids: the same token, but for rounding.
        "tpu" (the default there with top_k or top_p for 8 rows or more) keeps the logits on the
        chip, and "gpu" a row of them.

    Returns:
      int32 [B].

    Raises:
      NotImplementedError: `implementation` is unknown or cannot take these arguments.
      ValueError: an argument is out of range.
    """
    choice = _checked(temperature, top_k, top_p, min_p)
    return _sample_logits(implementation, logits, keys, **choice)


def _checked(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    warm = temperature == 0 or 1e-6 <= temperature < float("inf")
    if not (warm and top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(
            f"out of range: temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p}"
        )
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
