"""What a run of an autoregressive model of text does in each phase.

jax is imported by the phases, not by this module.
"""

import dataclasses
import functools
import itertools
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from experiments import autoregressive, run
from gen_jax import config as config_lib
from gen_jax.config import to_dict
from gen_jax.data import TokenStream, load_text, text, tokenizers
from gen_jax.nn.config import TransformerConfig

TOKENIZER = "tokenizer.json"
_SHOWN, _SHOWN_CHARACTERS = 3, 500
_WORDS = re.compile(r"[\W\d_]+")  # what is between them


class Run(autoregressive.Run):
    """One run of an experiment with text."""

    unit = "tokens"
    results = (TOKENIZER, "samples.txt", "samples.npz", "gpt2")
    free = (*run.FREE, "data.path")

    @property
    def units_per_example(self) -> int:
        """Tokens predicted in one window."""
        return self.config.model.context

    @functools.cached_property
    def train_text(self) -> str:
        """The training split of the text."""
        return load_text(self.config.data, "train")

    @functools.cached_property
    def test_text(self) -> str:
        """The test split of the text."""
        return load_text(self.config.data, "test")

    @functools.cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """That of the work directory once a checkpoint is there, else the one asked for."""
        path, choice = self.workdir.path / TOKENIZER, self.config.tokenizer
        started = any(self.workdir.checkpoints.glob("[0-9]*"))
        if not started and ("train" in self.phases or self.config.pretrained):
            both = self.train_text + self.test_text if choice == "chars" else ""
            return tokenizers.make(choice, both)
        kept = tokenizers.load(path)
        same = choice == kept.describe()["kind"]
        if choice not in ("bytes", "chars"):  # its file may be gone since
            same = not Path(choice).is_file() or _digest(tokenizers.load(choice)) == _digest(kept)
        if not same:
            raise ValueError(
                f"--tokenizer {choice} is not the tokenizer of the run, {path}: restore the file "
                "that it was trained with, or choose another --workdir"
            )
        return kept

    @functools.cached_property
    def model(self) -> TransformerConfig:
        """The network, with the vocabulary of the tokenizer where none is given."""
        known = self.tokenizer.vocabulary
        model = self.config.model
        if model.vocabulary and model.vocabulary < known:
            raise ValueError(
                f"model.vocabulary is {model.vocabulary}, the tokenizer has {known} tokens; "
                "set it to 0 to take theirs"
            )
        return dataclasses.replace(model, vocabulary=model.vocabulary or known)

    @functools.cached_property
    def train_stream(self) -> TokenStream:
        """Tokens of the training split."""
        return self._stream_of(self.train_text)

    @functools.cached_property
    def test_stream(self) -> TokenStream:
        """Those tokens of the test split that are evaluated."""
        tokens = self._stream_of(self.test_text).tokens
        return TokenStream(tokens[: self.config.evaluate.tokens or None], self.tokenizer.vocabulary)

    @functools.cached_property
    def prompt(self) -> np.ndarray:
        """Tokens of the prompt, int32 [P]."""
        try:
            tokens = self.tokenizer.encode(self.config.sample.prompt)
        except ValueError as error:
            raise ValueError(f"sample.prompt: {error}") from None
        if not 1 <= len(tokens) <= self.model.context:
            raise ValueError(
                f"sample.prompt has {len(tokens)} tokens; it needs at least 1, and at most the "
                f"context of the model, {self.model.context}"
            )
        return tokens

    @functools.cached_property
    def stop(self) -> int | None:
        """The token that ends a sample, or None."""
        name = self.config.sample.stop
        if not name:
            return None
        if name == "end":
            if self.tokenizer.eos is None:
                raise ValueError("sample.stop: this tokenizer has no end; name a text of one token")
            return self.tokenizer.eos
        try:
            tokens = self.tokenizer.encode(name)
        except ValueError as error:
            raise ValueError(f"sample.stop: {error}") from None
        if len(tokens) != 1:
            raise ValueError(f"sample.stop must be one token; {name!r} is {len(tokens)}")
        return int(tokens[0])

    def check(self) -> None:
        """Refuses a text, a tokenizer or a prompt that does not fit."""
        _ = self.model
        if "train" in self.splits:
            self.train_stream.batch(0, 0, 1, length=self.model.context)
        if "test" in self.splits:
            self.test_stream.windows(self.model.context)
        if "sample" in self.phases:
            _ = self.prompt, self.stop

    def train(self) -> dict:
        """Keeps the tokenizer beside the checkpoints, and trains."""
        from gen_jax import checkpoint

        folder = self.workdir.checkpoints
        if checkpoint.steps(folder):
            stored, now = checkpoint.restore(folder, {}).record, self.record()
            for name in ("tokenizer", "text"):
                if stored[name] != now[name]:
                    raise ValueError(f"the {name} is not what the run in {self.workdir.path} "
                                     "was trained with; choose another --workdir")  # fmt: skip
        elif run.is_main(self.config):
            self.tokenizer.save(self.workdir.path / TOKENIZER)
        return super().train()

    def train_batch(self, step, shard):
        """Windows of one token more than the context, at random offsets."""
        train, length = self.config.train, self.model.context
        return self.train_stream.batch(train.seed, step, train.batch, length=length, shard=shard)

    def record(self) -> dict:
        """Which tokenizer and which text."""
        return {"tokenizer": self.tokenizer.describe(), "text": text.digest(self.train_text)}

    def template(self, record):
        """Shapes and dtypes of the parameters; the tokenizer must be that of the record."""
        if record["tokenizer"]["digest"] != _digest(self.tokenizer):
            raise ValueError(f"{self.workdir.path / TOKENIZER} is not the tokenizer that the "
                             "checkpoint was trained with; restore that file")  # fmt: skip
        return super().template(record)

    def published(self):
        """Weights of a GPT2LMHeadModel of transformers, which must be our network."""
        from gen_jax import interop

        network, params = interop.load_gpt2(self.config.pretrained)
        ours, theirs = to_dict(_sizes(self.model)), to_dict(_sizes(network.config))
        differing = config_lib.differences(ours, theirs, ("dropout", "dtype"))
        if differing:
            raise ValueError(
                f"{self.config.pretrained} is another network than model ({'; '.join(differing)})"
            )
        return params, {"tokenizer": self.tokenizer.describe()}

    def export(self, params) -> dict:
        """Writes the averaged parameters as a folder of transformers."""
        from gen_jax import interop

        path = self.workdir.path / "gpt2"
        interop.save_gpt2(path, self.model, params)
        if self.tokenizer.describe()["kind"] == "pretrained":
            self.tokenizer.save(path / TOKENIZER)
        return {"exported": str(path)}

    def validate(self, params) -> dict:
        """The exact likelihood of the test split, in windows of one context each."""
        windows, counted = self.test_stream.windows(self.model.context)
        nats = self.nats(params, windows, batch=self.config.evaluate.batch, counted=counted).sum()
        number, unit = int(counted.sum()), "character"
        characters = number
        if (kind := self.tokenizer.describe()["kind"]) == "bytes":
            unit = "byte"
        elif kind != "chars":
            characters = len(self.tokenizer.decode(self.test_stream.tokens[1:]))
        return {
            "nats_per_token": float(nats / number),
            "perplexity": float(np.exp(nats / number)),
            f"bits_per_{unit}": float(nats / np.log(2) / max(characters, 1)),
            "test_tokens": number,
        }

    def evaluate(self, params) -> dict:
        """The likelihood of the test split, and how far the samples drawn last are of its kind."""
        kept = self.kept_samples()
        texts = [self._decode(kept["prompt"], row) for row in kept["tokens"]]
        return self.validate(params) | score(texts, self.train_text)

    def sample(self, params) -> dict:
        """Draws the samples, and writes them; rates and latency."""
        choice = self.config.sample
        sizes = self.network, len(self.prompt), choice.tokens
        if choice.beams > 1:
            from gen_jax.models.autoregressive.beam_search import BeamSearchSampler

            sampler = BeamSearchSampler(*sizes, choice.beams, choice.length_penalty, self.stop)
        else:
            from gen_jax.models.autoregressive.losses import AutoregressiveSampler

            sampler = AutoregressiveSampler(*sizes, self.choice, self.stop)
        streamed = choice.number == 1 and choice.beams == 1
        if streamed:
            tokens, report = self._stream(sampler, params)
        else:
            size = 1 if choice.beams > 1 else None  # a search finds one text
            tokens, report = self.draw(sampler, params, self._prompts, micro_batch=size)
        new = sum(len(self._cut(row)) for row in tokens)
        report["sampled_tokens_per_second"] = new * report["samples_per_second"] / len(tokens)
        self.keep_samples(tokens=tokens, prompt=self.prompt, nfe=sampler.nfe)
        texts = [self._decode(self.prompt, row) for row in tokens]
        whole = "".join(f"{_title(number)}\n{text}\n" for number, text in enumerate(texts))
        self.keep_text("samples.txt", whole)
        for number, sample in enumerate([] if streamed else texts[:_SHOWN]):
            cut = "..." if len(sample) > _SHOWN_CHARACTERS else ""
            _show(f"{_title(number)}\n{sample[:_SHOWN_CHARACTERS]}{cut}\n")
        return report

    def _stream(self, sampler, params):
        """The one sample, int32 [1, N], shown while it is drawn; its figures."""
        from gen_jax import sampling

        keys = sampling.sample_keys(self.config.sample.seed, 0, 1)
        states = functools.partial(sampling.stream, sampler, params, keys, self._prompts(1))
        began = time.perf_counter()
        next(states())  # compiles
        compiled = time.perf_counter()
        times, row = [], np.zeros(sampler.tokens, np.int32)

        def tokens():
            for done, state in enumerate(states(), 1):
                row[:done] = np.asarray(state.tokens)[0, len(self.prompt) :][:done]
                times.append(time.perf_counter() - compiled)
                yield row[done - 1]
                if row[done - 1] == self.stop:
                    row[done:] = self.stop
                    return

        for piece in self._pieces(self.prompt, tokens()):
            _show(piece)
        _show("\n")
        return row[None], {
            "nfe": sampler.nfe,
            "samples": 1,
            "sample_compile_seconds": compiled - began,
            "first_token_seconds": times[0],
            "sampling_latency_seconds": times[-1],
            "samples_per_second": 1 / times[-1],
        }

    def _prompts(self, number):
        from gen_jax.models.autoregressive import losses as autoregressive

        return autoregressive.pad_prompts(self.network, [self.prompt] * number)

    def _stream_of(self, part):
        return TokenStream(self.tokenizer.encode(part), self.tokenizer.vocabulary)

    def _cut(self, tokens):
        """The tokens before the one that ends the sample."""
        ends = np.flatnonzero(tokens == self.stop) if self.stop is not None else ()
        return tokens[: ends[0]] if len(ends) else tokens

    def _pieces(self, prompt: np.ndarray, tokens: Iterable[int]) -> Iterator[str]:
        """The text of a sample, piece by piece; what the tokenizer does not have is U+FFFD."""
        stream = self.tokenizer.stream()
        for token in prompt:
            yield stream.push(token)
        for token in tokens:
            if token != self.stop:
                yield stream.push(token) if token < self.tokenizer.vocabulary else "\ufffd"
        yield stream.flush()

    def _decode(self, prompt, tokens):
        tokens = self._cut(tokens)
        if tokens.max(initial=0) < self.tokenizer.vocabulary:
            return self.tokenizer.decode(np.concatenate([prompt, tokens]))
        return "".join(self._pieces(prompt, tokens))


def score(texts: list[str], known: str) -> dict[str, float]:
    """How far texts are of a language: a cheap check, which no text of that language fails.

    Args:
      texts: the last word of each, which may be cut, does not count.
      known: a text in the language.

    Returns:
      known_words: share of their letters that are in words of the known text.
      distinct_2: pairs of neighbouring words that differ, as a share of all (Li et al. 2016).
    """
    vocabulary = set(_WORDS.split(known))
    words = [[word for word in _WORDS.split(sample)[:-1] if word] for sample in texts]
    letters = [len(word) for some in words for word in some]
    hits = [len(word) for some in words for word in some if word in vocabulary]
    pairs = [pair for some in words for pair in itertools.pairwise(some)]
    return {
        "known_words": sum(hits) / max(sum(letters), 1),
        "distinct_2": len(set(pairs)) / max(len(pairs), 1),
    }


def _digest(tokenizer):
    return tokenizer.describe()["digest"]


def _sizes(model):
    """With every size that follows from another written out."""
    return dataclasses.replace(
        model, kv_heads=model.key_heads, head_width=model.head_size, mlp_dim=model.mlp_size
    )


def _title(number):
    return f"{'-' * 32} sample {number}"


def _show(piece):
    """Prints what the terminal can show, without control characters."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece)
    encoding = sys.stdout.encoding or "utf-8"
    print(shown.encode(encoding, "replace").decode(encoding), end="", flush=True)
