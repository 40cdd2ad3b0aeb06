"""One update of a diffusion sampler: predicted clean image, next image, fresh noise."""

import jax

from kernels.diffusion_step import reference
from kernels.diffusion_step.reference import StepCoefficients
from kernels.dispatch import select

__all__ = ["StepCoefficients", "diffusion_step"]

_IMPLEMENTATIONS = {"reference": reference.diffusion_step}


def diffusion_step(
    x: jax.Array,
    output: jax.Array,
    coefficients: StepCoefficients,
    *,
    keys: jax.Array | None = None,
    history: jax.Array | None = None,
    clip: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The affine update that DDPM, DDIM and DPM-Solver++ (2M) share.

        x0   = clip(x0_x * x + x0_output * output)
        next = next_x0 * x0 + next_x * x + next_output * output
               + next_history * history + next_noise * noise

    Args:
      x: [B, ...] float32, the current sample.
      output: [B, ...] float32, what the network predicts at `x`.
      coefficients: scalars (or arrays that broadcast against `x`).
      keys: [B] PRNG keys, one per sample, for `noise` ~ N(0, 1); None for a deterministic step.
      history: [B, ...] float32, `x0` of the step before; None for a one-step solver.
      clip: bound on |x0|; None leaves it free.
      implementation: None for the platform's default, or "reference".

    Returns:
      (next, x0), both [B, ...] float32.

    Raises:
      NotImplementedError: `implementation` is not available.
    """
    run = select("diffusion_step", implementation, _IMPLEMENTATIONS)
    return run(x, output, coefficients, keys=keys, history=history, clip=clip)
