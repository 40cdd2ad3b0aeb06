"""The configuration of masked models of pixels; importing this loads no jax."""

import dataclasses
from typing import Literal

from gen_jax.config import frozen
from gen_jax.models.masked.config import (
    IterativeOptions,
    MaskConfig,
    MaskGITOptions,
    MaskPredictOptions,
)
from gen_jax.nn.config import TransformerConfig
from gen_jax.tasks.pixels.config import PixelRunConfig

__all__ = ["CompleteConfig", "EvaluateConfig", "MaskedPixelsConfig"]


@frozen
class EvaluateConfig:
    """What to measure."""

    images: int = 648
    """Test images for the bound of the likelihood (all of them when there are fewer)."""
    draws: int = 16
    """Stratified draws of the number of hidden pixels, per image."""
    batch: int = 64
    """Images at a time."""

    def __post_init__(self):
        if min(self.images, self.draws, self.batch) < 1:
            raise ValueError("evaluate.images, .draws and .batch must be at least 1")


@frozen
class CompleteConfig:
    """What to complete: test images, of which a part is hidden."""

    hide: Literal["middle", "top", "bottom", "left", "right", "random"] = "middle"
    """The middle half of the rows and of the columns, half of the image, or half of the pixels."""
    images: int = 8
    """Test images, the first ones."""
    fills: int = 6
    """How often each is completed."""

    def __post_init__(self):
        if min(self.images, self.fills) < 1:
            raise ValueError("complete.images and complete.fills must be at least 1")


@frozen
class MaskedPixelsConfig(PixelRunConfig):
    """A masked model of pixels from data to samples."""

    model: TransformerConfig = TransformerConfig(causal=False, extra_inputs=1)
    mask: MaskConfig = MaskConfig()
    sampler: IterativeOptions = MaskGITOptions()
    """What a round reveals, and what it masks again."""
    evaluate: EvaluateConfig = EvaluateConfig()
    complete: CompleteConfig = CompleteConfig()

    task = "masked_pixels"
    make_task = "gen_jax.tasks.masked_pixels.task:make"
    commands = ("train", "sample", "evaluate", "complete")
    resumable = (*PixelRunConfig.resumable, "complete.")
    extra_input = "the mask"
    causal = False
    class_inputs = 1

    def __post_init__(self):
        super().__post_init__()
        draws = self.sample.number > 1 and not self.conditional
        if isinstance(self.sampler, MaskPredictOptions) and draws:
            raise ValueError(
                "Mask-Predict finds one image, always the same: set sample.number to 1"
            )

    def network(self, classes: int) -> TransformerConfig:
        """The network of a model of so many classes, whose token comes before the image."""
        network = super().network(classes)
        return dataclasses.replace(network, context=network.context + bool(classes))

    def splits(self, phases: tuple[str, ...]) -> tuple[str, ...]:
        """As of `RunConfig`; what is completed is of the test split."""
        return super().splits(("evaluate",) if "complete" in phases else phases)
