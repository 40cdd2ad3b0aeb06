"""Group normalisation followed by SiLU."""

import jax

from kernels.dispatch import select
from kernels.group_norm_silu import reference

_IMPLEMENTATIONS = {"reference": reference.group_norm_silu}


def group_norm_silu(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    groups: int,
    epsilon: float = 1e-6,
    silu: bool = True,
    implementation: str | None = None,
) -> jax.Array:
    """GroupNorm over channels-last features, then SiLU (Wu & He 2018, 1803.08494).

    Args:
      x: [B, ..., C], any float dtype; statistics are taken per sample and group of channels.
      scale: [C].
      bias: [C].
      groups: number of groups; divides C.
      epsilon: added to the variance.
      silu: apply y * sigmoid(y) to the normalised features.
      implementation: None for the platform's default, or "reference".

    Returns:
      [B, ..., C] in the dtype of `x`; statistics and normalisation are in float32.

    Raises:
      ValueError: `groups` does not divide C.
      NotImplementedError: `implementation` is not available.
    """
    if x.shape[-1] % groups:
        raise ValueError(f"group_norm_silu: {groups} groups do not divide {x.shape[-1]} channels")
    run = select("group_norm_silu", implementation, _IMPLEMENTATIONS)
    return run(x, scale, bias, groups=groups, epsilon=epsilon, silu=silu)
