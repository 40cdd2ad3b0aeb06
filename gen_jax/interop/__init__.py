"""Weights to and from the formats that people have."""

from gen_jax.interop.diffusers import load_diffusers_unet, save_diffusers_unet

__all__ = ["load_diffusers_unet", "save_diffusers_unet"]
