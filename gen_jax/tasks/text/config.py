"""The configuration of models of text, and their data; importing this loads no jax."""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Int

from gen_jax.config import RunConfig, SampleConfig, frozen
from gen_jax.data import TextConfig
from gen_jax.interop.transformers_options import read_network
from gen_jax.models.autoregressive.config import (
    DecodingOptions,
    SamplingOptions,
    SpeculativeOptions,
)
from gen_jax.nn.config import TransformerConfig
from gen_jax.tasks.text_source import TOKENIZER, TextSource

__all__ = ["EvaluateConfig", "TextData", "TextRunConfig", "TextSampleConfig"]


@frozen
class TextSampleConfig(SampleConfig):
    """How many samples to draw, of which length, and what they go on from."""

    prompt: str = "\n"
    """Text that every sample goes on from."""
    tokens: int = 500
    """New tokens of a sample."""
    stop: str = ""
    """Text of the one token that ends a sample; "eos" for the tokenizer's own, empty for none."""

    def __post_init__(self):
        super().__post_init__()
        if not self.prompt:
            raise ValueError("sample.prompt is empty: a model of text needs a token to go on from")
        if self.tokens < 1:
            raise ValueError(f"sample.tokens must be at least 1, got {self.tokens}")


@frozen
class EvaluateConfig:
    """What to measure."""

    tokens: int = 0
    """Tokens of the test split, the first ones; 0 for all."""
    batch: int = 64
    """Windows at a time."""

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"evaluate.batch must be at least 1, got {self.batch}")
        if self.tokens < 0 or self.tokens == 1:
            raise ValueError(f"evaluate.tokens must be 0 or at least 2, got {self.tokens}")


@frozen
class TextRunConfig(RunConfig):
    """A model of text from data to samples."""

    data: TextConfig = TextConfig()
    tokenizer: str = "chars"
    """bytes, chars (those of the text), or the path of a tokenizer.json."""
    model: TransformerConfig = TransformerConfig()
    sample: TextSampleConfig = TextSampleConfig()
    sampler: DecodingOptions = SamplingOptions()
    """How tokens are chosen: drawn, or searched for."""
    evaluate: EvaluateConfig = EvaluateConfig()
    pretrained: str = ""
    """Folder of a GPT-2, Llama, Mistral or Qwen2 of transformers, which gives the network's sizes
    and the tokenizer: train starts from it, sample draws from it."""

    task = "text"
    make_task = "gen_jax.tasks.text.task:make"
    commands = ("train", "sample", "evaluate", "export")
    resumable = (*RunConfig.resumable, "data.path")

    def __post_init__(self):
        if not self.tokenizer:
            raise ValueError("tokenizer is empty; choose bytes, chars or a tokenizer.json")
        if self.pretrained and self.tokenizer in ("bytes", "chars"):
            raise ValueError(
                f"{self.pretrained} has no {TOKENIZER}: give --tokenizer the path of that of its "
                "vocabulary"
            )
        model = self.model
        if not model.causal or model.memory or model.extra_inputs:
            raise ValueError(
                "a model of text is causal, without memory and extra inputs: leave model.causal, "
                "model.memory and model.extra_inputs as they are"
            )
        if isinstance(self.sampler, SpeculativeOptions) and not self.sampler.draft:
            raise ValueError("give the run of a smaller model as --sampler.draft")
        if self.searches and self.sample.number > 1:
            raise ValueError("beam search finds one text, always the same: set sample.number to 1")
        if self.searches and self.sample.tokens >= model.context:
            raise ValueError(
                f"beam search stays within the context: sample.tokens ({self.sample.tokens}) "
                f"must be less than model.context ({model.context})"
            )

    def published(self, folder: str) -> dict[str, Any]:
        """The network of the folder, and its tokenizer.json where there is one.

        The type that is computed with, and dropout, which training alone reads, stay.
        """
        _, network, _ = read_network(folder)
        kept = {"dtype": self.model.dtype, "dropout": self.model.dropout}
        fields, path = {"model": dataclasses.replace(network, **kept)}, pathlib.Path(folder)
        tokenizer = path.expanduser() / TOKENIZER
        return fields | ({"tokenizer": str(tokenizer)} if tokenizer.is_file() else {})

    @property
    def searches(self) -> bool:
        """Whether sampling is a search, which draws nothing."""
        return self.sampler.deterministic

    def load(self, workdir: pathlib.Path, phases: tuple[str, ...]) -> "TextData":
        """The text and its tokens; refuses a text, a tokenizer or a prompt that does not fit."""
        data = TextData(self, workdir, phases)
        _ = data.model
        if "train" in self.splits(phases):
            data.train_stream.batch(0, 0, 1, length=self.model.context)
        if "test" in self.splits(phases):
            data.test_stream.windows(self.model.context)
        if "sample" in phases or ("train" in phases and self.train.preview_every):
            _ = data.prompt, data.eos
        return data


@dataclasses.dataclass(frozen=True, eq=False)
class TextData(TextSource):
    """What a run of an autoregressive model of text reads, each part when it is needed."""

    config: TextRunConfig

    @functools.cached_property
    def prompt(self) -> Int[np.ndarray, " P"]:
        """Tokens of the prompt."""
        try:
            tokens = self.tokenizer.encode(self.config.sample.prompt)
        except ValueError as error:
            raise ValueError(f"sample.prompt: {error}") from None
        if not 1 <= len(tokens) <= self.model.context:
            raise ValueError(
                f"sample.prompt has {len(tokens)} tokens; it needs at least 1, and at most the "
                f"context of the model, {self.model.context}"
            )
        return np.asarray(tokens, np.int32)

    @functools.cached_property
    def eos(self) -> int | None:
        """The token that ends a sample, or None."""
        name = self.config.sample.stop
        if not name:
            return None
        if name == "eos":
            if self.tokenizer.eos is None:
                raise ValueError("sample.stop: this tokenizer has no EOS; name a text of one token")
            return self.tokenizer.eos
        try:
            tokens = self.tokenizer.encode(name)
        except ValueError as error:
            raise ValueError(f"sample.stop: {error}") from None
        if len(tokens) != 1:
            raise ValueError(f"sample.stop must be one token; {name!r} is {len(tokens)}")
        return int(tokens[0])
