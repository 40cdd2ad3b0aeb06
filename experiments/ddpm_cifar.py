"""DDPM (Ho et al. 2020, 2006.11239) on CIFAR-10, and on the embedded shapes set.

    python -m experiments.ddpm_cifar
        Preset tiny: 16-pixel shapes, two CPU cores, no network.

    python -m experiments.ddpm_cifar --preset cpu --data.dir DIR
        CIFAR-10 with a network of 2M parameters, for as long as a CPU can be spared.

    python -m experiments.ddpm_cifar --preset small --data.dir DIR
        CIFAR-10 with a smaller network and v-prediction, for one accelerator.

    python -m experiments.ddpm_cifar --preset paper --data.dir DIR
        The paper's configuration: 35.7M parameters, 800k steps. Published: FID 3.17 against the
        training set (1000 steps), at most 3.75 bits/dim (3.70 with the bound as the loss).

DIR holds cifar-10-batches-bin. What was measured, with hardware and time, is in docs/results.md.
"""

import sys

from gen_jax import cli
from gen_jax.config import TrainConfig
from gen_jax.data import DataConfig
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.solvers import DDIM, Ancestral
from gen_jax.nn.config import UNetConfig
from gen_jax.tasks.images.config import EvaluateConfig, ImagesConfig, LabelledSampleConfig

TINY = ImagesConfig(
    workdir="runs/ddpm_cifar_tiny",
    data=DataConfig(name="shapes", size=16),
    model=UNetConfig(widths=(32, 64), blocks=1, attention=(), groups=8, dropout=0.0, patch=2),
    diffusion=DiffusionConfig(
        schedule="cosine", prediction="v", variance="fixed_small", time_shift=1.2, reference=640
    ),
    train=TrainConfig(
        steps=1200,
        batch=64,
        optimizer="muon",
        learning_rate=1e-2,
        warmup=50,
        decay="cosine",
        beta2=0.99,
        ema=0.995,
        ema_warmup=True,
        log_every=50,
        checkpoint_every=1000,
    ),
    sample=LabelledSampleConfig(number=256),
    sampler=Ancestral(steps=100, spacing="trailing"),
    evaluate=EvaluateConfig(images=256, draws=32),
)

CPU = ImagesConfig(
    workdir="runs/ddpm_cifar_cpu",
    data=DataConfig(name="cifar10", flip=True),
    model=UNetConfig(
        widths=(32, 64, 128), blocks=1, attention=(8,), groups=8, dropout=0.0, patch=2
    ),
    diffusion=DiffusionConfig(schedule="cosine", prediction="v", variance="fixed_small"),
    train=TrainConfig(
        steps=20_000,
        batch=64,
        learning_rate=1e-3,
        warmup=500,
        beta2=0.99,
        ema=0.999,
        ema_warmup=True,
        checkpoint_every=1000,
        evaluate_every=1000,
        preview_every=1000,
    ),
    sampler=Ancestral(steps=250, spacing="trailing"),
    evaluate=EvaluateConfig(images=256, draws=16),
)

SMALL = ImagesConfig(
    workdir="runs/ddpm_cifar_small",
    data=DataConfig(name="cifar10", flip=True),
    model=UNetConfig(widths=(64, 128, 128, 128), dropout=0.1, dtype="bfloat16"),
    diffusion=DiffusionConfig(schedule="cosine", prediction="v", variance="fixed_small"),
    train=TrainConfig(
        steps=40_000,
        learning_rate=5e-4,
        warmup=1000,
        ema=0.999,
        ema_warmup=True,
        checkpoint_every=5000,
        preview_every=5000,
    ),
    sample=LabelledSampleConfig(number=1024, micro_batch=512),
    sampler=DDIM(steps=50, spacing="trailing"),
    evaluate=EvaluateConfig(images=2048, draws=64, batch=512),
)

PAPER = ImagesConfig(
    workdir="runs/ddpm_cifar_paper",
    data=DataConfig(name="cifar10", flip=True),
    train=TrainConfig(preview_every=10_000),
    sample=LabelledSampleConfig(number=50_000, micro_batch=512),
    evaluate=EvaluateConfig(images=10_000, draws=0, batch=512),
)

EXPERIMENT = cli.Experiment(
    name="ddpm_cifar",
    about="DDPM on CIFAR-10, or on the embedded shapes set (the default).",
    presets={"tiny": TINY, "cpu": CPU, "small": SMALL, "paper": PAPER},
)

if __name__ == "__main__":
    sys.exit(cli.main(EXPERIMENT))
