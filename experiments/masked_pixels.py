"""Images in rounds over all pixels: masked models, on the data and networks of gpt_pixels.

MaskGIT (Chang et al. 2022, 2202.04200), Mask-Predict (Ghazvininejad et al. 2019, 1904.09324),
absorbing diffusion (D3PM: Austin et al. 2021, 2107.03006) and remasking (Wang et al. 2025,
2503.00307), groups in a random order or in Halton's (Besnier et al. 2025, 2503.17076) and erase and
repair draw from one model: --sampler maskgit, mask_predict, absorbing, random_order, halton or
repair.

    python -m experiments.masked_pixels
        Preset tiny: 16-pixel shapes of 7 colours, as 16 squares of 4 x 4 pixels out of 595, two CPU
        cores, no network. The bound of the likelihood has a known floor, ln 648 = 6.474 nats per
        image.

    python -m experiments.masked_pixels sample --sampler random_order --sampler.rounds 8
        The trained model in other rounds.

    python -m experiments.masked_pixels complete --complete.hide left
        Fills the left half of test images, each several times.

    python -m experiments.masked_pixels --preset cifar_gpu --data.dir DIR
        CIFAR-10 for one accelerator, 3072 tokens of 256 values. Published for D3PM with absorbing
        states: at most 4.40 bits/dim.

DIR holds cifar-10-batches-bin. What was measured, with hardware and time, is in docs/results.md.
"""

import dataclasses
import sys

from experiments import gpt_pixels
from gen_jax import cli
from gen_jax.models.masked.config import MaskGITOptions
from gen_jax.tasks.images.config import LabelledSampleConfig
from gen_jax.tasks.masked_pixels.config import EvaluateConfig, MaskedPixelsConfig

_AR, _AR_GPU = gpt_pixels.PATCHES, gpt_pixels.CIFAR_GPU

TINY = MaskedPixelsConfig(
    workdir="runs/masked_pixels_tiny",
    data=_AR.data,
    patch=_AR.patch,
    model=dataclasses.replace(_AR.model, causal=False),
    train=_AR.train,
    sample=_AR.sample,
    sampler=MaskGITOptions(rounds=16),
)

CIFAR_GPU = MaskedPixelsConfig(
    workdir="runs/masked_pixels_cifar_gpu",
    data=_AR_GPU.data,
    model=dataclasses.replace(_AR_GPU.model, causal=False),
    train=_AR_GPU.train,
    sample=LabelledSampleConfig(number=256, micro_batch=64),
    sampler=MaskGITOptions(rounds=64),
    evaluate=EvaluateConfig(images=10_000, draws=64, batch=16),
)

EXPERIMENT = cli.Experiment(
    name="masked_pixels",
    about="Images in rounds over all pixels: the embedded shapes set (the default), or CIFAR-10.",
    presets={"tiny": TINY, "cifar_gpu": CIFAR_GPU},
)

if __name__ == "__main__":
    sys.exit(cli.main(EXPERIMENT))
