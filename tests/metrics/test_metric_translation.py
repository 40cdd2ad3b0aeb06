import sys

import numpy as np
import pytest
import sacrebleu

from annotations import unchecked_annotations
from gen_jax.data.synonyms import Synonyms
from gen_jax.metrics.translation import (
    bleu,
    bleu_signature,
    conditional_total_correlation_left,
    length_accuracy,
    repeated_token_rate,
)

REFERENCES = ["Ein Mann fährt Rad.", "Zwei Hunde spielen, im Schnee!", "Eine Frau liest ein Buch."]
HYPOTHESES = ["Ein Mann fährt ein Rad.", "Zwei Hunde laufen im Schnee!", "eine Frau liest ein Buch"]


def test_bleu_is_that_of_sacrebleu():
    expected = sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES], tokenize="13a", lowercase=False)
    assert bleu(HYPOTHESES, REFERENCES) == expected.score
    assert 0 < expected.score < 100


def test_identity_is_100_and_nothing_in_common_is_0():
    assert bleu(REFERENCES, REFERENCES) == pytest.approx(100)
    assert bleu(("",), ("Ein Mann fährt Rad.",)) == 0


def test_bleu_is_cased_and_of_the_corpus():
    lower = [text.lower() for text in REFERENCES]
    assert bleu(lower, REFERENCES) < 100
    each = [bleu([h], [r]) for h, r in zip(HYPOTHESES, REFERENCES, strict=True)]
    assert bleu(HYPOTHESES, REFERENCES) != pytest.approx(np.mean(each))


def test_the_signature_states_the_settings():
    expected = f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert bleu_signature() == expected


def test_texts_that_are_not_pairs_are_refused():
    for hypotheses, references in (([], []), (["a"], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="one for each"):
            bleu(hypotheses, references)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    for call in (lambda: bleu(["a"], ["a"]), bleu_signature):
        with pytest.raises(ValueError, match=r"install gen_jax\[translation\]"):
            call()


@pytest.mark.parametrize(
    ("sequences", "rate"),
    [
        ([], 0),
        ([[], [4]], 0),
        ([[1, 2, 3, 1]], 0),
        ([[5, 5, 5]], 1),
        ([[5, 5, 6, 6, 6]], 3 / 4),
        ([[5, 5], [1, 2, 3], [7]], 1 / 3),
    ],
)
def test_repeated_tokens_are_counted_over_all_neighbours(sequences, rate):
    assert repeated_token_rate([np.array(s, np.int32) for s in sequences]) == rate
    assert repeated_token_rate(sequences) == rate


@unchecked_annotations()
def test_sequences_that_are_no_tokens_are_refused():
    for sequence in (np.zeros((2, 2), np.int32), np.zeros(3)):
        with pytest.raises(ValueError, match="must be integers"):
            repeated_token_rate([sequence])


def test_lengths_are_compared():
    assert length_accuracy(np.array([3, 5, 9, 2], np.uint8), [3, 4, 5, 4]) == {
        "exact": 0.25,
        "within_one": 0.5,
        "mean_absolute_error": 7 / 4,
    }


@unchecked_annotations()
def test_bad_lengths_are_refused():
    for lengths, true in (([], []), ([1], [1, 2]), ([1.0], [1]), ([[1]], [[1]])):
        with pytest.raises(ValueError, match="must be integers"):
            length_accuracy(lengths, true)


def test_what_is_left_of_the_dependence_is_the_gap_to_the_entropy():
    task = Synonyms(words=8, max_words=3)
    sources, _ = task.pairs("test", 20)
    for source in sources:
        modes = [(target.split(), prob) for target, prob in task.modes(source)]
        joint = -sum(prob * np.log(prob) for _, prob in modes)
        apart = 0.0  # nats of the best model that draws all tokens at once
        for words in zip(*(target for target, _ in modes), strict=True):
            marginal = [
                sum(p for w, (_, p) in zip(words, modes, strict=True) if w == word)
                for word in set(words)
            ]
            apart -= sum(p * np.log(p) for p in marginal)
        left = conditional_total_correlation_left(apart, joint)
        np.testing.assert_allclose(left, task.conditional_total_correlation(source), atol=1e-12)
