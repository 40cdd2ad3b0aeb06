"""How good translations are: BLEU, repeated tokens, and the lengths that a model foresaw."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from gen_jax.extras import require

__all__ = [
    "bleu",
    "bleu_signature",
    "conditional_total_correlation_left",
    "length_accuracy",
    "repeated_token_rate",
]

Lengths = Integer[Any, " B"] | Sequence[int]


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU as sacrebleu computes it: tokenised by 13a, cased (Post, 1804.08771).

    Args:
      hypotheses: detokenised texts, at least one.
      references: as many, one for each.

    Returns:
      A score in [0, 100].

    Raises:
      ValueError: the numbers differ or are 0, or the package sacrebleu is not installed.
    """
    if not len(hypotheses) or len(hypotheses) != len(references):
        raise ValueError(
            f"{len(hypotheses)} hypotheses for {len(references)} references; give one for each"
        )
    return float(_metric().corpus_score(list(hypotheses), [list(references)]).score)


def bleu_signature() -> str:
    """What sacrebleu asks to be stated beside a score of `bleu`, its version included.

    Raises:
      ValueError: the package sacrebleu is not installed.
    """
    metric = _metric()
    metric.corpus_score(["a"], [["a"]])  # the signature states the number of references
    return str(metric.get_signature())


def repeated_token_rate(
    sequences: Sequence[Integer[Any, " _"] | Sequence[int]],
) -> float:
    """The share of neighbouring tokens that are equal, over all sequences (Wang et al. 1902.10245).

    Args:
      sequences: tokens without EOS and padding, of any lengths.

    Returns:
      A share in [0, 1]; 0 where no sequence has two tokens.

    Raises:
      ValueError: a sequence of another shape or dtype.
    """
    repeated = pairs = 0
    for sequence in map(np.asarray, sequences):
        if sequence.ndim != 1 or not (
            np.issubdtype(sequence.dtype, np.integer) or not sequence.size
        ):
            raise ValueError(
                f"sequences must be integers [length], not {sequence.dtype} {list(sequence.shape)}"
            )
        repeated += int((sequence[1:] == sequence[:-1]).sum())
        pairs += max(len(sequence) - 1, 0)
    return repeated / max(pairs, 1)


def length_accuracy(lengths: Lengths, true_lengths: Lengths) -> dict[str, float]:
    """How well lengths were foreseen.

    Args:
      lengths: those foreseen, at least one.
      true_lengths: as many.

    Returns:
      "exact": the share that is right; "within_one": the share that is off by at most 1;
      "mean_absolute_error": in tokens.

    Raises:
      ValueError: another shape or dtype.
    """
    lengths, true_lengths = np.asarray(lengths), np.asarray(true_lengths)
    integers = all(np.issubdtype(a.dtype, np.integer) for a in (lengths, true_lengths))
    if not integers or lengths.ndim != 1 or not lengths.size or lengths.shape != true_lengths.shape:
        raise ValueError(
            "lengths must be integers [B] with B >= 1, not "
            f"{lengths.dtype} {list(lengths.shape)} and "
            f"{true_lengths.dtype} {list(true_lengths.shape)}"
        )
    error = np.abs(lengths.astype(np.int64) - true_lengths.astype(np.int64))
    return {
        "exact": float((error == 0).mean()),
        "within_one": float((error <= 1).mean()),
        "mean_absolute_error": float(error.mean()),
    }


def conditional_total_correlation_left(nats: float, conditional_entropy: float) -> float:
    """What a model still loses of the dependence between target tokens (Huang et al. 2206.05975).

    A perfect model that draws all tokens at once loses the conditional total correlation of the
    data; one that draws them one by one, nothing. What a trained model fails to learn counts too.

    Args:
      nats: minus its log-probability of a target, or a bound on it, on average.
      conditional_entropy: of a target given its source: exact, or by an autoregressive model,
        whose nats are above it.

    Returns:
      In nats per target.
    """
    return nats - conditional_entropy


def _metric() -> Any:
    return require("sacrebleu.metrics", "translation", "BLEU needs").BLEU()
