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

    python -m experiments.nar_translation sample --workdir RUN --sampler mask_predict \
            --sampler.rounds 4

    python -m experiments.nar_translation --preset wmt16 --data.dir DIR
        Transformer base on TFDS's wmt16_translate, by the recipe of Mask-Predict. Published, on
        WMT14 English to German with distillation (Ghazvininejad et al. 2019): 18.05, 25.94 and
        27.03 BLEU with 1, 4 and 10 rounds; the autoregressive transformer 27.3 (Vaswani et al.
        2017); the first parallel decoder 17.69 at 15.6 times its speed (Gu et al. 2018).

What was measured, with hardware and time, is in docs/results.md.
"""

import sys

from gen_jax import cli
from gen_jax.config import TrainConfig
from gen_jax.data.config import TranslationConfig
from gen_jax.nn.config import TransformerConfig
from gen_jax.tasks.translation.config import TranslationRunConfig, TranslationSampleConfig

TINY = TranslationRunConfig(
    workdir="runs/nar_translation_tiny",
    data=TranslationConfig(max_length=20, pairs=50_000),
    model=TransformerConfig(layers=2, width=128, heads=4, mlp_dim=256, position="both"),
    encoder_layers=2,
    smoothing=0.0,
    train=TrainConfig(
        steps=3000,
        batch=64,
        learning_rate=2e-3,
        warmup=200,
        decay="cosine",
        final_rate=0.02,
        beta2=0.98,
        ema=0.99,
        ema_warmup=True,
        log_every=50,
        checkpoint_every=1000,
        evaluate_every=1000,
    ),
    sample=TranslationSampleConfig(lengths=1),
)

MULTI30K = TranslationRunConfig(
    workdir="runs/nar_translation_multi30k",
    data=TranslationConfig(name="files", dir="multi30k"),
    model=TransformerConfig(
        layers=3, width=128, heads=4, mlp_dim=512, position="both", dropout=0.1
    ),
    encoder_layers=2,
    train=TrainConfig(
        steps=5000,
        batch=64,
        learning_rate=2e-3,
        warmup=400,
        decay="cosine",
        final_rate=0.02,
        beta2=0.98,
        ema=0.998,
        ema_warmup=True,
        log_every=100,
        checkpoint_every=1000,
        evaluate_every=1000,
        preview_every=1000,
        preview=8,
    ),
)

WMT16 = TranslationRunConfig(
    workdir="runs/nar_translation_wmt16",
    data=TranslationConfig(name="tfds", vocabulary=32_000, max_length=128),
    model=TransformerConfig(
        layers=6, width=512, heads=8, mlp_dim=2048, dropout=0.3, dtype="bfloat16"
    ),
    encoder_layers=6,
    train=TrainConfig(
        steps=300_000,
        batch=4096,
        accumulate=8,
        learning_rate=5e-4,
        warmup=10_000,
        decay="cosine",
        beta2=0.999,
        weight_decay=0.01,
        ema=0.9999,
        log_every=100,
        checkpoint_every=10_000,
        evaluate_every=10_000,
        preview_every=10_000,
        preview=8,
    ),
)

EXPERIMENT = cli.Experiment(
    name="nar_translation",
    about="Translation one token at a time, all at once, and in rounds; by default of a "
    "procedural language.",
    presets={"tiny": TINY, "multi30k": MULTI30K, "wmt16": WMT16},
)

if __name__ == "__main__":
    sys.exit(cli.main(EXPERIMENT))
