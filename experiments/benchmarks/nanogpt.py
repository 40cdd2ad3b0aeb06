"""Trains and samples nanoGPT's CPU configuration with nanoGPT and with us, in one run.

    python -m experiments.benchmarks.nanogpt --nanogpt CHECKOUT --text tinyshakespeare.txt

Needs the extra `oracles` (PyTorch) and a checkout of github.com/karpathy/nanoGPT, which is copied
before it is used. Training is the command of nanoGPT's README against preset shakespeare_char of
`experiments.gpt_text`, each as a process of its own from start to end, imports, compiling and
evaluations included. Both are then judged by one code on the whole validation split. Sampling is
of the weights that nanoGPT trained, on both sides, 63 characters from one, at temperature 1;
compiling and warming up are apart, runs alternate. The last line is one JSON object.
"""

import dataclasses
import functools
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import gen_jax
from experiments import gpt_text
from experiments.benchmarks import timing
from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.data import TextConfig, TokenStream, load_text, tokenizers
from gen_jax.models.autoregressive import AutoregressiveModel, AutoregressiveSampler
from gen_jax.nn.transformer import TokenNetwork

torch = timing.Peer("torch")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare with, and how long."""

    nanogpt: str
    """Folder of a checkout of nanoGPT."""
    text: str
    """UTF-8 text; its first 90 % are for training."""
    steps: int = 2000
    """Updates of both."""
    batches: tuple[int, ...] = (1, 64)
    """Batch sizes of sampling."""
    repeats: int = 9
    """Timed runs of each side."""

    def __post_init__(self):
        for name in ("model.py", "train.py", "config/train_shakespeare_char.py"):
            if not (Path(self.nanogpt) / name).is_file():
                raise ValueError(f"{self.nanogpt} is no checkout of nanoGPT: it has no {name}")
        if not Path(self.text).is_file():
            raise ValueError(f"there is no text file {self.text}")
        if min(self.steps, self.repeats, *self.batches) < 1:
            raise ValueError("steps, batches and repeats must be at least 1")


CONTEXT = 64
# nanoGPT's GELU is the exact one, GPT-2's (and ours) the tanh form: 6.6e-3 between their logits.
_TOLERANCE = 2e-2
_TURN = 0.25  # seconds of one timed run: as many samples, one after the other, as that takes


def benchmark(config: Config) -> dict:
    """Runs everything; the figures as JSON values."""
    timing.require("torch")

    source = TextConfig(name="file", path=config.text)
    splits = [load_text(source, split) for split in ("train", "test")]
    tokenizer = tokenizers.make("chars", "".join(splits))
    tokens = [tokenizer.encode(text) for text in splits]
    validation = TokenStream(tokens[1], tokenizer.vocabulary)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        theirs = _train_theirs(config, folder, tokens, tokenizer.vocabulary)
        ours = _train_ours(config, folder)
        report = {
            "jax": jax.__version__,
            "torch": torch.__version__,
            "machine": timing.machine(),
            "train": {
                side: {"seconds": round(seconds, 1), "validation_loss": round(loss, 4)}
                for side, (seconds, params) in {"nanogpt": theirs, "gen_jax": ours}.items()
                for loss in [_loss(tokenizer.vocabulary, params, validation)]
            },
        }
        report["train"]["seconds_ratio"] = round(ours[0] / theirs[0], 3)
        print(json.dumps(report["train"]), flush=True)
        report["sample"] = _sample(config, folder, tokenizer.vocabulary, theirs[1])
    return report


def _model(vocabulary):
    sizes = gpt_text.EXPERIMENT.presets["shakespeare_char"].model
    return AutoregressiveModel(TokenNetwork(dataclasses.replace(sizes, vocabulary=vocabulary)))


def _train_theirs(config, folder, tokens, vocabulary):
    """Seconds, and the weights in our form."""
    checkout = folder / "nanoGPT"
    ignored = shutil.ignore_patterns(".git", "*.bin", "*.pt")
    shutil.copytree(config.nanogpt, checkout, ignore=ignored)
    data = checkout / "data" / "shakespeare_char"
    data.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "val"), tokens, strict=True):
        part.astype(np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocabulary}))
    arguments = (
        "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
        f"--log_interval=1 --block_size={CONTEXT} --batch_size=12 --n_layer=4 --n_head=4 "
        f"--n_embd=128 --max_iters={config.steps} --lr_decay_iters={config.steps} --dropout=0.0 "
        f"--out_dir={folder / 'theirs'} --always_save_checkpoint=True"
    )
    seconds = _time([sys.executable, "train.py", *arguments.split()], checkout)
    print(f"nanoGPT trained in {seconds:.1f} s", flush=True)
    state = torch.load(folder / "theirs" / "ckpt.pt", map_location="cpu", weights_only=True)
    return seconds, _convert({name: leaf.numpy() for name, leaf in state["model"].items()})


def _train_ours(config, folder):
    """Seconds, and the weights."""
    arguments = (
        f"-m experiments.gpt_text train --preset shakespeare_char --data.path {config.text} "
        f"--workdir {folder / 'ours'} --train.steps {config.steps}"
    )
    root = Path(__file__).resolve().parents[2]
    seconds = _time([sys.executable, *arguments.split()], root)
    print(f"gen_jax trained in {seconds:.1f} s", flush=True)
    return seconds, gen_jax.load(folder / "ours").params


def _time(command, directory):
    began = time.perf_counter()
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"{' '.join(command[:3])} failed: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - began


def _convert(state):
    """nanoGPT's names and [out, in] matrices as our tree, on the device."""
    params = {
        "token": state["transformer.wte.weight"],
        "position": state["transformer.wpe.weight"],
        "norm": {"scale": state["transformer.ln_f.weight"]},
    }
    places = {
        "norm_attention": {"scale": "ln_1"},
        "attention": {"qkv": "attn.c_attn", "out": "attn.c_proj"},
        "norm_feed_forward": {"scale": "ln_2"},
        "feed_forward": {"up": "mlp.c_fc", "down": "mlp.c_proj"},
    }
    for i in range(4):
        block = params[f"block_{i}"] = {}
        for room, names in places.items():
            block[room] = {}
            for ours, theirs in names.items():
                leaf = state[f"transformer.h.{i}.{theirs}.weight"]
                block[room][ours] = leaf if ours == "scale" else {"kernel": leaf.T}
    return jax.device_put(params)


def _loss(vocabulary, params, validation):
    """Cross-entropy in nats per token over the whole split."""
    score = jax.jit(_model(vocabulary).log_prob)
    windows, targets = validation.windows(CONTEXT)
    total = 0.0
    for first in range(0, len(windows), 64):
        rows, counted = windows[first : first + 64], targets[first : first + 64]
        missing = 64 - len(rows)
        batch = {
            "tokens": np.pad(rows, ((0, missing), (0, 0))),
            "length": np.pad(counted, (0, missing)),
        }
        total -= np.asarray(score(params, batch))[: len(rows)].sum(dtype=np.float64)
    return total / targets.sum()


def _sample(config, folder, vocabulary, params):
    """Characters per second of both sides on the same weights, after their logits agree."""
    sys.path.insert(0, str(folder / "nanoGPT"))
    from model import GPT, GPTConfig

    torch.set_num_threads(os.cpu_count())
    saved = torch.load(folder / "theirs" / "ckpt.pt", map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    ours, number = _model(vocabulary), CONTEXT - 1
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, CONTEXT))
    with torch.no_grad():  # with targets, or it gives the last logits only
        expected = model(torch.from_numpy(tokens), torch.from_numpy(tokens))[0].numpy()
    difference = float(np.abs(np.asarray(ours.network(params, tokens)) - expected).max())
    if not difference <= _TOLERANCE:
        raise FloatingPointError(f"the logits of the two sides differ by {difference}: not timed")
    sampler, rows = AutoregressiveSampler(ours, 1, number), []
    prepared = jax.block_until_ready(jax.jit(sampler.prepare)(params))
    for batch in config.batches:
        keys, start = sampling.sample_keys(0, 0, batch), np.zeros((batch, 1), np.int32)
        cond = Condition(prompt=jax.device_put(start))
        began = time.perf_counter()
        program = sampling.compile_generate(sampler, prepared, keys, cond)
        compile_seconds = time.perf_counter() - began
        sides = {
            "gen_jax": lambda program=program, keys=keys, cond=cond: np.asarray(
                program(prepared, keys, cond)
            ),
            "nanogpt": lambda start=start: model.generate(torch.from_numpy(start).long(), number),
        }
        timing.alternate(sides, 1)
        once = {side: min(values) for side, values in timing.alternate(sides, 3).items()}
        turns = {side: max(1, round(_TURN / seconds)) for side, seconds in once.items()}
        runs = {side: functools.partial(_times, turns[side], sides[side]) for side in sides}
        seconds = timing.alternate(runs, config.repeats)
        row = {"batch": batch, "gen_jax_compile_seconds": round(compile_seconds, 2)}
        for side, values in seconds.items():
            rate = batch * number * turns[side]
            row[f"{side}_per_second"] = round(rate / statistics.median(values))
            row[f"{side}_best_per_second"] = round(rate / min(values))
        row["gen_jax_is_faster_by"] = round(
            row["gen_jax_per_second"] / row["nanogpt_per_second"], 2
        )
        rows.append(row | {"largest_difference": difference})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _times(number, run):
    for _ in range(number):
        run()


if __name__ == "__main__":
    sys.exit(timing.main(Config, benchmark, __doc__))
