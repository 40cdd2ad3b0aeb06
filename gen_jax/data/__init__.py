"""Data of images, text and sequences behind `batch(seed, step, size)`, a pure function.

A name is imported when it is first used, so that the configurations load neither NumPy nor Pillow.
`tfds_source` is the one module that takes long to import, two seconds for tensorflow_datasets:
reach it as `data.tfds_source`, which is imported when a data set is read.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["tfds_source"],
    submod_attrs={
        "config": ["DataConfig", "Split", "TextConfig", "TranslationConfig", "TranslationSplit"],
        "images": ["Images"],
        "loading": ["load"],
        "markov": ["MarkovSource"],
        "sequences": ["PixelSequences"],
        "shapes": ["ShapesSet"],
        "text": ["TokenStream", "load_text"],
    },
)
