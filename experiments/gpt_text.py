"""GPT (Radford et al. 2019) on text: characters, bytes, or the vocabulary of GPT-2.

    python -m experiments.gpt_text
        Preset tiny: the English that comes with Python, two CPU cores, no network.

    python -m experiments.gpt_text --preset shakespeare_char --data.path FILE
        nanoGPT's configuration for a CPU (github.com/karpathy/nanoGPT). Published: validation loss
        1.88.

    python -m experiments.gpt_text --preset shakespeare_char_gpu --data.path FILE
        nanoGPT's configuration for one accelerator. Published: validation loss 1.4697.

    python -m experiments.gpt_text --preset gpt2_small --data.path FILE --tokenizer JSON
        GPT-2 of 124M parameters by nanoGPT's recipe, on OpenWebText. Published, in nats per token:
        3.11 for the weights of OpenAI, 2.85 for those trained on it.

FILE is UTF-8: tiny Shakespeare, or OpenWebText as one text; JSON is GPT-2's tokenizer.json. What
was measured, with hardware and time, is in docs/results.md.

    python -m experiments.gpt_text sample --sample.number 1 --sample.prompt "The "
        Shows the text while it is drawn.

    python -m experiments.gpt_text train --preset tiny_draft
    python -m experiments.gpt_text sample --sampler speculative \\
            --sampler.draft runs/gpt_text_tiny_draft --sample.tokens 100
        Speculative decoding: a model of one block drafts, the tiny preset's checks.
"""

import dataclasses
import sys

from gen_jax import cli
from gen_jax.config import TrainConfig
from gen_jax.data import TextConfig
from gen_jax.models.autoregressive.config import SamplingOptions
from gen_jax.nn.config import TransformerConfig
from gen_jax.tasks.text.config import EvaluateConfig, TextRunConfig, TextSampleConfig

TINY = TextRunConfig(
    workdir="runs/gpt_text_tiny",
    data=TextConfig(name="pydoc"),
    model=TransformerConfig(
        context=128, layers=4, width=128, heads=4, position="rotary", bias=False
    ),
    train=TrainConfig(
        steps=500,
        batch=24,
        optimizer="muon",
        learning_rate=2e-2,
        warmup=30,
        decay="cosine",
        final_rate=0.1,
        beta2=0.99,
        weight_decay=0.1,
        ema=0.98,
        ema_warmup=True,
        log_every=25,
        checkpoint_every=250,
        evaluate_every=250,
    ),
    sample=TextSampleConfig(number=8, tokens=500),
    sampler=SamplingOptions(temperature=0.8),
)

TINY_DRAFT = dataclasses.replace(
    TINY,
    workdir="runs/gpt_text_tiny_draft",
    model=dataclasses.replace(TINY.model, layers=1, width=64, heads=2),
)

_NANO = TrainConfig(
    steps=2000,
    batch=12,
    learning_rate=1e-3,
    warmup=100,
    decay="cosine",
    final_rate=0.1,
    beta2=0.99,
    weight_decay=0.1,
    clip_norm=1.0,
    ema=0.0,
    log_every=50,
    checkpoint_every=1000,
    evaluate_every=1000,
    preview_every=1000,
    preview=4,
)

SHAKESPEARE_CHAR = TextRunConfig(
    workdir="runs/gpt_text_shakespeare_char",
    data=TextConfig(name="file", path="tinyshakespeare.txt"),
    model=TransformerConfig(context=64, layers=4, width=128, heads=4, bias=False),
    train=dataclasses.replace(_NANO, learning_rate=2e-3),  # nanoGPT's is 1e-3: 1.90 nats, not 1.79
    sample=TextSampleConfig(number=8, tokens=500),
    sampler=SamplingOptions(temperature=0.8, top_k=200),
)

SHAKESPEARE_CHAR_GPU = TextRunConfig(
    workdir="runs/gpt_text_shakespeare_char_gpu",
    data=TextConfig(name="file", path="tinyshakespeare.txt"),
    model=TransformerConfig(context=256, layers=6, width=384, heads=6, bias=False, dropout=0.2),
    train=dataclasses.replace(_NANO, steps=5000, batch=64),
    sample=TextSampleConfig(number=64, tokens=500),
    sampler=SamplingOptions(temperature=0.8, top_k=200),
)

# nanoGPT leaves out the biases too; with them the published weights fit (--pretrained).
GPT2_SMALL = TextRunConfig(
    workdir="runs/gpt_text_gpt2_small",
    data=TextConfig(name="file", path="openwebtext.txt", validation=0.0005, max_bytes=2**36),
    tokenizer="tokenizer.json",
    model=TransformerConfig(dtype="bfloat16"),
    train=TrainConfig(
        steps=600_000,
        batch=480,
        accumulate=40,
        learning_rate=6e-4,
        warmup=2000,
        decay="cosine",
        final_rate=0.1,
        beta2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
        ema=0.0,
        log_every=100,
        checkpoint_every=5000,
        evaluate_every=5000,
        preview_every=5000,
        preview=4,
    ),
    sample=TextSampleConfig(number=16, tokens=500, micro_batch=16),
    sampler=SamplingOptions(temperature=0.8, top_k=200),
    evaluate=EvaluateConfig(batch=16),
)

EXPERIMENT = cli.Experiment(
    name="gpt_text",
    about="GPT on text; by default on the English that comes with Python.",
    presets={
        "tiny": TINY,
        "tiny_draft": TINY_DRAFT,
        "shakespeare_char": SHAKESPEARE_CHAR,
        "shakespeare_char_gpu": SHAKESPEARE_CHAR_GPU,
        "gpt2_small": GPT2_SMALL,
    },
)

if __name__ == "__main__":
    sys.exit(cli.main(EXPERIMENT))
