import functools
import hashlib
import json
import os
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from annotations import unchecked_annotations
from gen_jax.data import TextConfig, load_text
from gen_jax.data.tokenizers import Bytes, Chars, Pretrained, load, make

TEXT = "aàb 日本語 👩‍👩‍👧 naïve\n\ufffd e\u0301 <|endoftext|> \x00 end "


@functools.cache
def byte_level():
    """A byte-level BPE, as GPT-2's."""
    model = tokenizers.ByteLevelBPETokenizer()
    names = ["<|endoftext|>"]
    model.train_from_iterator([TEXT] * 3, 300, 2, show_progress=False, special_tokens=names)
    return Pretrained(model.to_str())


@functools.cache
def byte_fallback():
    """A BPE with bytes for unknown characters, decoded as Llama's."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "▁a", "</s>"]
    vocabulary = {name: id for id, name in enumerate(alphabet)}
    bpe = tokenizers.models.BPE(vocabulary, [("▁", "a")], byte_fallback=True)
    model = tokenizers.Tokenizer(bpe)
    sequence = tokenizers.normalizers.Sequence
    prepend, replace = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
    model.normalizer = sequence([prepend, replace])
    decoders = tokenizers.decoders
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Pretrained(model.to_str())


ALL = {
    "bytes": Bytes,
    "chars": lambda: make("chars", TEXT),
    "byte level": byte_level,
    "byte fallback": byte_fallback,
}


@pytest.fixture(params=ALL)
def tokenizer(request):
    return ALL[request.param]()


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return [stream.push(id) for id in ids] + [stream.flush()]


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(text):
    chars = [make("chars", text)] if text else []
    for tokenizer in (Bytes(), byte_level(), byte_fallback(), *chars):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert "".join(streamed(tokenizer, ids)) == text


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_stream_as_they_decode(data):
    for make_tokenizer in ALL.values():
        tokenizer = make_tokenizer()
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary - 1)))
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(np.array(ids, np.int32))


def test_a_character_is_pushed_whole(tokenizer):
    text = TEXT.replace("\ufffd", "")
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""
    assert sum(map(bool, pieces)) > 10


def test_tokens_lie_in_the_vocabulary(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocabulary
    assert len(tokenizer.encode("")) == 0
    assert tokenizer.decode([]) == ""


def test_what_is_saved_is_loaded(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("an old one")
    tokenizer.save(path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    for again in (load(path), make(str(path), "")):
        assert again.describe() == tokenizer.describe()
        assert again.eos == tokenizer.eos
        assert np.array_equal(again.encode(TEXT), tokenizer.encode(TEXT))


def test_the_description_is_json_with_the_digest_of_the_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    description = tokenizer.describe()
    assert json.loads(json.dumps(description)) == description
    assert description["vocabulary"] == tokenizer.vocabulary
    content = (tmp_path / "tokenizer.json").read_bytes()
    assert description["digest"] == hashlib.sha256(content).hexdigest()


def test_the_vocabularies():
    assert Bytes().vocabulary == 256
    assert make("bytes", "").encode("é").tolist() == [0xC3, 0xA9]
    chars = make("chars", "banana")
    assert chars.describe()["characters"] == "abn"
    assert chars.encode("nab").tolist() == [2, 0, 1]
    assert Bytes().eos is chars.eos is None
    assert len(set(load_text(TextConfig(), "train"))) < 256


def test_bytes_that_are_no_text_are_replaced():
    assert Bytes().decode([0x61, 0xE2, 0x82]) == "a\ufffd"
    assert streamed(Bytes(), [0xE2, 0x82, 0x61]) == ["", "", "\ufffda", ""]


def test_a_pretrained_tokenizer_agrees_with_its_package():
    ours = byte_level()
    theirs = tokenizers.Tokenizer.from_str(ours.content)
    assert ours.encode(TEXT).tolist() == theirs.encode(TEXT).ids
    assert ours.vocabulary == theirs.get_vocab_size()
    assert ours.eos == theirs.token_to_id("<|endoftext|>")
    assert ours.eos in ours.encode(TEXT)
    assert byte_fallback().eos == 260


def test_nothing_is_added_or_cut_off():
    model = tokenizers.Tokenizer.from_str(byte_level().content)
    template = "<|endoftext|> $A"
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("<|endoftext|>", byte_level().eos)]
    )
    model.enable_truncation(3)
    model.enable_padding(length=50)
    assert len(model.encode(TEXT).ids) == 50
    assert np.array_equal(Pretrained(model.to_str()).encode(TEXT), byte_level().encode(TEXT))


def test_ids_with_gaps_lie_in_the_vocabulary():
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    tokenizer = Pretrained(model.to_str())
    assert tokenizer.vocabulary == 8
    assert tokenizer.eos is None
    assert tokenizer.encode("b").tolist() == [7]


def test_unknown_characters_are_listed():
    with pytest.raises(ValueError, match=r"2 characters .*: 'x', 'y'; leave them out"):
        make("chars", "abc").encode("axbyx")
    with pytest.raises(ValueError, match=r"7 .*: 'd', 'e', 'f', 'g', 'h' and others; "):
        make("chars", "abc").encode("abcdefghij")


@pytest.mark.parametrize("ids", [[-1], [10**6], [[0]], [0.5], np.zeros((1, 2), np.int32)])
@unchecked_annotations()
def test_tokens_that_cannot_be_decoded_are_refused(tokenizer, ids):
    with pytest.raises(ValueError, match=r"tokens (span|must be integers)"):
        tokenizer.decode(ids)
    with pytest.raises(ValueError, match=r"tokens (span|must be integers)"):
        tokenizer.stream().push(ids[0])


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("\ud800")


def test_vocabularies_of_characters_are_checked():
    for characters, message in (("", "longer text"), ("ba", "sorted"), ("aa", "sorted")):
        with pytest.raises(ValueError, match=message):
            Chars(characters)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is no JSON file \(Expecting value"),
        (b"\xff", "is no JSON file"),
        (b"[" * 100_000, "is no JSON file"),
        (b"[1]", "is no tokenizer: it has neither"),
        (b'{"kind": "words"}', "is no tokenizer: it has neither"),
        (b'{"kind": "chars"}', "is no tokenizer: it has neither"),
        (b'{"kind": "chars", "characters": "ba"}', "is damaged: .* sorted"),
        (b'{"model": 3}', r"is no tokenizer of `tokenizers` \(.*Model"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "has an empty vocabulary"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json " + message) as caught:
        make(str(path), "")
    assert "\n" not in str(caught.value)


def test_no_file_names_the_choices(tmp_path):
    with pytest.raises(FileNotFoundError, match="word is no file; choose bytes, chars or the path"):
        make("word", "")
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    byte_level().save(path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"install gen_jax\[text\]"):
        load(path)
    assert make("bytes", "").vocabulary == 256
