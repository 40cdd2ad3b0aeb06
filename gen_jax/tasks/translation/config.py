"""The configuration of translation models, and their data; importing this loads no jax."""

import dataclasses
import functools
import pathlib
from typing import Annotated, Literal

import numpy as np

from gen_jax.config import Choice, RunConfig, SampleConfig, frozen
from gen_jax.data import tokenizers, translation
from gen_jax.data.config import TranslationConfig, TranslationSplit
from gen_jax.data.translation import Pairs
from gen_jax.models.autoregressive.config import DecodingOptions, SamplingOptions
from gen_jax.models.masked.config import IterativeOptions, MaskConfig, MaskPredictOptions
from gen_jax.models.options import Usual, UsualSampler
from gen_jax.models.parallel.config import CTCOptions, LatentConfig, OneShotOptions, ParallelOptions
from gen_jax.nn.config import TransformerConfig

__all__ = [
    "TOKENIZER",
    "CompleteConfig",
    "EvaluateConfig",
    "TranslationData",
    "TranslationRunConfig",
    "TranslationSampleConfig",
]

TOKENIZER = "tokenizer.json"


@frozen
class TranslationSampleConfig(SampleConfig):
    """How many sources to translate, and which."""

    number: int = 1000
    """Sources of the split to translate, the first ones; fewer where it has fewer."""
    split: TranslationSplit = "test"
    """Which sources."""
    lengths: int = 5
    """Where the length is predicted: most probable lengths that are decoded in parallel; the best
    is kept."""
    latent_temperature: float = 0.0
    """Noise of the latent; 0 takes the mean or the likeliest code."""

    def __post_init__(self):
        super().__post_init__()
        if self.lengths < 1:
            raise ValueError(f"sample.lengths must be at least 1, got {self.lengths}")
        if self.latent_temperature < 0:
            raise ValueError(
                f"sample.latent_temperature must not be negative, got {self.latent_temperature}"
            )


@frozen
class CompleteConfig:
    """What to complete; for masked models."""

    source: str = ""
    """A sentence to translate."""
    target: str = "..."
    """Its translation as far as it is given: _ is one hidden token, ___ are three, and ... at the
    end leaves open what follows and how long it is."""


@frozen
class EvaluateConfig:
    """What to measure."""

    batch: int = 64
    """Pairs at a time."""

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"evaluate.batch must be at least 1, got {self.batch}")


Strategy = Literal["ar", "one_shot", "masked", "ctc"]
_SAMPLERS = {
    "ar": (SamplingOptions(temperature=0.0), DecodingOptions),
    "one_shot": (OneShotOptions(), OneShotOptions),
    "masked": (MaskPredictOptions(), IterativeOptions),
    "ctc": (CTCOptions(), CTCOptions),
}  # the usual one, and all that fit


@frozen
class TranslationRunConfig(RunConfig):
    """A translation model from pairs to BLEU."""

    strategy: Strategy = "masked"
    """One token at a time; all at once; masked tokens, in rounds; all at once by CTC."""
    data: TranslationConfig = TranslationConfig()
    model: TransformerConfig = TransformerConfig()
    """Of the decoder; the encoder has its sizes. Vocabulary and context come from the data."""
    encoder_layers: int = 3
    """Blocks of the encoder."""
    copies: bool = True
    """Parallel decoders: their inputs are the encoder's outputs, stretched (Gu et al. 2018)."""
    latent: LatentConfig = LatentConfig()
    mask: MaskConfig = MaskConfig()
    smoothing: float = 0.1
    """Label smoothing."""
    ctc_factor: int = 2
    """CTC: columns for each token of the source."""
    sample: TranslationSampleConfig = TranslationSampleConfig()
    sampler: Annotated[Choice, Usual, DecodingOptions, IterativeOptions, ParallelOptions] = (
        UsualSampler()
    )
    """How targets are found; it must fit the strategy. The usual one takes the likeliest token each
    time, one round, Mask-Predict in ten rounds, or the likeliest alignment."""
    evaluate: EvaluateConfig = EvaluateConfig()
    complete: CompleteConfig = CompleteConfig()

    task = "translation"
    make_task = "gen_jax.tasks.translation.task:make"
    commands = ("train", "sample", "evaluate", "distill", "complete")
    resumable = (*RunConfig.resumable, "data.targets", "complete.")

    def __post_init__(self):
        if self.encoder_layers < 1 or self.ctc_factor < 1:
            raise ValueError("encoder_layers and ctc_factor must be at least 1")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing}")
        if self.latent.kind != "none" and self.strategy != "one_shot":
            raise ValueError("latent.kind is for --strategy one_shot; set it to none")
        model, most = self.model, self.data.max_length
        if model.vocabulary or model.extra_inputs or model.memory or model.window:
            raise ValueError(
                "model.vocabulary, extra_inputs, memory and window follow from data and strategy: "
                "leave them as they are"
            )
        _, fitting = _SAMPLERS[self.strategy]
        if not isinstance(self.sampler, UsualSampler | fitting):
            kinds = getattr(fitting, "kinds", {fitting.__dict__.get("name"): fitting})
            raise ValueError(
                f"--sampler {self.sampler.name} is not for --strategy {self.strategy}; choose one "
                f"of usual, {', '.join(n for n, k in kinds.items() if issubclass(k, fitting))}"
            )
        rounds = getattr(self.decoding, "rounds", 1)
        if rounds > most:
            raise ValueError(
                f"sampler.rounds ({rounds}) are more than the positions of a target: at most "
                f"data.max_length, {most}"
            )
        if self.sample.lengths > most:
            raise ValueError(
                f"sample.lengths ({self.sample.lengths}) are more than the table of lengths has: "
                f"at most data.max_length, {most}"
            )

    @property
    def decoding(self) -> Choice:
        """The options of the sampler, the usual one of the strategy where none is named."""
        usual, _ = _SAMPLERS[self.strategy]
        return usual if isinstance(self.sampler, UsualSampler) else self.sampler

    def load(self, workdir: pathlib.Path, phases: tuple[str, ...]) -> "TranslationData":
        """The pairs and their tokens; refuses those that do not fit."""
        data = TranslationData(self, workdir)
        _ = data.tokenizer
        splits = self.splits(phases)
        if "train" in splits:
            data.pairs("train").batch(0, 0, 1)
        if "test" in splits:
            _ = data.pairs("validation")
        previewed = "train" in phases and self.train.preview_every
        if {"sample", "evaluate"} & set(phases) or previewed:
            _ = data.pairs(self.sample.split)
        if "complete" in phases:
            if self.strategy != "masked":
                raise ValueError("complete is for masked models: --strategy masked")
            if not self.complete.source.strip():
                raise ValueError("give the sentence to translate as --complete.source")
            _ = data.completion
        return data


@dataclasses.dataclass(frozen=True, eq=False)
class TranslationData:
    """The pairs of a run, its tokenizer, and what follows from both; each is read when needed.

    Attributes:
      config: of the run.
      workdir: of the run, whose tokenizer counts where it has one.
    """

    config: TranslationRunConfig
    workdir: pathlib.Path

    @functools.cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """That of the work directory, or of the run that this one starts from, if there is one."""
        path = self.workdir / TOKENIZER
        if not path.exists() and self.config.init_from:
            path = pathlib.Path(self.config.init_from).expanduser() / TOKENIZER
        if path.exists():
            return tokenizers.load(path)
        return translation.make_tokenizer(self.config.data)

    @functools.cached_property
    def _texts(self):
        return {}

    @functools.cached_property
    def _pairs(self):
        return {}

    def texts(self, split: TranslationSplit) -> tuple[list[str], list[str]]:
        """Sources and targets of a split."""
        if split not in self._texts:
            self._texts[split] = translation.load_pairs(self.config.data, split)
        return self._texts[split]

    def pairs(self, split: TranslationSplit) -> Pairs:
        """The tokens of a split: of training pairs those that are short enough, else all."""
        if split not in self._pairs:
            long = "leave out" if split == "train" else "truncate"
            most = self.config.data.max_length
            texts = self.texts(split)
            self._pairs[split] = Pairs.encode(self.tokenizer, *texts, most, long=long)
        return self._pairs[split]

    @functools.cached_property
    def completion(self) -> tuple[Pairs, list[int | None], bool]:
        """The source as a pair, what is given of the target, and whether it goes on after that."""
        choice, most = self.config.complete, self.config.data.max_length
        source = choice.source.strip()
        pair = Pairs.encode(self.tokenizer, [source], [source], most, long="leave out")
        given, is_open = translation.parse_template(self.tokenizer, choice.target)
        if len(given) > most:
            raise ValueError(
                f"complete.target has {len(given)} tokens, the model at most {most}: give fewer"
            )
        return pair, given, is_open

    @functools.cached_property
    def model(self) -> TransformerConfig:
        """The decoder, as the strategy needs it."""
        config = self.config
        blank = config.strategy == "ctc"
        return dataclasses.replace(
            config.model,
            vocabulary=self.tokenizer.vocabulary + blank,
            context=config.data.max_length * (config.ctc_factor if blank else 1),
            causal=config.strategy == "ar",
            extra_inputs=1,
            memory=True,
        )

    def texts_of(self, tokens) -> list[str]:
        """Translations int32 [B, L] as texts, up to EOS."""
        lengths = [tokens.shape[1]] * len(tokens)
        return translation.texts_of(self.tokenizer, tokens, np.array(lengths))
