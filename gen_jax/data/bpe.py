"""Byte-pair encoding: a vocabulary that is learned from text (Sennrich et al., 1508.07909).

The pieces are of bytes, as in GPT-2, so that every text has tokens and comes back as it was.
"""

from collections.abc import Iterable

from gen_jax.data.tokenizer_base import EOS_NAME, PAD_NAME
from gen_jax.data.tokenizers import Pretrained
from gen_jax.extras import require

__all__ = ["MIN_VOCABULARY", "train_bpe"]

MIN_VOCABULARY = 256 + 2


def train_bpe(texts: Iterable[str], vocabulary: int) -> Pretrained:
    """Learns a vocabulary from texts, the same one from the same texts.

    Merges are learned until the vocabulary is full or no pair of pieces is left that occurs twice.

    Args:
      texts: of all languages that share the vocabulary.
      vocabulary: the most tokens, from 258 up: "<pad>" (token 0), "</s>" (token 1, the EOS),
        256 bytes and the merges.

    Returns:
      A tokenizer with decode(encode(text)) == text for every text.

    Raises:
      ValueError: the vocabulary is too small, or the package `tokenizers` is not installed.
    """
    if vocabulary < MIN_VOCABULARY:
        raise ValueError(
            f"vocabulary is {vocabulary}; byte pairs need at least {MIN_VOCABULARY} tokens"
        )
    tokenizers = require("tokenizers", "translation", "byte pairs need")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[PAD_NAME, EOS_NAME],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return Pretrained(model.to_str(pretty=False), "the byte-pair vocabulary")
