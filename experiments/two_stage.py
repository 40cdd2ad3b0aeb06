"""Images in two stages: compress, generate in the compressed space, decode in parallel.

VQ-VAE (van den Oord et al. 2017, 1711.00937) and VQGAN (Esser et al. 2021, 2012.09841): codes one
at a time. MaskGIT (Chang et al. 2022, 2202.04200): codes in rounds. Latent diffusion (Rombach et
al. 2022, 2112.10752). Next-scale prediction (Tian et al. 2024, 2404.02905).

    python -m experiments.two_stage                       # --prior ar
    python -m experiments.two_stage --prior masked        # 8 rounds
    python -m experiments.two_stage --prior one_shot      # all codes at once
    python -m experiments.two_stage --prior next_scale    # codes of 1, 1, 2 x 2 and 4 x 4 places
    python -m experiments.two_stage --prior diffusion     # latents in 20 steps
        16-pixel shapes on two CPU cores; each trains an autoencoder first.

    python -m experiments.two_stage --prior masked --autoencoder runs/vq_cifar_tiny
        The same over the codes of a run of experiments.vq_cifar.

What was measured, with hardware and time, is in docs/results.md.
"""

import dataclasses
import sys

from experiments import vq_cifar
from gen_jax import cli
from gen_jax.config import TrainConfig
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.vq.config import GaussianOptions
from gen_jax.nn.config import TransformerConfig, UNetConfig
from gen_jax.tasks.images.config import LabelledSampleConfig
from gen_jax.tasks.two_stage.config import TwoStageConfig

_FIRST = vq_cifar.TINY

AR = TwoStageConfig(
    workdir="runs/two_stage_ar",
    prior="ar",
    data=_FIRST.data,
    coder=_FIRST.model,
    quantiser=_FIRST.quantiser,
    objective=_FIRST.objective,
    coder_train=_FIRST.train,
    model=TransformerConfig(layers=4, width=128, heads=4, mlp_dim=512),
    unet=UNetConfig(widths=(64, 64), blocks=1, attention=(4,), groups=8, dropout=0.0),
    diffusion=DiffusionConfig(
        schedule="cosine", prediction="v", variance="fixed_small", label_dropout=0.0
    ),
    train=TrainConfig(
        steps=1200,
        batch=64,
        learning_rate=2e-3,
        warmup=50,
        decay="cosine",
        beta2=0.99,
        ema=0.99,
        ema_warmup=True,
        log_every=50,
        checkpoint_every=600,
    ),
    sample=LabelledSampleConfig(number=256),
)

MASKED = dataclasses.replace(
    AR,
    workdir="runs/two_stage_masked",
    prior="masked",
    model=dataclasses.replace(AR.model, position="both"),
    train=dataclasses.replace(
        AR.train, steps=1600, batch=128, optimizer="muon", learning_rate=8e-3
    ),
)

ONE_SHOT = dataclasses.replace(AR, workdir="runs/two_stage_one_shot", prior="one_shot")

NEXT_SCALE = dataclasses.replace(
    AR,
    workdir="runs/two_stage_next_scale",
    prior="next_scale",
    quantiser=dataclasses.replace(AR.quantiser, codes=128, scales=(1, 1, 2, 4)),
)

DIFFUSION = dataclasses.replace(
    AR,
    workdir="runs/two_stage_diffusion",
    prior="diffusion",
    quantiser=GaussianOptions(width=4, weight=0.1),
    diffusion=dataclasses.replace(AR.diffusion, reference=640),
    train=dataclasses.replace(AR.train, steps=2500, learning_rate=4e-3),
)

EXPERIMENT = cli.Experiment(
    name="two_stage",
    about="Images in two stages: an autoencoder, and a prior over its codes or latents.",
    presets={
        "ar": AR,
        "masked": MASKED,
        "one_shot": ONE_SHOT,
        "next_scale": NEXT_SCALE,
        "diffusion": DIFFUSION,
    },
    preset_by="prior",
)

if __name__ == "__main__":
    sys.exit(cli.main(EXPERIMENT))
