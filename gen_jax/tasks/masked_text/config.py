"""The configuration of masked models of text, and their data; importing this loads no jax."""

import dataclasses
import functools
import pathlib
import re

import numpy as np
from jaxtyping import Int

from gen_jax.config import RunConfig, SampleConfig, frozen
from gen_jax.data import TextConfig
from gen_jax.models.masked.config import (
    AbsorbingDiffusionOptions,
    IterativeOptions,
    MaskConfig,
    MaskPredictOptions,
)
from gen_jax.nn.config import TransformerConfig
from gen_jax.tasks.text_source import TextSource

__all__ = [
    "CompleteConfig",
    "EvaluateConfig",
    "MaskedTextConfig",
    "MaskedTextData",
    "MaskedTextSampleConfig",
]


@frozen
class MaskedTextSampleConfig(SampleConfig):
    """How many samples to draw, of which length, and what they begin with."""

    prompt: str = ""
    """Text that every sample begins with."""
    tokens: int = 0
    """Tokens of a sample, those of the prompt included; 0 for the context of the model."""

    def __post_init__(self):
        super().__post_init__()
        if self.tokens < 0:
            raise ValueError(f"sample.tokens must not be negative, got {self.tokens}")


@frozen
class EvaluateConfig:
    """What to measure."""

    tokens: int = 0
    """Tokens of the test split, the first ones; 0 for all."""
    draws: int = 8
    """Stratified draws of the number of hidden tokens, per window."""
    batch: int = 64
    """Windows at a time."""

    def __post_init__(self):
        if min(self.draws, self.batch) < 1:
            raise ValueError("evaluate.draws and evaluate.batch must be at least 1")
        if self.tokens < 0:
            raise ValueError(f"evaluate.tokens must not be negative, got {self.tokens}")


@frozen
class CompleteConfig:
    """A text with holes."""

    text: str = ""
    """What is given, with the character of `hole` for each hidden token."""
    hole: str = "_"
    """The character that stands for a hidden token."""
    fills: int = 4
    """How often the text is completed."""

    def __post_init__(self):
        if len(self.hole) != 1:
            raise ValueError(f"complete.hole must be one character, got {self.hole!r}")
        if self.fills < 1:
            raise ValueError(f"complete.fills must be at least 1, got {self.fills}")


@frozen
class MaskedTextConfig(RunConfig):
    """A masked model of text from data to samples."""

    data: TextConfig = TextConfig()
    tokenizer: str = "chars"
    """bytes, chars (those of the text), or the path of a tokenizer.json."""
    model: TransformerConfig = TransformerConfig(causal=False, extra_inputs=1)
    mask: MaskConfig = MaskConfig()
    sample: MaskedTextSampleConfig = MaskedTextSampleConfig()
    sampler: IterativeOptions = AbsorbingDiffusionOptions()
    """What a round reveals, and what it masks again."""
    evaluate: EvaluateConfig = EvaluateConfig()
    complete: CompleteConfig = CompleteConfig()

    task = "masked_text"
    make_task = "gen_jax.tasks.masked_text.task:make"
    commands = ("train", "sample", "evaluate", "complete")
    resumable = (*RunConfig.resumable, "data.path", "complete.")

    def __post_init__(self):
        if not self.tokenizer:
            raise ValueError("tokenizer is empty; choose bytes, chars or a tokenizer.json")
        model = self.model
        if model.causal or model.memory or model.extra_inputs != 1:
            raise ValueError(
                "a masked model of text sees all tokens, has one extra input, the mask, and no "
                "memory: set model.causal to false and model.extra_inputs to 1"
            )
        if self.length > model.context:
            raise ValueError(
                f"sample.tokens ({self.length}) must be at most model.context ({model.context})"
            )
        if isinstance(self.sampler, MaskPredictOptions) and self.sample.number > 1:
            raise ValueError("Mask-Predict finds one text, always the same: set sample.number to 1")

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return self.sample.tokens or self.model.context

    def load(self, workdir: pathlib.Path, phases: tuple[str, ...]) -> "MaskedTextData":
        """The text and its tokens; refuses a text, a tokenizer or a prompt that does not fit."""
        data = MaskedTextData(self, workdir, phases)
        _ = data.model
        if "train" in self.splits(phases):
            data.train_stream.batch(0, 0, 1, length=self.model.context - 1)
        if "test" in self.splits(phases):
            _ = data.test_windows
        if "sample" in phases or ("train" in phases and self.train.preview_every):
            _ = data.prompt
        if "complete" in phases:
            _ = data.template
        return data


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedTextData(TextSource):
    """What a run of a masked model of text reads, each part when it is needed."""

    config: MaskedTextConfig

    @functools.cached_property
    def test_windows(self) -> Int[np.ndarray, "windows L"]:
        """The test split in windows of one context each, without the rest."""
        tokens, length = self.test_stream.tokens, self.config.model.context
        if len(tokens) < length:
            raise ValueError(
                f"the test split has {len(tokens)} tokens, fewer than model.context, {length}: "
                "give a longer text, or a larger --data.validation or --evaluate.tokens"
            )
        number = len(tokens) // length
        return tokens[: number * length].reshape(number, length).astype(np.int32)

    @functools.cached_property
    def prompt(self) -> Int[np.ndarray, " P"]:
        """Tokens that samples begin with."""
        tokens = self._encode("sample.prompt", self.config.sample.prompt)
        if len(tokens) >= self.config.length:
            raise ValueError(
                f"sample.prompt has {len(tokens)} tokens; a sample has {self.config.length}, and "
                "at least one of them must be left to draw"
            )
        return tokens

    @functools.cached_property
    def template(self) -> list[int | None]:
        """Tokens of the text to complete, None for each hole."""
        choice, ids = self.config.complete, []
        for part in re.split(f"({re.escape(choice.hole)}+)", choice.text):
            holes = bool(part) and not part.strip(choice.hole)
            ids += [None] * len(part) if holes else self._encode("complete.text", part).tolist()
        if None not in ids:
            raise ValueError(
                "give a text with holes as --complete.text, for example "
                f'"The {choice.hole * 4} of"; --complete.hole is the character of a hole'
            )
        most = self.config.model.context
        if len(ids) > most:
            raise ValueError(f"complete.text has {len(ids)} tokens, the model at most {most}")
        return ids

    def _encode(self, name, part):
        try:
            return np.asarray(self.tokenizer.encode(part), np.int32)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
