"""Group normalisation followed by SiLU."""

from jaxtyping import Array, Float

from kernels.dispatch import Operation
from kernels.typing import AnyArray, IntScalar, Scalar

__all__ = ["group_norm_silu"]

_group_norm_silu = Operation("group_norm_silu", __name__)


def group_norm_silu(
    x: Float[AnyArray, "B *positions C"],
    scale: Float[AnyArray, " C"],
    bias: Float[AnyArray, " C"],
    *,
    groups: IntScalar,
    epsilon: Scalar = 1e-6,
    silu: bool = True,
    implementation: str | None = None,
) -> Float[Array, "B *positions C"]:
    """GroupNorm over channels-last features, then SiLU (Wu & He 2018, 1803.08494).

    Args:
      x: [B, ..., C], any float dtype; statistics are taken per sample and group of channels.
      scale: [C].
      bias: [C].
      groups: number of groups; divides C.
      epsilon: added to the variance.
      silu: apply y * sigmoid(y) to the normalised features.
      implementation: "reference", or "gpu", which reads the features once and has a gradient in
        reverse mode alone. None takes "reference" on all platforms.

    Returns:
      [B, ..., C] in the dtype of `x`; statistics and normalisation are in float32.

    Raises:
      ValueError: `groups` does not divide C.
      NotImplementedError: `implementation` is unknown or cannot take these arguments.
    """
    if x.shape[-1] % groups:
        raise ValueError(f"group_norm_silu: {groups} groups do not divide {x.shape[-1]} channels")
    return _group_norm_silu(
        implementation, x, scale, bias, groups=groups, epsilon=epsilon, silu=silu
    )
