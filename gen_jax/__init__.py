"""gen_jax: generation by every strategy between one unit at a time and all at once, in JAX.

Importing this package loads nothing heavy; a name is imported when it is used:

    generate, generate_many, stream, sample_keys   the sampling loop (`gen_jax.sampling`)
    Sampler, Condition                             what a strategy is, and what it is conditioned on
    load, Loaded                                   a trained run, in one line
    fit, Trainable, ModelTrainable                 the training loop
    check_sampler                                  the laws that every sampler obeys

Models and samplers are in `gen_jax.models.<family>`, published weights in `gen_jax.interop`.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["interop", "models", "parallel", "sampling", "testing", "training"],
    submod_attrs={
        "condition": ["Condition"],
        "loading": ["Loaded", "load"],
        "sampling": ["Sampler", "generate", "generate_many", "sample_keys", "stream"],
        "testing": ["check_sampler"],
        "trainables": ["ModelTrainable", "Trainable"],
        "training": ["fit"],
    },
)
