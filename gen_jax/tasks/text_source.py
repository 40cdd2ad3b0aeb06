"""The text of a run, its tokenizer, and what follows from both; importing this loads no jax."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from gen_jax.data import TokenStream, load_text, text, tokenizers
from gen_jax.nn.config import TransformerConfig

__all__ = ["TOKENIZER", "TextSource"]

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True, eq=False)
class TextSource:
    """What a run of a model of text reads, each part when it is needed.

    Attributes:
      config: of the run, with `data`, `tokenizer`, `model` and `evaluate.tokens`.
      workdir: of the run; once a checkpoint is there, its tokenizer counts.
      phases: the commands to come.
    """

    config: Any
    workdir: pathlib.Path
    phases: tuple[str, ...]

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
        """That of the work directory once a checkpoint is there, else the one asked for.

        A run that starts from another one has that one's.
        """
        path, choice = self.workdir / TOKENIZER, self.config.tokenizer
        started = any((self.workdir / "model" / "checkpoints").glob("[0-9]*"))
        if not started and self.config.init_from:
            path = pathlib.Path(self.config.init_from).expanduser() / TOKENIZER
        elif not started and ("train" in self.phases or self.config.pretrained):
            both = self.train_text + self.test_text if choice == "chars" else ""
            return tokenizers.make(choice, both)
        kept = tokenizers.load(path)
        same = choice == kept.describe()["kind"]
        if choice not in ("bytes", "chars"):  # its file may be gone since
            file = pathlib.Path(choice)
            same = not file.is_file() or _digest(tokenizers.load(choice)) == _digest(kept)
        if not same:
            raise ValueError(
                f"--tokenizer {choice} is not the tokenizer of the run, {path}: restore the file "
                "that it was trained with, or choose another --workdir"
            )
        return kept

    @functools.cached_property
    def model(self) -> TransformerConfig:
        """The network, with the vocabulary of the tokenizer where none is given."""
        known, model = self.tokenizer.vocabulary, self.config.model
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

    def sizes(self, splits: tuple[str, ...]) -> dict[str, int]:
        """Tokens of the splits that are read."""
        sizes = {"train_tokens": len(self.train_stream)} if "train" in splits else {}
        return sizes | ({"test_tokens": len(self.test_stream)} if "test" in splits else {})

    def record(self) -> dict[str, Any]:
        """Which tokenizer, for the checkpoints."""
        return {"tokenizer": self.tokenizer.describe()}

    def digest(self) -> str:
        """Of the text that is trained on; "" where it is not read."""
        return text.digest(self.train_text) if "train" in self.phases else ""

    def check_record(self, record: Mapping) -> None:
        """Refuses to go on with another tokenizer than a checkpoint's.

        Raises:
          ValueError: it is another one.
        """
        if record["tokenizer"]["digest"] != _digest(self.tokenizer):
            raise ValueError(
                f"{self.workdir / TOKENIZER} is not the tokenizer that the checkpoint was trained "
                "with; restore that file"
            )

    def keep_tokenizer(self, run: Any) -> None:
        """Leaves the tokenizer in the work directory of a run; see `Task.begin`."""
        self.tokenizer.save(run.workdir.path / TOKENIZER)

    def per_unit(self, nats: float, tokens: Int[np.ndarray, " N"]) -> dict[str, float]:
        """Figures of the code length of tokens of the test split.

        Args:
          nats: in all.
          tokens: that they are for.

        Returns:
          Nats per token, perplexity, bits per character or byte, and the number of tokens.
        """
        number, unit, kind = len(tokens), "character", self.tokenizer.describe()["kind"]
        characters = number
        if kind == "bytes":
            unit = "byte"
        elif kind != "chars":
            characters = len(self.tokenizer.decode(tokens))
        return {
            "nats_per_token": float(nats / number),
            "perplexity": float(np.exp(nats / number)),
            f"bits_per_{unit}": float(nats / np.log(2) / max(characters, 1)),
            "test_tokens": number,
        }

    def _stream_of(self, part):
        return TokenStream(self.tokenizer.encode(part), self.tokenizer.vocabulary)


def _digest(tokenizer: tokenizers.Tokenizer) -> str:
    """What tells a tokenizer from others."""
    return tokenizer.describe()["digest"]
