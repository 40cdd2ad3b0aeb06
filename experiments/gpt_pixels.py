"""Images token by token in raster order: PixelCNN's factorisation (van den Oord et al. 2016,
1601.06759) with a transformer, as Image GPT (Chen et al. 2020) and Sparse Transformer (Child et
al. 2019, 1904.10509) do.

    python -m experiments.gpt_pixels
        Preset tiny: 16-pixel shapes of 7 colours, two CPU cores, no network. The likelihood is
        exact, and so is its floor, ln 648 = 6.474 nats per image.

    python -m experiments.gpt_pixels --preset patches
        The same images as 16 squares of 4 x 4 pixels, which experiments.masked_pixels draws in
        rounds.

    python -m experiments.gpt_pixels --preset folder --data.dir FOLDER
        One's own images at 16 pixels.

    python -m experiments.gpt_pixels --preset cifar --data.dir DIR
        CIFAR-10, 3072 tokens of 256 values, for as long as a CPU can be spared.

    python -m experiments.gpt_pixels --preset cifar_gpu --data.dir DIR
        CIFAR-10 for one accelerator, with dense attention and 51M parameters. Published for
        Sparse Transformer, which has 59M in 128 layers: 2.80 bits/dim.

DIR holds cifar-10-batches-bin. What was measured, with hardware and time, is in docs/results.md.
"""

import dataclasses
import sys

from gen_jax import cli
from gen_jax.config import TrainConfig
from gen_jax.data import DataConfig
from gen_jax.nn.config import TransformerConfig
from gen_jax.tasks.images.config import LabelledSampleConfig
from gen_jax.tasks.pixels.config import EvaluateConfig, PixelsConfig

_ADAM = TrainConfig(
    steps=3000,
    batch=8,
    learning_rate=3e-3,
    warmup=100,
    decay="cosine",
    final_rate=0.02,
    beta2=0.98,
    ema=0.98,
    ema_warmup=True,
    log_every=50,
    checkpoint_every=1000,
)

TINY = PixelsConfig(
    workdir="runs/gpt_pixels_tiny",
    data=DataConfig(name="shapes", size=16, palette=True),
    model=TransformerConfig(
        vocabulary=7,
        context=256,
        layers=3,
        width=64,
        heads=2,
        position="both",
        rotary_base=1000.0,
        tied=False,
        extra_inputs=1,
    ),
    train=dataclasses.replace(
        _ADAM,
        steps=500,
        batch=32,
        optimizer="muon",
        learning_rate=2e-2,
        warmup=30,
        checkpoint_every=250,
    ),
    sample=LabelledSampleConfig(number=256, micro_batch=128),
)

# One token is a square of 4 x 4 pixels, of which the set has 595: the data of masked_pixels.
PATCHES = PixelsConfig(
    workdir="runs/gpt_pixels_patches",
    data=TINY.data,
    patch=4,
    model=dataclasses.replace(TINY.model, vocabulary=0, context=16, layers=2, width=128, heads=4),
    train=dataclasses.replace(_ADAM, steps=3500, batch=64, learning_rate=2e-3),
    sample=TINY.sample,
)

# One's own images: --data.dir FOLDER.
FOLDER = PixelsConfig(
    workdir="runs/gpt_pixels_folder",
    data=DataConfig(name="folder", dir="images", size=16, flip=True),
    model=dataclasses.replace(TINY.model, vocabulary=0, context=768),
    train=_ADAM,
    sample=LabelledSampleConfig(number=64, micro_batch=64),
    evaluate=EvaluateConfig(images=64, batch=16),
)

CIFAR = PixelsConfig(
    workdir="runs/gpt_pixels_cifar",
    data=DataConfig(name="cifar10", flip=True),
    model=TransformerConfig(
        vocabulary=256,
        context=3072,
        window=192,
        layers=4,
        width=128,
        heads=4,
        extra_inputs=1,
        position="both",
        bias=False,
    ),
    train=TrainConfig(
        steps=2000,
        batch=4,
        learning_rate=2e-3,
        warmup=100,
        decay="cosine",
        final_rate=0.05,
        beta2=0.99,
        weight_decay=0.01,
        ema=0.995,
        ema_warmup=True,
        log_every=10,
        checkpoint_every=100,
        evaluate_every=400,
        preview_every=400,
    ),
    sample=LabelledSampleConfig(number=16, micro_batch=16),
    evaluate=EvaluateConfig(images=64, batch=4),
)

CIFAR_GPU = PixelsConfig(
    workdir="runs/gpt_pixels_cifar_gpu",
    data=DataConfig(name="cifar10", flip=True),
    model=TransformerConfig(
        vocabulary=256,
        context=3072,
        layers=16,
        width=512,
        heads=4,
        extra_inputs=1,
        dropout=0.1,
        position="both",
        dtype="bfloat16",
    ),
    train=TrainConfig(
        steps=48_000,
        batch=128,
        accumulate=16,
        learning_rate=4e-4,
        warmup=5000,
        decay="cosine",
        beta2=0.99,
        weight_decay=0.01,
        ema=0.999,
        ema_warmup=True,
        checkpoint_every=1000,
        evaluate_every=2000,
        preview_every=2000,
    ),
    sample=LabelledSampleConfig(number=256, micro_batch=256),
    evaluate=EvaluateConfig(images=10_000, batch=16),
)

EXPERIMENT = cli.Experiment(
    name="gpt_pixels",
    about="Images pixel by pixel: the embedded shapes set (the default), or CIFAR-10.",
    presets={
        "tiny": TINY,
        "patches": PATCHES,
        "folder": FOLDER,
        "cifar": CIFAR,
        "cifar_gpu": CIFAR_GPU,
    },
)

if __name__ == "__main__":
    sys.exit(cli.main(EXPERIMENT))
