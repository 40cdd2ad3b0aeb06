"""Cases of diffusion_step: with and without clipping, history and noise."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels.diffusion_step import StepCoefficients, diffusion_step
from kernels.testing import Case, Suite

__all__ = ["SUITES", "example"]

_COEFFICIENTS = StepCoefficients(1.5, -0.7, 0.6, 0.3, -0.2, 0.4, 0.9)


def example(shape: tuple[int, ...], parts: Sequence[str], seed: int = 0) -> tuple:
    """Arguments with some of these parts: "noise", "history", and "traced" coefficients."""
    generator = np.random.default_rng(seed)
    x, output, history = jnp.asarray(generator.normal(size=(3, *shape)), jnp.float32)
    coefficients = _COEFFICIENTS
    if "traced" in parts:
        coefficients = StepCoefficients(*(jnp.float32(value) for value in coefficients))
    keys = jax.random.split(jax.random.key(seed), shape[0]) if "noise" in parts else None
    return x, output, coefficients, keys, history if "history" in parts else None


def _step(x, output, coefficients, keys, history, *, clip=None, implementation=None):
    return diffusion_step(
        x,
        output,
        coefficients,
        keys=keys,
        history=history,
        clip=clip,
        implementation=implementation,
    )


def _definition(x, output, coefficients, keys, history, *, clip=None):
    c = StepCoefficients(*(float(value) for value in coefficients))
    x, output = np.asarray(x, np.float64), np.asarray(output, np.float64)
    x0 = c.x0_x * x + c.x0_output * output
    x0 = x0 if clip is None else np.clip(x0, -clip, clip)
    following = c.next_x0 * x0 + c.next_x * x + c.next_output * output
    if history is not None:
        following = following + c.next_history * np.asarray(history, np.float64)
    if keys is not None:
        draw = jax.jit(jax.vmap(lambda key: jax.random.normal(key, x.shape[1:])))
        following = following + c.next_noise * np.asarray(draw(keys), np.float64)
    return following, x0


def _case(shape, *parts, gradient=(), large=False):
    options = {"clip": 0.5} if "clip" in parts else {}
    arguments = functools.partial(example, shape, parts)
    name = " ".join((" x ".join(map(str, shape)), *parts))
    return Case(name, arguments, options, atol=2e-6, gradient=gradient, large=large)


_SMALL, _IMAGES = (6, 4, 4, 3), (16, 32, 32, 3)

SUITES = (
    Suite(
        "diffusion_step",
        _step,
        cases=(
            _case(_SMALL, gradient=(0, 1)),
            _case(_SMALL, "clip"),
            _case(_SMALL, "history", large=True),
            _case(_SMALL, "history", "clip"),
            _case(_SMALL, "noise", "clip", large=True),
            _case(_SMALL, "noise", "history", "traced", large=True),
            _case((3, 7), "noise", "traced"),
            _case((2, 8, 16, 3), "noise", "history", "clip"),
            _case((1, 16, 32, 2), "noise", "traced"),
        ),
        timed=(
            _case(_IMAGES, "clip", "traced"),
            _case(_IMAGES, "noise", "clip", "traced"),
            _case(_IMAGES, "history", "clip", "traced"),
        ),
        definition=_definition,
        estimated=(
            _case((64, 32, 32, 3), "noise", "clip", "traced"),
            _case((64, 32, 32, 3), "history", "clip", "traced"),
            _case((8, 256, 256, 3), "noise", "clip", "traced"),
        ),
    ),
)
