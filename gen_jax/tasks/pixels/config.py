"""The configuration of models of pixel sequences, and their data; importing this loads no jax."""

import dataclasses
import functools
import pathlib
from typing import ClassVar

from gen_jax import data as image_data
from gen_jax.config import RunConfig, frozen
from gen_jax.data import DataConfig, PixelSequences, ShapesSet
from gen_jax.data.shapes import PALETTE
from gen_jax.models.autoregressive.config import SamplingOptions
from gen_jax.nn.config import TransformerConfig
from gen_jax.tasks.images.config import LabelledSampleConfig, check_label

__all__ = ["EvaluateConfig", "PixelRunConfig", "PixelsConfig"]


@frozen
class EvaluateConfig:
    """What to measure."""

    images: int = 648
    """Test images for the likelihood (all of them when there are fewer)."""
    batch: int = 64
    """Images at a time."""

    def __post_init__(self):
        if self.images < 1 or self.batch < 1:
            raise ValueError("evaluate.images and evaluate.batch must be at least 1")


@frozen
class PixelRunConfig(RunConfig):
    """What the runs of all models of pixels share.

    Attributes:
      extra_input: what an unconditional model's one extra input is.
      causal: whether a pixel sees those before it alone.
      class_inputs: extra inputs of a model of no classes, beside one for each class.
    """

    data: DataConfig = DataConfig()
    patch: int = 1
    """Side of the squares of pixels that are one token each; above 1 for palette images, whose
    squares make a dictionary."""
    model: TransformerConfig = TransformerConfig(extra_inputs=1)
    sample: LabelledSampleConfig = LabelledSampleConfig()
    conditional: bool = False
    """Condition on the classes of the data."""

    extra_input: ClassVar[str]
    causal: ClassVar[bool]
    class_inputs: ClassVar[int]

    @property
    def vocabulary(self) -> int:
        """Values of a token."""
        if self.patch > 1:
            return self.palette_sequences().vocabulary
        return len(PALETTE) if self.data.palette else 256

    def palette_sequences(self) -> PixelSequences:
        """All palette images, which have the dictionary of the patches."""
        return _palette_sequences(self.data.size, self.patch)

    @property
    def classes(self) -> int:
        """Classes of a conditional model; 0 where the data tells how many, or there are none."""
        given = self.model.extra_inputs - self.class_inputs
        return given if self.conditional and self.model.extra_inputs > 1 else 0

    def network(self, classes: int) -> TransformerConfig:
        """The network of a model of so many classes, 0 for an unconditional one."""
        inputs = self.class_inputs + classes if classes else 1
        return dataclasses.replace(
            self.model, vocabulary=self.vocabulary, extra_inputs=inputs, causal=self.causal
        )

    def __post_init__(self):
        model = self.model
        if self.patch < 1 or (self.patch > 1 and (not self.data.palette or self.data.flip)):
            raise ValueError(
                f"patch is {self.patch}: it must be at least 1, and above 1 it is for palette "
                "images that are not flipped"
            )
        if model.memory or model.causal != self.causal:
            raise ValueError(
                f"this model of pixels has model.causal {self.causal} and no memory: leave "
                "model.causal and model.memory as they are"
            )
        if model.vocabulary not in (0, self.vocabulary):
            raise ValueError(
                f"model.vocabulary must be {self.vocabulary}, or 0 for the same, got "
                f"{model.vocabulary}"
            )
        if not self.conditional and model.extra_inputs != 1:
            raise ValueError(
                f"model.extra_inputs must be 1, {self.extra_input}, got "
                f"{model.extra_inputs}; more are for --conditional"
            )
        if model.extra_inputs < 1:
            raise ValueError(
                "model.extra_inputs must be at least 1; with 1 a conditional model takes the "
                "number of classes from the data"
            )
        check_label(self.sample.label, self.conditional, self.classes)

    def load(self, workdir: pathlib.Path, phases: tuple[str, ...]) -> dict[str, PixelSequences]:
        """The sequences of the splits that the phases need; refuses those that do not fit."""
        splits = {
            split: PixelSequences(image_data.load(self.data, split), self.patch)
            for split in self.splits(phases)
        }
        for sequences in splits.values():
            if sequences.length != self.model.context:
                raise ValueError(
                    f"the images have {sequences.length} tokens "
                    f"({' x '.join(map(str, sequences.shape))}"
                    f"{f' in patches of {self.patch}' * (self.patch > 1)}), model.context is "
                    f"{self.model.context}: set it to the same"
                )
            classes = len(sequences.images.label_names)
            if self.classes not in (0, classes):
                raise ValueError(
                    f"the data has {classes} classes, model.extra_inputs is for {self.classes}; "
                    "with 1 their number is taken from the data"
                )
        return splits


@functools.cache
def _palette_sequences(size, patch):
    return PixelSequences(ShapesSet(size).as_images(palette=True), patch)


@frozen
class PixelsConfig(PixelRunConfig):
    """An autoregressive model of pixels from data to samples.

    A conditional one begins each image with the input of its class.
    """

    sampler: SamplingOptions = SamplingOptions()
    """How each token is drawn."""
    evaluate: EvaluateConfig = EvaluateConfig()

    task = "pixels"
    make_task = "gen_jax.tasks.pixels.task:make"
    extra_input = "the start of every image"
    causal = True
    class_inputs = 0
