"""Weights to and from the formats that people have."""

from gen_jax.interop.diffusers import load_diffusers_unet, save_diffusers_unet
from gen_jax.interop.transformers import load_gpt2, load_llama, save_gpt2

__all__ = ["load_diffusers_unet", "load_gpt2", "load_llama", "save_diffusers_unet", "save_gpt2"]
