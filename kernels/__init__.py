"""The hot operations of the sampling loops, one public function each.

Every operation has a folder: `reference.py` is its specification in plain jax.numpy, and the
public function picks a backend per platform. This package depends on jax alone.
"""

from kernels.conv_3x3 import conv_3x3, prepare_conv_3x3
from kernels.diffusion_step import StepCoefficients, diffusion_step
from kernels.group_norm_silu import group_norm_silu

__all__ = [
    "StepCoefficients",
    "conv_3x3",
    "diffusion_step",
    "group_norm_silu",
    "prepare_conv_3x3",
]
