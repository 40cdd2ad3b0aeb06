"""Text in rounds over all tokens: masked models, on the data and networks of gpt_text.

Absorbing diffusion (D3PM: Austin et al. 2021, 2107.03006), remasking (ReMDM: Wang et al. 2025,
2503.00307), Mask-Predict (Ghazvininejad et al. 2019, 1904.09324), MaskGIT (Chang et al. 2022,
2202.04200), groups in a random order or in Halton's (Besnier et al. 2025, 2503.17076) and erase and
repair draw from one model: --sampler absorbing, mask_predict, maskgit, random_order, halton or
repair.

    python -m experiments.masked_text
        Preset tiny: the English that comes with Python, two CPU cores, no network.

    python -m experiments.masked_text sample --sampler absorbing --sampler.remask 0.5
        The trained model in other rounds; --sample.prompt gives what samples begin with.

    python -m experiments.masked_text complete --complete.text "The ______ of the object"
        Fills the holes, several times.

    python -m experiments.masked_text --preset shakespeare_char --data.path FILE
        nanoGPT's data and its configuration for a CPU.

    python -m experiments.masked_text --preset shakespeare_char_gpu --data.path FILE
        The same with its configuration for one accelerator.

FILE is UTF-8, tiny Shakespeare. What was measured, with hardware and time, is in docs/results.md.
Published for text8, 256 characters and 12 layers of width 768: D3PM with absorbing states at most
1.45 bits per character, the autoregressive transformer 1.23.
"""

import dataclasses
import sys

from experiments import gpt_text
from gen_jax import cli
from gen_jax.models.masked.config import AbsorbingDiffusionOptions
from gen_jax.tasks.masked_text.config import MaskedTextConfig, MaskedTextSampleConfig

# More windows than gpt_text reads, in fewer and larger steps: a masked model learns slowly.
_TINY_TRAIN = dataclasses.replace(
    gpt_text.TINY.train,
    steps=300,
    batch=64,
    warmup=20,
    checkpoint_every=100,
    evaluate_every=100,
)


def _masked(name: str, base: gpt_text.TextRunConfig) -> MaskedTextConfig:
    """The same data, network and training as an autoregressive configuration has."""
    return MaskedTextConfig(
        workdir=f"runs/masked_text_{name}",
        data=base.data,
        model=dataclasses.replace(base.model, causal=False, extra_inputs=1),
        train=base.train,
        sample=MaskedTextSampleConfig(number=16),
        sampler=AbsorbingDiffusionOptions(rounds=64),
    )


EXPERIMENT = cli.Experiment(
    name="masked_text",
    about="Text in rounds over all tokens; by default on the English that comes with Python.",
    presets={
        "tiny": dataclasses.replace(_masked("tiny", gpt_text.TINY), train=_TINY_TRAIN),
        "shakespeare_char": _masked("shakespeare_char", gpt_text.SHAKESPEARE_CHAR),
        "shakespeare_char_gpu": _masked("shakespeare_char_gpu", gpt_text.SHAKESPEARE_CHAR_GPU),
    },
)

if __name__ == "__main__":
    sys.exit(cli.main(EXPERIMENT))
