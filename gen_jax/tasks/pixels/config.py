"""The configuration of models of pixel sequences, and their data; importing this loads no jax."""

import pathlib

from gen_jax import data as image_data
from gen_jax.config import RunConfig, frozen
from gen_jax.data import DataConfig, PixelSequences
from gen_jax.data.shapes import PALETTE
from gen_jax.models.autoregressive.config import SamplingOptions
from gen_jax.nn.config import TransformerConfig
from gen_jax.tasks.images.config import LabelledSampleConfig

__all__ = ["EvaluateConfig", "PixelsConfig"]


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
class PixelsConfig(RunConfig):
    """A model of pixels from data to samples."""

    data: DataConfig = DataConfig()
    model: TransformerConfig = TransformerConfig(extra_inputs=1)
    sample: LabelledSampleConfig = LabelledSampleConfig()
    sampler: SamplingOptions = SamplingOptions()
    """How each token is drawn."""
    evaluate: EvaluateConfig = EvaluateConfig()
    conditional: bool = False
    """Begin each image with the input of its class (set model.extra_inputs to their number)."""

    task = "pixels"
    make_task = "gen_jax.tasks.pixels.task:make"

    @property
    def vocabulary(self) -> int:
        """Values of a token."""
        return len(PALETTE) if self.data.palette else 256

    @property
    def classes(self) -> int:
        """Classes of a conditional model; else 0."""
        return self.model.extra_inputs if self.conditional else 0

    def __post_init__(self):
        model = self.model
        if not model.causal or model.memory:
            raise ValueError(
                "a model of pixels is causal and without memory: leave model.causal and "
                "model.memory as they are"
            )
        if model.vocabulary not in (0, self.vocabulary):
            raise ValueError(
                f"model.vocabulary must be {self.vocabulary}, or 0 for the same, got "
                f"{model.vocabulary}"
            )
        if not self.conditional and model.extra_inputs != 1:
            raise ValueError(
                "model.extra_inputs must be 1, the start of every image, got "
                f"{model.extra_inputs}; more are for --conditional"
            )
        if self.conditional and model.extra_inputs < 1:
            raise ValueError("conditional needs model.extra_inputs, the number of classes")
        if not -1 <= self.sample.label < max(self.classes, 1):
            raise ValueError(f"sample.label must be -1 or a class, got {self.sample.label}")

    def load(self, workdir: pathlib.Path, phases: tuple[str, ...]) -> dict[str, PixelSequences]:
        """The sequences of the splits that the phases need; refuses those that do not fit."""
        splits = {
            split: PixelSequences(image_data.load(self.data, split))
            for split in self.splits(phases)
        }
        for sequences in splits.values():
            if sequences.length != self.model.context:
                raise ValueError(
                    f"the images have {sequences.length} tokens "
                    f"({' x '.join(map(str, sequences.shape))}), model.context is "
                    f"{self.model.context}: set it to the same"
                )
            classes = len(sequences.images.label_names)
            if self.conditional and classes != self.classes:
                raise ValueError(
                    f"the data has {classes} classes, model.extra_inputs is {self.classes}"
                )
        return splits
