"""Every strategy on the same data, side by side: quality, evaluations, latency, rate.

    python -m experiments.compare_sampling
        The shapes of 16 pixels, as 16 squares of 4 x 4 pixels out of 595 or as RGB. Each strategy
        has the same parameters and operations of training, within a tenth. 20 to 30 minutes on
        two CPU cores; --quick has fewer strategies and a quarter of the training.

    python -m experiments.compare_sampling --strategies ar,maskgit_8 --plugin my_strategy.py
        Some of them, with those of a file of your own.

    python -m experiments.compare_sampling --data text
    python -m experiments.compare_sampling --data cifar10 --data-dir DIR
        Characters of the English that comes with Python; CIFAR-10.

It leaves results.json, results.md, figures, and index.html, a page that needs no network, in the
work directory; it goes on there when it was cut off. On a TPU or GPU the same command gives the
table of that machine. Papers: AR as PixelCNN (1601.06759); Mask-Predict (1904.09324); MaskGIT
(2202.04200); absorbing diffusion (2107.03006); DDPM (2006.11239); DDIM (2010.02502); DPM-Solver++
(2211.01095); VQ-VAE (1711.00937); VAR (2404.02905); latent diffusion (2112.10752). What was
measured is in docs/results.md.
"""

import dataclasses
import sys

import tyro

from experiments import ddpm_cifar, gpt_pixels, gpt_text, masked_text, two_stage, vq_cifar
from gen_jax import arguments, cli
from gen_jax.comparison.config import CompareConfig
from gen_jax.comparison.strategy import Comparison, Strategy, with_plugin
from gen_jax.config import resolve
from gen_jax.data import DataConfig
from gen_jax.models.autoregressive.config import SamplingOptions
from gen_jax.models.diffusion.solvers import DDIM, Ancestral, DPMSolverPP
from gen_jax.models.masked.config import (
    AbsorbingDiffusionOptions,
    MaskGITOptions,
    MaskPredictOptions,
    RandomOrderOptions,
    RepairOptions,
)
from gen_jax.models.parallel.config import LatentConfig
from gen_jax.tasks.images.config import LabelledSampleConfig
from gen_jax.tasks.latent_pixels.config import LatentPixelsConfig
from gen_jax.tasks.masked_pixels.config import MaskedPixelsConfig
from gen_jax.tasks.pixels.config import PixelsConfig
from gen_jax.tasks.text.config import TextSampleConfig

replace = dataclasses.replace

# Runs on shapes: 0.55 to 0.66 million parameters and 3.0 x 10^12 operations of training each.
_DATA, _ONE = gpt_pixels.PATCHES.data, LabelledSampleConfig(number=1)
_SQUARES = replace(gpt_pixels.PATCHES.model, width=136)
_NOT_CAUSAL = replace(_SQUARES, causal=False)
_TRAIN = replace(
    gpt_pixels.PATCHES.train, steps=1830, batch=32, log_every=100, checkpoint_every=1000, keep=1
)
_CODER = replace(vq_cifar.TINY.model, widths=(24, 40))
_CODER_TRAIN = replace(vq_cifar.TINY.train, steps=600, keep=1)
_PRIOR = replace(
    two_stage.AR,
    autoencoder="coder",
    coder=_CODER,
    coder_train=_CODER_TRAIN,
    model=replace(two_stage.AR.model, layers=4, width=80, mlp_dim=320),
    train=replace(two_stage.AR.train, steps=2200, batch=32, checkpoint_every=1000, keep=1),
)
_SHAPES_RUNS = {
    "ar": PixelsConfig(workdir="ar", data=_DATA, patch=4, model=_SQUARES, train=_TRAIN),
    "draft": PixelsConfig(
        workdir="draft",
        data=_DATA,
        patch=4,
        model=replace(_SQUARES, layers=1, width=32, heads=2),
        train=replace(_TRAIN, steps=1000),
    ),
    "masked": MaskedPixelsConfig(
        workdir="masked",
        data=_DATA,
        patch=4,
        model=_NOT_CAUSAL,
        train=replace(_TRAIN, steps=580, batch=64, optimizer="muon", learning_rate=1e-2),
        sample=_ONE,
    ),
    "latent": LatentPixelsConfig(
        workdir="latent",
        data=_DATA,
        patch=4,
        model=replace(_NOT_CAUSAL, width=104),
        latent=LatentConfig(kind="gaussian", size=16, free_nats=6.0),
        train=replace(_TRAIN, steps=690, batch=64, optimizer="muon", learning_rate=2e-2),
    ),
    "ddpm": replace(
        ddpm_cifar.TINY, workdir="ddpm", train=replace(ddpm_cifar.TINY.train, steps=975, keep=1)
    ),
    "coder": replace(vq_cifar.TINY, workdir="coder", model=_CODER, train=_CODER_TRAIN),
    "code_ar": _PRIOR,
    "code_masked": replace(_PRIOR, prior="masked"),
    "code_scales": replace(
        _PRIOR,
        autoencoder="",
        prior="next_scale",
        quantiser=two_stage.NEXT_SCALE.quantiser,
        model=replace(_PRIOR.model, layers=3, width=88, mlp_dim=352),
        train=replace(_PRIOR.train, steps=1710),
    ),
    "latent_diffusion": replace(
        _PRIOR,
        autoencoder="",
        prior="diffusion",
        quantiser=two_stage.DIFFUSION.quantiser,
        diffusion=two_stage.DIFFUSION.diffusion,
        unet=replace(two_stage.DIFFUSION.unet, widths=(32, 32)),
        train=replace(two_stage.DIFFUSION.train, steps=2500, keep=1),
    ),
}

_MAKERS = "gen_jax.comparison.makers:"
_REVEALS = "Each round reveals what it is surest of and leaves the rest for the next."
_SEES_LITTLE = "What is drawn in one round is drawn as if independent; fewer rounds lose more."
_NOISE = "Starts from noise and takes it away step by step, all units at once."
_GRID = "With few steps it takes corners: what lies between two images is drawn."


def _in_rounds(run, options, title, does, loses, quick=(), counts=(2, 4, 8, 16)):
    """A strategy for each number of rounds of a masked model."""
    return tuple(
        Strategy(
            name=f"{options.name}_{rounds}",
            title=f"{title}, {rounds} rounds",
            group="rounds",
            does=does,
            loses=loses,
            runs=(run,),
            changes={"sampler": options(rounds=rounds)},
            quick=rounds in quick,
        )
        for rounds in counts
    )


def _one_by_one(run, unit):
    return (
        Strategy(
            name="ar",
            title=f"one {unit} after another",
            group="one by one",
            does=f"Draws one {unit} after another, given those before; keys and values are kept.",
            loses="Nothing but time: it needs one evaluation for each.",
            runs=(run,),
            quick=True,
        ),
        Strategy(
            name="ar_uncached",
            title="the same without a cache",
            group="one by one",
            does=f"Draws one {unit} after another, and reads everything again each time.",
            loses="Nothing but more time: every evaluation is of the whole sequence.",
            runs=(run,),
            make=_MAKERS + "uncached",
            quick=True,
        ),
    )


_DRAFTED = Strategy(
    name="speculative",
    title="one by one, with a draft",
    group="one by one",
    does="A small model drafts three, the large one checks them in one evaluation.",
    loses="Nothing of the distribution; NFE is the most that it can take.",
    runs=("ar", "draft"),
    make=_MAKERS + "speculative",
)
_AT_ONCE = Strategy(
    name="one_shot",
    title="all at once",
    group="at once",
    does="Draws everything in one evaluation, each unit by itself.",
    loses="All that units share: pieces that do not belong together are mixed.",
    runs=("masked",),
    changes={"sampler": MaskGITOptions(rounds=1)},
    quick=True,
)
_LATENT = Strategy(
    name="latent",
    title="all at once, shared latent",
    group="at once",
    does="Draws a latent vector that all units share, then everything in one evaluation.",
    loses="What the latent does not hold, and draws of it that mean no image.",
    runs=("latent",),
    quick=True,
)


def _of_masked(run="masked", counts=(2, 4, 8, 16), quick=(8,)):
    return (
        *_in_rounds(run, MaskGITOptions, "MaskGIT", _REVEALS, _SEES_LITTLE, quick, counts=counts),
        *_in_rounds(
            run,
            RandomOrderOptions,
            "random order",
            "Each round reveals units at random.",
            _SEES_LITTLE,
            quick,
            counts=counts,
        ),
        *_in_rounds(
            run,
            AbsorbingDiffusionOptions,
            "absorbing diffusion",
            "Each unit is revealed at a moment of its own.",
            _SEES_LITTLE,
            quick,
            counts=counts,
        ),
    )


def _of_diffusion(run, solvers, prefix="", group="noise to clean"):
    return tuple(
        Strategy(
            name=f"{prefix}{name}_{solver.steps}",
            title=f"{title}, {solver.steps} steps",
            group=group,
            does=_NOISE,
            loses=_GRID,
            runs=(run,),
            changes={"sampler": solver},
            quick=quick,
        )
        for name, title, solver, quick in solvers
    )


def _of_codes(scales=True):
    decoded = "The codes come first, and all pixels at once after."
    strategies = (
        Strategy(
            name="code_ar",
            title="codes one by one",
            group="codes",
            does=f"Draws compressed codes one after another. {decoded}",
            loses="What the codes leave out.",
            runs=("code_ar",),
            quick=True,
        ),
        Strategy(
            name="code_maskgit_8",
            title="codes in 8 rounds",
            group="codes",
            does=f"Draws compressed codes in rounds. {decoded}",
            loses="What the codes leave out, and what the codes of a round share.",
            runs=("code_masked",),
            changes={"sampler": MaskGITOptions(rounds=8, choice_temperature=1.0)},
        ),
        Strategy(
            name="code_one_shot",
            title="codes at once",
            group="codes",
            does=f"Draws all compressed codes in one evaluation. {decoded}",
            loses="All that codes share.",
            runs=("code_masked",),
            changes={"sampler": MaskGITOptions(rounds=1)},
        ),
    )
    if not scales:
        return strategies
    return (
        *strategies,
        Strategy(
            name="code_scales",
            title="codes small to large",
            group="codes",
            does=f"Draws codes scale by scale, all of a scale at once. {decoded}",
            loses="What the codes of one scale share beyond those before.",
            runs=("code_scales",),
        ),
    )


SHAPES = Comparison(
    data="shapes",
    about="Coloured shapes of 16 pixels: every strategy with the same parameters and training",
    judge="gen_jax.comparison.judges:ShapesJudge",
    runs=_SHAPES_RUNS,
    strategies=(
        *_one_by_one("ar", "square"),
        _DRAFTED,
        _AT_ONCE,
        _LATENT,
        *_of_masked(),
        *_in_rounds(
            "masked",
            MaskPredictOptions,
            "Mask-Predict",
            "Takes the likeliest units, and masks again what it is least sure of.",
            "All variety: it finds one image, always the same.",
            counts=(16,),
        ),
        Strategy(
            name="repair_64",
            title="erase and repair, 64 rounds",
            group="rounds",
            does="Draws all at once, then erases one unit after another and draws it anew.",
            loses="Less with every round, but slowly: it forgets how it began.",
            runs=("masked",),
            changes={"sampler": RepairOptions(rounds=64)},
        ),
        *_of_diffusion(
            "ddpm",
            (
                ("ddpm", "DDPM", Ancestral(steps=100, spacing="trailing"), False),
                ("ddim", "DDIM", DDIM(steps=10, spacing="trailing"), False),
                ("ddim", "DDIM", DDIM(steps=20, spacing="trailing"), True),
                ("dpm", "DPM-Solver++", DPMSolverPP(steps=10), False),
                ("dpm", "DPM-Solver++", DPMSolverPP(steps=20), False),
            ),
        ),
        *_of_codes(),
        *_of_diffusion(
            "latent_diffusion",
            (
                (
                    "ddim",
                    "diffusion of latents",
                    DDIM(steps=20, spacing="trailing", clip=False),
                    False,
                ),
            ),
            prefix="latent_",
            group="codes",
        ),
    ),
)

# Runs on text: 0.8 million parameters, as many steps on as many characters; docs/results.md has the
# tables of this training.
_TEXT_TRAIN = replace(
    gpt_text.TINY.train,
    steps=1200,
    batch=16,
    optimizer="adam",
    learning_rate=3e-3,
    warmup=50,
    log_every=100,
    checkpoint_every=400,
    evaluate_every=0,
    keep=1,
)
_MASKED_TEXT = masked_text.EXPERIMENT.presets["tiny"]
TEXT = Comparison(
    data="text",
    about="English, 128 characters at a time: every strategy with the same network and training",
    judge="gen_jax.comparison.judges:TextJudge",
    runs={
        "ar": replace(
            gpt_text.TINY,
            workdir="ar",
            train=_TEXT_TRAIN,
            sample=TextSampleConfig(number=8, tokens=128),
            sampler=SamplingOptions(),
        ),
        "masked": replace(_MASKED_TEXT, workdir="masked", train=_TEXT_TRAIN),
    },
    strategies=(
        *_one_by_one("ar", "character"),
        _AT_ONCE,
        *_of_masked(counts=(8, 32, 128), quick=(8, 128)),
    ),
)


def cifar10(folder: str) -> Comparison:
    """The comparison on CIFAR-10 in a folder."""
    data = DataConfig(name="cifar10", dir=folder, flip=True)
    few = {"checkpoint_every": 1000, "evaluate_every": 0, "preview_every": 0, "keep": 1}
    coder_train = replace(vq_cifar.CPU.train, steps=800, **few)
    prior = replace(
        two_stage.AR,
        data=data,
        autoencoder="coder",
        coder=vq_cifar.CPU.model,
        quantiser=vq_cifar.CPU.quantiser,
        coder_train=coder_train,
        model=replace(two_stage.AR.model, layers=3, width=112, mlp_dim=448),
        train=replace(two_stage.AR.train, steps=1400, batch=32, **few),
    )
    network = replace(ddpm_cifar.CPU.model, widths=(32, 48, 80))
    return Comparison(
        data="cifar10",
        about="CIFAR-10: every strategy with about the same parameters and training",
        judge="gen_jax.comparison.judges:CifarJudge",
        runs={
            "ar": replace(
                gpt_pixels.CIFAR, workdir="ar", data=data, train=_few(gpt_pixels.CIFAR, 220, few)
            ),
            "ddpm": replace(
                ddpm_cifar.CPU,
                workdir="ddpm",
                data=data,
                model=network,
                train=_few(ddpm_cifar.CPU, 900, few),
            ),
            "coder": replace(vq_cifar.CPU, workdir="coder", data=data, train=coder_train),
            "code_ar": prior,
            "code_masked": replace(prior, prior="masked"),
        },
        strategies=(
            *_one_by_one("ar", "value")[:1],
            *_of_diffusion(
                "ddpm",
                (
                    ("ddpm", "DDPM", Ancestral(steps=250, spacing="trailing"), False),
                    ("ddim", "DDIM", DDIM(steps=20, spacing="trailing"), True),
                    ("ddim", "DDIM", DDIM(steps=50, spacing="trailing"), False),
                    ("dpm", "DPM-Solver++", DPMSolverPP(steps=10), False),
                ),
            ),
            *_of_codes(scales=False),
        ),
    )


def _few(config, steps, few):
    return replace(config.train, steps=steps, warmup=min(config.train.warmup, 100), **few)


def _comparison(config: CompareConfig) -> Comparison:
    if config.data == "cifar10":
        return cifar10(config.data_dir)
    return {"shapes": SHAPES, "text": TEXT}[config.data]


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison that the arguments ask for; the exit code.

    It is 0 where all strategies passed, 1 where one failed, 2 for bad input.
    """
    passed, given = [], sys.argv[1:] if argv is None else argv

    def run():
        with arguments.refusals_in_one_line():
            config = tyro.cli(
                CompareConfig,
                prog="python -m experiments.compare_sampling",
                description="Every strategy on the same data, side by side.",
                args=given,
            )
        comparison = _comparison(config)
        if config.plugin:
            comparison = with_plugin(comparison, config.plugin)
        comparison = comparison.chosen(config.strategies, config.quick)
        resolve("gen_jax.comparison.figures:check_installed")()
        resolve("gen_jax.hosts:check_platform")()
        passed.append(resolve("gen_jax.comparison.run:compare")(config, comparison))

    code = cli.guarded(run, cli.command_line("compare_sampling", given))
    return code or int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
