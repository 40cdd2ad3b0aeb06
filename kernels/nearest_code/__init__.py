"""The nearest entry of a codebook for each of many vectors."""

from jaxtyping import Array, Float, Float32, Int32

from kernels.dispatch import Operation
from kernels.nearest_code.shortlist import CLASSES
from kernels.typing import AnyArray, IntScalar

__all__ = ["nearest_code"]

_nearest_code = Operation("nearest_code", __name__)
_shortlisted_code = Operation("shortlisted_code", __name__)


def nearest_code(
    x: Float[AnyArray, "N D"],
    codebook: Float[AnyArray, "K D"],
    *,
    shortlist: IntScalar = 0,
    implementation: str | None = None,
) -> tuple[Int32[Array, " N"], Float32[Array, " N"]]:
    """The codebook entry at the least Euclidean distance (van den Oord et al. 2017, eq. 1).

    Distances are compared as |c|^2 / 2 - x . c in float32, on every platform with products of full
    float32 precision. Of entries at the same distance the first one is taken.

    With a shortlist of n, products of bfloat16 (with sums in float32) choose n candidates, and
    float32 the nearest of them. A candidate is the best of the entries whose number has the same
    rest by 8, so that the nearest entry is missed where one of its own eighth, or n of other
    eighths, seem to be nearer in bfloat16. Where it is a candidate the result is the exact one.

    Args:
      x: vectors, float32 or bfloat16.
      codebook: at least one entry, of the same width.
      shortlist: 0 for the exact search, or the number of candidates, up to 8.
      implementation: "reference", which keeps all N x K distances; "blocks", which keeps those of
        one block at a time; "tpu" and "gpu", which keep none. None takes "tpu" on TPUs, and
        "blocks" where there are many. With a shortlist there are "reference" and "tpu" (the
        default on TPUs).

    Returns:
      (index [N] int32, squared distance [N] float32). The distance is a difference of larger
      numbers: its error is about 1e-7 of |x|^2. A vector that is not finite has the distance NaN or
      infinity, and an index without meaning, in [0, K).

    Raises:
      ValueError: the codebook is empty, or there cannot be so many candidates.
      NotImplementedError: `implementation` is unknown or cannot take these arguments.
    """
    if not codebook.shape[0]:
        raise ValueError("the codebook has no entries")
    if not 0 <= shortlist <= CLASSES:
        raise ValueError(f"a shortlist has up to {CLASSES} entries, not {shortlist}; 0 is for none")
    if shortlist:
        return _shortlisted_code(implementation, x, codebook, shortlist=int(shortlist))
    return _nearest_code(implementation, x, codebook)
