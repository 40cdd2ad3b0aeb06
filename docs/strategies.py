"""Draws the first picture of the README: samples of the same images by one strategy after another.

    python docs/strategies.py RUNS PICTURE

RUNS holds the work directories ddpm_cifar_tiny, gpt_pixels_patches and masked_pixels_tiny.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot

import gen_jax
from gen_jax.models.masked.config import MaskGITOptions, RepairOptions

matplotlib.use("Agg")
_SAMPLES = 16


def main(runs: Path, picture: Path) -> None:
    """Draws a panel for each strategy; each is a grid of samples of the seed 0."""
    masked = runs / "masked_pixels_tiny"
    strategies = (
        ("one square after another", runs / "gpt_pixels_patches", {}),
        ("all at once", masked, {"sampler": MaskGITOptions(rounds=1)}),
        ("in 4 rounds", masked, {"sampler": MaskGITOptions(rounds=4)}),
        ("in 16 rounds", masked, {"sampler": MaskGITOptions(rounds=16)}),
        ("erase and repair", masked, {"sampler": RepairOptions(rounds=64)}),
        ("from noise to clean", runs / "ddpm_cifar_tiny", {}),
    )
    figure, axes = pyplot.subplots(1, len(strategies), figsize=(12, 2.5), layout="constrained")
    for axis, (title, workdir, changes) in zip(axes, strategies, strict=True):
        run = gen_jax.load(workdir, **changes)
        keys = gen_jax.sample_keys(0, 0, _SAMPLES)
        samples = gen_jax.generate(run.sampler, run.params, keys, run.condition(_SAMPLES))
        axis.imshow(run.show(np.asarray(samples)), interpolation="nearest")
        axis.set_title(f"{title}\nNFE {run.sampler.nfe}", fontsize=9)
        axis.axis("off")
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("error: give the folder of the runs, and the picture to write", file=sys.stderr)
        sys.exit(2)
    main(*map(Path, sys.argv[1:]))
