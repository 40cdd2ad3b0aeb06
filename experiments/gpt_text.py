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
"""

import dataclasses
import math
import sys

from experiments import common, run, text_run
from gen_jax.config import DistributedConfig, TrainConfig
from gen_jax.data import TextConfig
from gen_jax.models.autoregressive.config import TokenChoice
from gen_jax.nn.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class SampleConfig(run.SampleConfig, TokenChoice):
    """What to draw, and how."""

    prompt: str = "\n"
    """Text that every sample goes on from."""
    tokens: int = 500
    """New tokens of a sample."""
    stop: str = ""
    """Text of the one token that ends a sample; "end" for the tokenizer's own, empty for none."""
    beams: int = 1
    """Above 1: search for the most probable text with so many hypotheses, and draw nothing."""
    length_penalty: float = 1.0
    """Of the search: hypotheses are ranked by log-probability / length ** length_penalty."""

    def __post_init__(self):
        TokenChoice.__post_init__(self)
        run.SampleConfig.__post_init__(self)
        if not self.prompt:
            raise ValueError("sample.prompt is empty: a model of text needs a token to go on from")
        if self.tokens < 1 or self.beams < 1:
            raise ValueError("sample.tokens and sample.beams must be at least 1")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"sample.length_penalty must be finite, got {self.length_penalty}")
        if self.beams > 1 and self.number > 1:
            raise ValueError("sample.beams finds one text, always the same: set sample.number to 1")


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class Config:
    """A model of text from data to samples."""

    workdir: str
    """Directory of the run: records, checkpoints, samples. A run in it is resumed."""
    data: TextConfig = TextConfig()
    tokenizer: str = "chars"
    """bytes, chars (those of the text), or the path of a tokenizer.json."""
    model: TransformerConfig = TransformerConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    distributed: DistributedConfig = DistributedConfig()
    pretrained: str = ""
    """Folder of a GPT2LMHeadModel of transformers: train starts from it, sample draws from it."""

    def __post_init__(self):
        if not self.tokenizer:
            raise ValueError("tokenizer is empty; choose bytes, chars or a tokenizer.json")
        if self.pretrained and self.tokenizer in ("bytes", "chars"):
            raise ValueError("pretrained goes with the tokenizer.json of its vocabulary: give "
                             "--tokenizer its path")  # fmt: skip
        model = self.model
        if not model.causal or model.memory or model.extra_inputs:
            raise ValueError(
                "a model of text is causal, without memory and extra inputs: leave model.causal, "
                "model.memory and model.extra_inputs as they are"
            )
        if self.sample.beams > 1 and self.sample.tokens >= model.context:
            raise ValueError(
                f"sample.beams searches within the context: sample.tokens ({self.sample.tokens}) "
                f"must be less than model.context ({model.context})"
            )


TINY = Config(
    workdir="runs/gpt_text_tiny",
    data=TextConfig(name="pydoc"),
    model=TransformerConfig(
        context=128, layers=4, width=128, heads=4, position="rotary", bias=False
    ),
    train=TrainConfig(
        steps=1200, batch=16, learning_rate=3e-3, warmup=50, decay="cosine", final_rate=0.1,
        beta2=0.99, weight_decay=0.1, ema=0.98, ema_warmup=True, log_every=25,
        checkpoint_every=400, evaluate_every=400,
    ),
    sample=SampleConfig(number=8, tokens=500, temperature=0.8),
)  # fmt: skip

_NANO = TrainConfig(
    steps=2000, batch=12, learning_rate=1e-3, warmup=100, decay="cosine", final_rate=0.1,
    beta2=0.99, weight_decay=0.1, clip_norm=1.0, ema=0.0, log_every=50, checkpoint_every=1000,
    evaluate_every=1000,
)  # fmt: skip

SHAKESPEARE_CHAR = Config(
    workdir="runs/gpt_text_shakespeare_char",
    data=TextConfig(name="file", path="tinyshakespeare.txt"),
    model=TransformerConfig(context=64, layers=4, width=128, heads=4, bias=False),
    train=dataclasses.replace(_NANO, learning_rate=2e-3),  # nanoGPT's is 1e-3: 1.90 nats, not 1.79
    sample=SampleConfig(number=8, tokens=500, temperature=0.8, top_k=200),
)

SHAKESPEARE_CHAR_GPU = Config(
    workdir="runs/gpt_text_shakespeare_char_gpu",
    data=TextConfig(name="file", path="tinyshakespeare.txt"),
    model=TransformerConfig(context=256, layers=6, width=384, heads=6, bias=False, dropout=0.2),
    train=dataclasses.replace(_NANO, steps=5000, batch=64),
    sample=SampleConfig(number=64, tokens=500, temperature=0.8, top_k=200),
)

# nanoGPT leaves out the biases too; with them the published weights fit (--pretrained).
GPT2_SMALL = Config(
    workdir="runs/gpt_text_gpt2_small",
    data=TextConfig(name="file", path="openwebtext.txt", validation=0.0005),
    tokenizer="tokenizer.json",
    model=TransformerConfig(dtype="bfloat16"),
    train=TrainConfig(
        steps=600_000, batch=480, accumulate=40, learning_rate=6e-4, warmup=2000, decay="cosine",
        final_rate=0.1, beta2=0.95, weight_decay=0.1, clip_norm=1.0, ema=0.0, log_every=100,
        checkpoint_every=5000, evaluate_every=5000,
    ),
    sample=SampleConfig(number=16, tokens=500, temperature=0.8, top_k=200, micro_batch=16),
    evaluate=EvaluateConfig(batch=16),
)  # fmt: skip

EXPERIMENT = common.Experiment(
    name="gpt_text",
    about="GPT on text; by default on the English that comes with Python.",
    presets={
        "tiny": TINY,
        "shakespeare_char": SHAKESPEARE_CHAR,
        "shakespeare_char_gpu": SHAKESPEARE_CHAR_GPU,
        "gpt2_small": GPT2_SMALL,
    },
    commands=run.commands("gpt_text", text_run.Run),
)


def main() -> int:
    """Runs the command line; the exit code."""
    return common.main(EXPERIMENT)


if __name__ == "__main__":
    sys.exit(main())
