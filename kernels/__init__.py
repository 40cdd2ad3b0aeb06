"""The hot operations of the sampling loops, one public function each.

Every operation has a folder: `reference.py` is its specification in plain jax.numpy, and the
public function picks a backend for the platform; see `kernels/README.md`. This package depends on
jax and jaxtyping alone.
"""

from kernels.conv_3x3 import conv_3x3, prepare_conv_3x3
from kernels.decode_attention import KVCache, decode_attention, make_kv_cache
from kernels.decode_layers import LayerVectors, LayerWeights, decode_layers, stack_vectors
from kernels.diffusion_step import StepCoefficients, diffusion_step
from kernels.group_norm_silu import group_norm_silu
from kernels.mask_scores import keep_most_confident, mask_scores
from kernels.nearest_code import nearest_code
from kernels.quantized_linear import quantize, quantized_linear
from kernels.sample_token import filter_logits, sample_logits, sample_token
from kernels.upsample_conv_3x3 import upsample_conv_3x3

__all__ = [
    "KVCache",
    "LayerVectors",
    "LayerWeights",
    "StepCoefficients",
    "conv_3x3",
    "decode_attention",
    "decode_layers",
    "diffusion_step",
    "filter_logits",
    "group_norm_silu",
    "keep_most_confident",
    "make_kv_cache",
    "mask_scores",
    "nearest_code",
    "prepare_conv_3x3",
    "quantize",
    "quantized_linear",
    "sample_logits",
    "sample_token",
    "stack_vectors",
    "upsample_conv_3x3",
]

_HUGGING_FACE = {
    "CUDAProperties",
    "Device",
    "KernelizeFallback",
    "LayerRepository",
    "Mode",
    "get_kernel",
    "get_local_kernel",
    "has_kernel",
    "kernelize",
    "register_kernel_mapping",
    "use_kernel_forward_from_hub",
    "use_kernel_mapping",
}


def __getattr__(name: str):
    if name in _HUGGING_FACE:
        raise ImportError(
            f"`kernels.{name}` belongs to the Hugging Face package `kernels`, but {__path__[0]} is "
            "the package of gen_jax, which has the same name: uninstall the Hugging Face one, or "
            "run what needs it without gen_jax on the path"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
