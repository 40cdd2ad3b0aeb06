"""Networks, as pure functions of a tree of parameters.

A network is a frozen dataclass of its sizes; it is hashable, so that it is static under `jit`.
`init` gives parameters, and a call gives predictions from them. `prepare` gives parameters in the
form that a loop of evaluations reads, once before the loop. Flax Linen builds the networks, but no
Linen module leaves this package except the layers, which are for those who write a network.

Importing `gen_jax.nn.config` loads no jax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "autoencoder": ["AutoencoderNetwork"],
        "attention": ["attend", "dot_product_attention", "local_attention", "rotate"],
        "config": ["AutoencoderConfig", "DiscriminatorConfig", "TransformerConfig", "UNetConfig"],
        "discriminator": ["PatchDiscriminator"],
        "encoder_decoder": ["EncoderDecoder"],
        "layers": ["Conv3x3", "Dropout", "GroupNorm", "sinusoidal_embedding"],
        "transformer": ["TokenNetwork"],
        "unet": ["UNetNetwork"],
    },
)
