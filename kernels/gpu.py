"""What the kernels for GPUs share."""

import importlib
from collections.abc import Callable
from typing import Any

import jax

from kernels.dispatch import platform

__all__ = ["ON_CHIP", "PROCESSORS", "kernel", "mosaic", "unfit"]

ON_CHIP = 227 << 10  # bytes of shared memory that one block of threads can have, of a Hopper GPU
PROCESSORS = 132  # of an H100: so many blocks of threads keep it busy
_HOPPER = "9.0"


class _Mosaic:
    """`jax.experimental.pallas.mosaic_gpu`, which takes a third of a second to import."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("jax.experimental.pallas.mosaic_gpu"), name)


mosaic = _Mosaic()


def unfit() -> str | None:
    """Why the GPU that is there cannot run these kernels; None for one that can, or where is none.

    They use the matrix units of Hopper (`wgmma`), which neither older nor newer GPUs have.
    """
    if platform() != "cuda":
        return None
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability != _HOPPER:
        return f"needs a GPU of compute capability {_HOPPER} (Hopper), not {capability}"
    return None


def kernel(body: Callable, name: str, **options: Any) -> Callable:
    """`plgpu.kernel`, whose arrays in registers have no layouts but those that are inferred.

    Args:
      body: of the kernel.
      name: by which compilers and profilers call it.
      **options: of `plgpu.kernel`.
    """

    def named(*refs):
        body(*refs)

    named.__name__ = name
    semantics = mosaic.LoweringSemantics.Warpgroup  # not yet the default of jax 0.10
    params = mosaic.CompilerParams(lowering_semantics=semantics)
    return mosaic.kernel(named, compiler_params=params, **options)
