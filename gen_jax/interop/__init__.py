"""Weights to and from the formats that people have, without PyTorch.

A load gives a model and its parameters, ready for a sampler; a save takes the sizes of a network
and its parameters.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "diffusers_autoencoders": [
            "load_diffusers_kl",
            "load_diffusers_vq",
            "save_diffusers_kl",
            "save_diffusers_vq",
        ],
        "diffusers": ["load_diffusers_unet", "save_diffusers_unet"],
        "diffusers_pipelines": ["load_diffusers_ldm", "save_diffusers_ldm"],
        "transformers": ["load_gpt2", "load_llama", "load_transformers", "save_gpt2"],
    },
)
