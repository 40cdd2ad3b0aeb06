"""One update of a diffusion sampler: predicted clean image, next image, fresh noise."""

from jaxtyping import Array, Float, Key

from kernels.diffusion_step.reference import StepCoefficients
from kernels.dispatch import Operation
from kernels.typing import AnyArray, Scalar

__all__ = ["StepCoefficients", "diffusion_step"]

_diffusion_step = Operation("diffusion_step", __name__)


def diffusion_step(
    x: Float[AnyArray, " B *dims"],
    output: Float[AnyArray, " B *dims"],
    coefficients: StepCoefficients,
    *,
    keys: Key[Array, " B"] | None = None,
    history: Float[AnyArray, " B *dims"] | None = None,
    clip: Scalar | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, " B *dims"], Float[Array, " B *dims"]]:
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
      implementation: "reference", or "gpu" (scalar coefficients, threefry keys), whose noise is
        that of the reference to a few ulp. None takes "reference" on all platforms.

    Returns:
      (next, x0), both [B, ...] float32.

    Raises:
      NotImplementedError: `implementation` is unknown or cannot take these arguments.
    """
    return _diffusion_step(
        implementation, x, output, coefficients, keys=keys, history=history, clip=clip
    )
