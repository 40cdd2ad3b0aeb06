"""The nearest entry of a codebook for each of many vectors."""

from jaxtyping import Array, Float, Float32, Int32

from kernels.dispatch import Operation
from kernels.typing import AnyArray

__all__ = ["nearest_code"]

_nearest_code = Operation("nearest_code", __name__)


def nearest_code(
    x: Float[AnyArray, "N D"],
    codebook: Float[AnyArray, "K D"],
    *,
    implementation: str | None = None,
) -> tuple[Int32[Array, " N"], Float32[Array, " N"]]:
    """The codebook entry at the least Euclidean distance (van den Oord et al. 2017, eq. 1).

    Distances are compared as |c|^2 / 2 - x . c in float32, on every platform with products of full
    float32 precision. Of entries at the same distance the first one is taken.

    Args:
      x: vectors, float32 or bfloat16.
      codebook: at least one entry, of the same width.
      implementation: "reference", which keeps all N x K distances; "blocks", which keeps those of
        one block at a time; "tpu" and "gpu", which keep none. None takes "tpu" on TPUs, and
        "blocks" where there are more than fit in a block.

    Returns:
      (index [N] int32, squared distance [N] float32). The distance is a difference of larger
      numbers: its error is about 1e-7 of |x|^2. A vector that is not finite has the distance NaN or
      infinity, and an index without meaning, in [0, K).

    Raises:
      ValueError: the codebook is empty.
      NotImplementedError: `implementation` is unknown or cannot take these arguments.
    """
    if not codebook.shape[0]:
        raise ValueError("the codebook has no entries")
    return _nearest_code(implementation, x, codebook)
