import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotations import unchecked_annotations
from gen_jax.data.bpe import train_bpe
from gen_jax.data.tokenizers import load
from gen_jax.data.words import Words

TEXTS = [
    "the little dog runs over the green field",
    "der kleine Hund läuft über das grüne Feld",
    "the dog and the cat: two little friends",
    "der Hund und die Katze sind zwei kleine Freunde",
] * 3
WORDS = Words(("<pad>", "</s>", "s0", "ü", "t1"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["", " ", "  two  spaces ", "\tx\n", "don't", "Übermaß", "日本🙂"])
def test_awkward_texts_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_special_tokens_are_padding_and_end(tokenizer):
    assert tokenizer.eos == 1
    assert tokenizer.decode([0]) == "<pad>"
    assert tokenizer.decode([1]) == "</s>"
    assert tokenizer.vocabulary == 300


def test_merges_are_learned_of_both_languages(tokenizer):
    for text in ("the little dog", "der kleine Hund"):
        assert len(tokenizer.encode(text)) < len(text) / 2


def test_few_texts_give_a_smaller_vocabulary():
    assert train_bpe(["ab ab"], 5000).vocabulary == 259
    assert train_bpe([], 300).vocabulary == 258


def test_the_same_texts_give_the_same_vocabulary_in_any_process(tokenizer):
    code = (
        "import sys; from gen_jax.data.bpe import train_bpe; "
        "print(train_bpe(eval(sys.argv[1]), 300).describe()['digest'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, repr(TEXTS)], capture_output=True, text=True
    )
    assert result.stdout.strip() == tokenizer.describe()["digest"], result.stderr
    assert train_bpe(iter(TEXTS), 300).describe() == tokenizer.describe()


@pytest.mark.parametrize("kind", ["pretrained", "words"])
def test_what_is_saved_is_loaded(tokenizer, kind, tmp_path):
    tokenizer = {"pretrained": tokenizer, "words": WORDS}[kind]
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load(tmp_path / "tokenizer.json")
    assert loaded.describe() == tokenizer.describe()
    assert loaded.describe()["kind"] == kind
    ids = np.arange(tokenizer.vocabulary)
    assert loaded.decode(ids) == tokenizer.decode(ids)
    assert loaded.eos == tokenizer.eos == 1


def test_bad_arguments_are_one_clear_line(monkeypatch):
    with pytest.raises(ValueError, match="at least 258"):
        train_bpe(TEXTS, 257)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"install gen_jax\[translation\]"):
        train_bpe(TEXTS, 300)


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, WORDS.vocabulary - 1)))
def test_words_come_back_at_once_and_as_a_stream(ids):
    text = WORDS.decode(np.array(ids, np.int32))
    encoded = WORDS.encode(text)
    assert encoded.dtype == np.int32
    assert encoded.tolist() == ids
    stream = WORDS.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == text


def test_unknown_words_are_listed():
    with pytest.raises(ValueError, match=r"2 words of the text are not in .*: 's1', 's9'$"):
        WORDS.encode("s0 s9 s1 s9")
    with pytest.raises(ValueError, match=r"must lie in 0\.\.4"):
        WORDS.decode([5])
    assert Words(("a",)).eos is None


@pytest.mark.parametrize("words", [(), ("a", "a"), ("a", ""), ("a b",), ("a", 3), ("a", ["b"])])
@unchecked_annotations()
def test_vocabularies_of_words_are_checked(words, tmp_path):
    with pytest.raises(ValueError, match=r"of a vocabulary|of which each entry is of type str"):
        Words(words)
    path = tmp_path / "tokenizer.json"
    path.write_text('{"kind": "words", "words": ["a", "a"]}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged: the words"):
        load(path)
