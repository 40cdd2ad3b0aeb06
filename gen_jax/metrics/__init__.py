"""How good samples are: distances between sets of images, and exact readings of known sets."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["frechet", "gaps", "repair", "shapes", "translation"]
)
