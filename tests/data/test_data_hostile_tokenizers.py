"""Files of `tokenizers` that an enemy wrote: refused in one line, and this process goes on."""

import json
import random

import pytest
import tokenizers

from gen_jax.data import tokenizer_check
from gen_jax.data.tokenizers import Pretrained, load

MODEL = {"type": "BPE", "dropout": None, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
FIELDS = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None}
FIELDS |= {"post_processor": None, "decoder": None, "truncation": None, "padding": None}
FIELDS |= {"model": MODEL}
TOKEN = {"content": "z", "single_word": False, "lstrip": False, "rstrip": False}
TOKEN |= {"normalized": False, "special": True}


def of_model(**options):
    return {"model": MODEL | options}


def precompiled(charsmap):
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap}}


def split(pattern):
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {"pre_tokenizer": rule | {"invert": False}}


def doubling(letter, times):
    """A rule that makes 2^times letters of one."""
    rule = {"type": "Replace", "pattern": {"String": letter}, "content": 2 * letter}
    return {"normalizer": {"type": "Sequence", "normalizers": [rule] * times}}


def refused(path, fields):
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    with pytest.raises(ValueError) as caught:
        load(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    assert len(line) < 1000
    return line


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (of_model(dropout=0.5), "its dropout is 0.5, so that no text has certain tokens"),
        (of_model(dropout="x" * 5000), "its dropout is xxx"),
        (of_model(vocab={"a": 4_000_000_000}, merges=[]), "the token 4000000000, and they must"),
        (of_model(vocab={"a": -1}, merges=[]), "the token -1"),
        (of_model(vocab={"a": 0.5}, merges=[]), "the token 0.5"),
        (of_model(vocab={"a": [0] * 1000}, merges=[]), "the token [0, 0"),
        ({"added_tokens": [TOKEN | {"id": 4_000_000_000}]}, "the token 4000000000"),
        ({"added_tokens": [TOKEN]}, "the token None"),
        ({"added_tokens": 3}, "is no tokenizer"),
        ({"added_tokens": [TOKEN | {"id": "3"}]}, "the token 3"),
        ({"model": {"type": "Trigram", "vocab": {}}}, "is no tokenizer of `tokenizers` ("),
        ({"normalizer": {"type": "Unknown"}}, "is no tokenizer of `tokenizers` ("),
        # What panics in the package.
        (precompiled(""), "Cannot parse precompiled_charsmap"),
        (precompiled("BAAAAP////8="), "index out of bounds"),
        (of_model(continuing_subword_prefix="##"), "is no tokenizer of `tokenizers` ("),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "must be non-zero"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 1, "stop": 1}}, "slice index"),
        (split("(a+)+$"), "retry-limit-in-match over"),
        # What ends the process.
        (precompiled("/////w=="), "it ends the process that reads it (SIGABRT)"),
    ],
)
def test_a_hostile_tokenizer_is_one_line(path, changes, message, capfd):
    assert message in refused(path, FIELDS | changes)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("letter", ["q", "\u014b"])
def test_a_tokenizer_that_takes_long_is_stopped(path, monkeypatch, letter):
    """The second letter is in no text that is tried but for the rule that names it."""
    monkeypatch.setattr(tokenizer_check, "_SECONDS", 1)
    line = refused(path, FIELDS | doubling(letter, 40))
    assert line.endswith("it takes more than 1 s for a short text")


def test_a_vocabulary_that_is_a_list_has_a_limit(path, monkeypatch):
    monkeypatch.setattr(tokenizer_check, "MOST_TOKENS", 10)
    model = {"type": "Unigram", "vocab": [["a", 0.0]] * 11}
    assert "it has 11 tokens, and at most 10 are read" in refused(path, FIELDS | {"model": model})


def test_a_file_of_132_megabytes_is_not_read(path):
    with open(path, "wb") as file:
        file.truncate(132_000_000)
    with pytest.raises(ValueError, match="has 132000000 bytes, and at most 67108864 are read"):
        load(path)


@pytest.mark.parametrize(
    "content",
    [
        '{"model": ' + '{"a":' * 100_000 + "0" + "}" * 100_001,
        '{"model": {"vocab": {"a": ' + "9" * 5000 + "}}}",
        '{"model": [' + "[]," * 5_000_000 + "0]}",
        '{"kind": "words", "words": [1]}',
        '{"kind": "words", "words": ["a", "a"]}',
        '{"kind": "chars", "characters": "ba"}',
    ],
)
def test_json_that_is_hostile_is_one_line(path, content):
    assert "is no JSON file" in (line := refused(path, content)) or "is damaged" in line


def test_a_panic_while_a_text_is_read_is_a_refusal(capfd):
    """Of what was not tried before: a process that panics goes on."""
    tokenizer = Pretrained(json.dumps(FIELDS | split("(a+)+$")), "it")
    with pytest.raises(ValueError, match=r"it has no tokens for the text \(Onig: .*retry-limit"):
        tokenizer.encode("a" * 100 + "b")
    assert tokenizer.encode("ab").tolist() == [2]
    strip = {"decoder": {"type": "Strip", "content": "a", "start": 1, "stop": 1}}
    with pytest.raises(ValueError, match=r"it has no text for the tokens \(slice index"):
        Pretrained(json.dumps(FIELDS | strip), "it").decode([0])
    with pytest.raises(ValueError, match="it is no tokenizer of `tokenizers`"):
        Pretrained(json.dumps(FIELDS | precompiled("")), "it")
    assert "panicked" in capfd.readouterr().err  # which the package prints by itself


def test_a_text_without_tokens_is_a_refusal(path):
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    path.write_text(json.dumps(FIELDS | {"model": words}))
    with pytest.raises(ValueError, match=r"tokenizer\.json has no tokens for the text \(.*UNK"):
        load(path).encode("b")


def test_altered_files_are_refused_or_read(path, capfd):
    """Fields of a tokenizer replaced at random; more of them were tried by hand."""
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(["some text, some more text"] * 3, 270, 2, show_progress=False)
    generator = random.Random(0)
    values = [None, 0, -1, 2**70, 1e300, "", "\x00", [], {}, [[]], True, {"type": "Sequence"}]
    for _ in range(12):
        fields = json.loads(model.to_str())
        parent = generator.choice([fields, fields["model"], fields["pre_tokenizer"]])
        parent[generator.choice(list(parent))] = generator.choice(values)
        path.write_text(json.dumps(fields))
        try:
            load(path).encode("some text")
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017, some are still tokenizers
    assert capfd.readouterr().err == ""
