"""The configuration of diffusion models of images, and their data; importing this loads no jax."""

import dataclasses
import pathlib
import sys
from typing import Any

from gen_jax import data as image_data
from gen_jax.config import RunConfig, SampleConfig, frozen
from gen_jax.data import DataConfig, Images
from gen_jax.interop.diffusers_options import read_network
from gen_jax.interop.diffusers_schedulers import read_process
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.solvers import Ancestral, Solver
from gen_jax.nn.config import UNetConfig

__all__ = ["EvaluateConfig", "ImagesConfig", "LabelledSampleConfig", "check_label"]


@frozen
class LabelledSampleConfig(SampleConfig):
    """How many samples to draw, and of which class."""

    label: int = -1
    """Class of all samples of a conditional model; -1 for all classes in turn."""


def check_label(label: int, conditional: bool, classes: int) -> None:
    """Refuses a label that is no class.

    Args:
      label: -1 for all classes in turn, or a class.
      conditional: whether the model has classes.
      classes: how many; 0 where the data is to tell.

    Raises:
      ValueError: the label is not possible.
    """
    known = classes or not conditional
    if label < -1 or (known and label >= max(classes, 1)):
        raise ValueError(f"sample.label must be -1 or a class, got {label}")


@frozen
class EvaluateConfig:
    """What to measure."""

    images: int = 256
    """Test images for bits per dimension (all of them when there are fewer)."""
    draws: int = 32
    """Stratified draws of the time step per image; 0 for all T terms of the bound."""
    batch: int = 64
    """Images at a time."""

    def __post_init__(self):
        if self.images < 1 or self.batch < 1 or self.draws < 0:
            raise ValueError("evaluate.images and .batch must be at least 1, .draws at least 0")


@frozen
class ImagesConfig(RunConfig):
    """A diffusion model of images from data to samples."""

    data: DataConfig = DataConfig()
    model: UNetConfig = UNetConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sample: LabelledSampleConfig = LabelledSampleConfig()
    sampler: Solver = Ancestral()
    """How the reverse process is solved."""
    evaluate: EvaluateConfig = EvaluateConfig()
    conditional: bool = False
    """Condition on the labels of the data; their number is model.classes, or the data's where that
    is 0."""
    pretrained: str = ""
    """Folder of a UNet2DModel of diffusers, which gives the network's sizes and the process: train
    starts from it, sample draws from it."""

    task = "images"
    make_task = "gen_jax.tasks.images.task:make"
    commands = ("train", "sample", "evaluate", "export")

    def __post_init__(self):
        self.sampler.check(self.diffusion)
        if self.model.classes and not self.conditional:
            raise ValueError(
                f"model.classes is {self.model.classes}, which is for --conditional: set both or "
                "neither"
            )
        if self.sampler.guidance != 1.0 and not self.conditional:
            raise ValueError("sampler.guidance needs a conditional model")
        outputs = self.model.channels * (2 if self.diffusion.variance == "learned" else 1)
        if self.model.out_channels != outputs:
            raise ValueError(
                f"model.out_channels must be {outputs} with diffusion.variance "
                f"{self.diffusion.variance}, got {self.model.out_channels}"
            )
        check_label(self.sample.label, self.conditional, self.model.classes)
        if self.data.palette:
            raise ValueError("a diffusion model takes RGB images: leave data.palette off")

    def published(self, folder: str) -> dict[str, Any]:
        """The network of the folder, and the process of the scheduler beside it or DDPM's.

        The type that is computed with, and dropout, which training alone reads, stay.
        """
        if (pathlib.Path(folder).expanduser() / "vqvae").is_dir():
            raise ValueError(
                f"{folder} draws latents, not images: interop.load_diffusers_ldm reads it"
            )
        _, network, _ = read_network(folder)
        process = read_process(folder) or DiffusionConfig()
        if network.out_channels == 2 * network.channels:
            process = dataclasses.replace(process, variance="learned")
        if not network.null_class:
            process = dataclasses.replace(process, label_dropout=0.0)
        kept = {"dtype": self.model.dtype, "dropout": self.model.dropout}
        model = dataclasses.replace(network, **kept)
        return {"model": model, "diffusion": process, "conditional": network.classes > 0}

    def load(self, workdir: pathlib.Path, phases: tuple[str, ...]) -> dict[str, Images]:
        """The images of the splits that the phases need; refuses those that do not fit."""
        if self.pretrained and read_process(self.pretrained) is None:
            process = self.diffusion
            print(
                f"{self.pretrained} has no scheduler_config.json: its process is taken to be "
                f"--diffusion.schedule {process.schedule}, --diffusion.prediction "
                f"{process.prediction}, --diffusion.variance {process.variance}",
                file=sys.stderr,
            )
        splits = {split: image_data.load(self.data, split) for split in self.splits(phases)}
        for images in splits.values():
            self._check_images(images)
        return splits

    def _check_images(self, images):
        height, width, channels = images.images.shape[1:]
        model = self.model
        if channels != model.channels:
            raise ValueError(
                f"the images have {channels} channels, model.channels is {model.channels}"
            )
        if height % model.stride or width % model.stride:
            raise ValueError(
                f"images of {height} x {width} do not fit the model: height and width must be "
                f"multiples of {model.stride} (model.patch x 2 per level of model.widths)"
            )
        heights = [height // model.patch // 2**level for level in range(len(model.widths))]
        if not set(model.attention) <= set(heights):
            raise ValueError(
                f"model.attention {model.attention} names feature maps that are not there; "
                f"their heights are {heights}"
            )
        classes = len(images.label_names)
        if model.classes not in (0, classes):
            raise ValueError(
                f"the data has {classes} classes, model.classes is {model.classes}; with 0 their "
                "number is taken from the data"
            )
