"""Autoencoders with a compressed space in between, the first of two stages.

VQ-VAE (van den Oord et al. 2017, 1711.00937), VQGAN (Esser et al. 2021, 2012.09841; its perceptual
term is of a Laplacian pyramid, not LPIPS), FSQ (Mentzer et al. 2023, 2309.15505), the continuous
latent of Rombach et al. 2022 (2112.10752).

    python -m experiments.vq_cifar
        Preset tiny: 16-pixel shapes as 16 codes, two CPU cores, no network.

    python -m experiments.vq_cifar --quantiser fsq        # or: kl; --quantiser.depth 2
        The same with another quantiser.

    python -m experiments.vq_cifar --preset cpu --data.dir DIR
        CIFAR-10 as 8 x 8 codes, for as long as a CPU can be spared.

    python -m experiments.vq_cifar --preset paper --data.dir DIR
        The sizes of VQ-VAE: 512 codes of width 64, 8 x 8 of them. Published with a prior: 4.67
        bits/dim.

    python -m experiments.vq_cifar --preset vqgan --data.dir DIR
        CIFAR-10 as 8 x 8 codes with the loss of VQGAN: absolute error, a perceptual term, and from
        step 10,000 on a critic of patches of 34 pixels. For an accelerator; not yet run.

    python -m experiments.vq_cifar --objective.critic.weight 0.1 --objective.critic.start 400 \\
            --objective.critic.network.layers 2
        The shapes with a critic for the second half of the steps.

DIR holds cifar-10-batches-bin. What was measured, with hardware and time, is in docs/results.md.
"""

import sys

from gen_jax import cli
from gen_jax.config import TrainConfig
from gen_jax.data import DataConfig
from gen_jax.models.vq.config import AutoencoderOptions, CodebookOptions, CriticOptions
from gen_jax.nn.config import AutoencoderConfig, DiscriminatorConfig
from gen_jax.tasks.autoencoder.config import AutoencoderRunConfig, EvaluateConfig

TINY = AutoencoderRunConfig(
    workdir="runs/vq_cifar_tiny",
    data=DataConfig(name="shapes", size=16),
    model=AutoencoderConfig(widths=(32, 64), blocks=1, middle_attention=True, groups=8, patch=2),
    quantiser=CodebookOptions(codes=64, width=8, restart_every=50),
    train=TrainConfig(
        steps=800,
        batch=32,
        learning_rate=2e-3,
        warmup=50,
        decay="cosine",
        beta2=0.99,
        ema=0.98,
        ema_warmup=True,
        log_every=50,
        checkpoint_every=400,
    ),
)

CPU = AutoencoderRunConfig(
    workdir="runs/vq_cifar_cpu",
    data=DataConfig(name="cifar10", flip=True),
    model=AutoencoderConfig(widths=(32, 64), blocks=1, groups=8, patch=2),
    quantiser=CodebookOptions(codes=512, width=16),
    train=TrainConfig(
        steps=6000,
        batch=32,
        learning_rate=1e-3,
        warmup=100,
        decay="cosine",
        beta2=0.99,
        ema=0.995,
        ema_warmup=True,
        checkpoint_every=1000,
        evaluate_every=1000,
        preview_every=1000,
    ),
)

PAPER = AutoencoderRunConfig(
    workdir="runs/vq_cifar_paper",
    data=DataConfig(name="cifar10", flip=True),
    model=AutoencoderConfig(widths=(256, 256, 256), blocks=1, middle_attention=False, groups=32),
    quantiser=CodebookOptions(codes=512, width=64),
    train=TrainConfig(
        steps=250_000,
        batch=128,
        learning_rate=2e-4,
        warmup=0,
        evaluate_every=10_000,
        preview_every=10_000,
    ),
    evaluate=EvaluateConfig(images=10_000, batch=256),
)

# Optimisers and the adversarial weight as in the authors' code; sizes for images of 32 pixels.
VQGAN = AutoencoderRunConfig(
    workdir="runs/vq_cifar_vqgan",
    data=DataConfig(name="cifar10", flip=True),
    model=AutoencoderConfig(widths=(128, 128, 256), blocks=2),
    quantiser=CodebookOptions(codes=1024, width=256),
    objective=AutoencoderOptions(
        loss="l1",
        perceptual=1.0,
        critic=CriticOptions(weight=0.8, network=DiscriminatorConfig(layers=2)),
    ),
    train=TrainConfig(
        steps=100_000,
        batch=128,
        learning_rate=2e-4,
        warmup=0,
        beta1=0.5,
        beta2=0.9,
        ema=0.999,
        evaluate_every=10_000,
        preview_every=10_000,
    ),
    evaluate=EvaluateConfig(images=10_000, batch=256),
)

EXPERIMENT = cli.Experiment(
    name="vq_cifar",
    about="Autoencoders of images: the embedded shapes set (the default), or CIFAR-10.",
    presets={"tiny": TINY, "cpu": CPU, "paper": PAPER, "vqgan": VQGAN},
)

if __name__ == "__main__":
    sys.exit(cli.main(EXPERIMENT))
