"""Translation by one unit at a time, all at once, and in rounds, on one architecture.

    python -m experiments.nar_translation
        Preset tiny: a procedural task with known modes (two word orders, two styles), two CPU
        cores, no network. A masked model, decoded by Mask-Predict.

    python -m experiments.nar_translation --preset multi30k --data.dir DIR --strategy ar
        English to German of Multi30k (29,000 pairs), a small transformer for a CPU. --strategy
        names what is trained: ar, one_shot, masked (Mask-Predict, MaskGIT) or ctc; --latent.kind
        gives the one-shot decoder a latent that all positions share.

    python -m experiments.nar_translation distill --workdir AR_RUN
    python -m experiments.nar_translation --preset multi30k --data.dir DIR --strategy masked \
            --data.targets AR_RUN/distilled.txt --workdir RUN
        Sequence-level knowledge distillation (Kim & Rush 2016, 1606.07947).

    python -m experiments.nar_translation complete --workdir RUN --complete.source "a man runs" \
            --complete.target "ein _ läuft"
        A masked model fills the holes of a translation, and goes on from a prefix ("ein mann...").

    python -m experiments.nar_translation sample --workdir RUN --sample.rounds 4

    python -m experiments.nar_translation --preset wmt16 --data.dir DIR
        Transformer base on TFDS's wmt16_translate, by the recipe of Mask-Predict. Published, on
        WMT14 English to German with distillation (Ghazvininejad et al. 2019): 18.05, 25.94 and
        27.03 BLEU with 1, 4 and 10 rounds; the autoregressive transformer 27.3 (Vaswani et al.
        2017); the first parallel decoder 17.69 at 15.6 times its speed (Gu et al. 2018).

What was measured, with hardware and time, is in docs/results.md.
"""

import dataclasses
import math
import sys
from typing import Literal

from experiments import common, run, translation_run
from gen_jax.config import DistributedConfig, TrainConfig
from gen_jax.data.config import TranslationConfig, TranslationSplit
from gen_jax.models.masked.config import MaskConfig
from gen_jax.models.masked.schedules import SCHEDULES
from gen_jax.models.parallel.config import LatentConfig
from gen_jax.nn.config import TransformerConfig

Decoder = Literal["mask_predict", "maskgit", "random_order", "absorbing"]


@dataclasses.dataclass(frozen=True)
class SampleConfig(run.SampleConfig):
    """How to translate."""

    number: int = 1000
    """Sources of the split to translate, the first ones; fewer where it has fewer."""
    split: TranslationSplit = "test"
    """Which sources."""
    beams: int = 1
    """Autoregressive: hypotheses of beam search; 1 takes the likeliest token each time."""
    length_penalty: float = 1.0
    """Beam search ranks by log-probability / length ** length_penalty."""
    decoder: Decoder = "mask_predict"
    """Masked: which sampler in rounds."""
    rounds: int = 10
    """Masked: rounds, at most the columns."""
    schedule: Literal[tuple(SCHEDULES)] = "linear"
    """Masked: how many tokens are masked after each round; linear in Mask-Predict."""
    lengths: int = 5
    """Most probable lengths that are decoded in parallel; the best is kept."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest tokens."""
    choice_temperature: float = 1.0
    """MaskGIT: noise of the confidence."""
    latent_temperature: float = 0.0
    """Noise of the latent; 0 takes the mean or the likeliest code."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("beams", "rounds", "lengths"):
            if getattr(self, name) < 1:
                raise ValueError(f"sample.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "choice_temperature", "latent_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"sample.{name} must be finite, not negative, got "
                                 f"{getattr(self, name)}")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CompleteConfig:
    """What to complete; for masked models."""

    source: str = ""
    """A sentence to translate."""
    target: str = "..."
    """Its translation as far as it is given: _ is one hidden token, ___ are three, and ... at the
    end leaves open what follows and how long it is."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""

    batch: int = 64
    """Pairs at a time."""

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"evaluate.batch must be at least 1, got {self.batch}")


@dataclasses.dataclass(frozen=True)
class Config:
    """A translation model from pairs to BLEU."""

    workdir: str
    """Directory of the run: records, checkpoints, translations. A run in it is resumed."""
    strategy: Literal["ar", "one_shot", "masked", "ctc"] = "masked"
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
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    complete: CompleteConfig = CompleteConfig()
    distributed: DistributedConfig = DistributedConfig()
    pretrained: str = ""
    """Must stay empty: no other project's weights are read."""

    def __post_init__(self):
        if self.pretrained:
            raise ValueError("pretrained: no weights of others can be read for this experiment")
        if self.encoder_layers < 1 or self.ctc_factor < 1:
            raise ValueError("encoder_layers and ctc_factor must be at least 1")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing}")
        if self.latent.kind != "none" and self.strategy != "one_shot":
            raise ValueError("latent.kind is for --strategy one_shot; set it to none")
        model = self.model
        if model.vocabulary or model.extra_inputs or model.memory or model.window:
            raise ValueError("model.vocabulary, extra_inputs, memory and window follow from data "
                             "and strategy: leave them as they are")  # fmt: skip
        if self.sample.rounds > self.data.max_length:
            raise ValueError(
                f"sample.rounds ({self.sample.rounds}) are more than the positions of a target: "
                f"at most data.max_length, {self.data.max_length}"
            )
        if self.sample.lengths > self.data.max_length:
            raise ValueError(
                f"sample.lengths ({self.sample.lengths}) are more than the table of lengths has: "
                f"at most data.max_length, {self.data.max_length}"
            )


TINY = Config(
    workdir="runs/nar_translation_tiny",
    data=TranslationConfig(max_length=20, pairs=50_000),
    model=TransformerConfig(layers=2, width=128, heads=4, mlp_dim=256, position="both"),
    encoder_layers=2,
    smoothing=0.0,
    train=TrainConfig(
        steps=3000, batch=64, learning_rate=2e-3, warmup=200, decay="cosine", final_rate=0.02,
        beta2=0.98, ema=0.99, ema_warmup=True, log_every=50, checkpoint_every=1000,
        evaluate_every=1000,
    ),
    sample=SampleConfig(lengths=1),
)  # fmt: skip

MULTI30K = Config(
    workdir="runs/nar_translation_multi30k",
    data=TranslationConfig(name="files", dir="multi30k"),
    model=TransformerConfig(
        layers=3, width=128, heads=4, mlp_dim=512, position="both", dropout=0.1
    ),
    encoder_layers=2,
    train=TrainConfig(
        steps=5000, batch=64, learning_rate=2e-3, warmup=400, decay="cosine", final_rate=0.02,
        beta2=0.98, ema=0.998, ema_warmup=True, log_every=100, checkpoint_every=1000,
        evaluate_every=1000,
    ),
)  # fmt: skip

WMT16 = Config(
    workdir="runs/nar_translation_wmt16",
    data=TranslationConfig(name="tfds", vocabulary=32_000, max_length=128),
    model=TransformerConfig(
        layers=6, width=512, heads=8, mlp_dim=2048, dropout=0.3, dtype="bfloat16"
    ),
    encoder_layers=6,
    train=TrainConfig(
        steps=300_000, batch=4096, accumulate=8, learning_rate=5e-4, warmup=10_000,
        decay="cosine", beta2=0.999, weight_decay=0.01, ema=0.9999, log_every=100,
        checkpoint_every=10_000, evaluate_every=10_000,
    ),
)  # fmt: skip

EXPERIMENT = common.Experiment(
    name="nar_translation",
    about="Translation one token at a time, all at once, and in rounds; by default of a "
    "procedural language.",
    presets={"tiny": TINY, "multi30k": MULTI30K, "wmt16": WMT16},
    commands=run.commands(
        "nar_translation",
        translation_run.Run,
        ("train", "sample", "evaluate", "distill", "complete"),
    ),
)


def main() -> int:
    """Runs the command line; the exit code."""
    return common.main(EXPERIMENT)


if __name__ == "__main__":
    sys.exit(main())
