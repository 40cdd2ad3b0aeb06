import gzip

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from annotations import unchecked_annotations
from gen_jax.data.bpe import train_bpe
from gen_jax.data.config import TranslationConfig
from gen_jax.data.synonyms import Synonyms
from gen_jax.data.tokenizers import Bytes
from gen_jax.data.translation import (
    Pairs,
    default_buckets,
    load_pairs,
    make_tokenizer,
    parse_template,
    texts_of,
)
from gen_jax.data.words import Words

TOKENIZER = Words(("<pad>", "</s>", *"abcdefgh"))


def random_pairs(number=60, seed=0, longest=11):
    """Texts of letters, whose sides with EOS have 1 to `longest` + 1 tokens."""
    random = np.random.default_rng(seed)
    return [
        [
            " ".join(random.choice([*"abcdefgh"], random.integers(0, longest + 1)))
            for _ in "x" * number
        ]
        for _ in range(2)
    ]


SOURCES, TARGETS = random_pairs()
DATA = Pairs.encode(TOKENIZER, SOURCES, TARGETS, 12, long="truncate", buckets=(5, 8, 12))


def write(folder, name, lines):
    folder.mkdir(exist_ok=True)
    content = "".join(line + "\n" for line in lines).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def files(folder, number=4, prefix="", suffix=""):
    for stem in ("train", "val", "test_2016_flickr"):
        for language in ("en", "de"):
            lines = [f"{stem} {language} {i} ü" for i in range(number)]
            write(folder, f"{prefix}{stem}.{language}{suffix}", lines)
    return TranslationConfig(name="files", dir=str(folder), vocabulary=300)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("prefix", ["", "multi30k_"])
def test_files_are_read_line_by_line(tmp_path, prefix, suffix):
    config = files(tmp_path, prefix=prefix, suffix=suffix)
    for split, stem in (("train", "train"), ("validation", "val"), ("test", "test_2016_flickr")):
        sources, targets = load_pairs(config, split)
        assert sources == [f"{stem} en {i} ü" for i in range(4)]
        assert targets == [f"{stem} de {i} ü" for i in range(4)]


def test_a_file_that_is_there_twice_is_read_plain(tmp_path):
    config = files(tmp_path)
    write(tmp_path, "train.en.gz", ["other"])
    assert load_pairs(config, "train")[0][0] == "train en 0 ü"


def test_lines_end_at_line_ends_only(tmp_path):
    write(tmp_path, "train.en", ["a\u2028b \r", "", "\tc\x85d"])
    write(tmp_path, "train.de", ["1", "2", "3"])
    sources, targets = load_pairs(TranslationConfig(name="files", dir=str(tmp_path)), "train")
    assert sources == ["a\u2028b", "", "c\x85d"]
    assert targets == ["1", "2", "3"]


def test_languages_may_be_swapped_and_pairs_limited(tmp_path):
    files(tmp_path)
    config = TranslationConfig(name="files", dir=str(tmp_path), source="de", target="en", pairs=3)
    sources, targets = load_pairs(config, "train")
    assert sources == [f"train de {i} ü" for i in range(3)]
    assert targets == [f"train en {i} ü" for i in range(3)]
    assert len(load_pairs(config, "test")[0]) == 4


def test_distilled_targets_replace_those_of_training(tmp_path):
    files(tmp_path / "data")
    for name in ("distilled", "distilled.gz"):
        write(tmp_path, name, ["x", "y", ""])
        config = TranslationConfig(
            name="files",
            dir=str(tmp_path / "data"),
            pairs=3,
            targets=str(tmp_path / name),
            vocabulary=300,
        )
        sources, targets = load_pairs(config, "train")
        assert sources == [f"train en {i} ü" for i in range(3)]
        assert targets == ["x", "y", ""]
        assert load_pairs(config, "test")[1][0] == "test_2016_flickr de 0 ü"
    plain = TranslationConfig(name="files", dir=str(tmp_path / "data"), pairs=3, vocabulary=300)
    assert make_tokenizer(config).describe() == make_tokenizer(plain).describe()
    write(tmp_path, "distilled", ["x"])
    config = TranslationConfig(pairs=2, targets=str(tmp_path / "distilled"))
    with pytest.raises(ValueError, match="distilled has 1 lines for 2 training pairs"):
        load_pairs(config, "train")


def test_the_procedural_pairs_need_no_files():
    config = TranslationConfig(pairs=30)
    sources, targets = load_pairs(config, "train")
    assert (sources, targets) == Synonyms().pairs("train", 30)
    tokenizer = make_tokenizer(config)
    data = Pairs.encode(tokenizer, sources, targets, config.max_length, long="leave out")
    assert len(data) == 30
    assert tokenizer.eos == 1
    assert texts_of(tokenizer, data.target, data.length) == targets
    assert len(load_pairs(config, "test")[0]) == 1000


def test_files_come_back_through_their_tokens(tmp_path):
    config = files(tmp_path, number=6)
    tokenizer = make_tokenizer(config)
    pairs = load_pairs(config, "test")
    data = Pairs.encode(tokenizer, *pairs, 80, long="truncate")
    assert texts_of(tokenizer, data.source, data.source_length) == pairs[0]
    assert texts_of(tokenizer, data.target, data.length) == pairs[1]


def prepare(root, german="gut"):
    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny_translate"
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="de-en")]  # noqa: RUF012

        def _info(self):
            features = tfds.features.Translation(languages=("de", "en"))
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            examples = [{"en": f"good {i} ", "de": german} for i in range(3)]
            return {
                "train": enumerate(examples),
                "validation": enumerate(examples[:2]),
                "test": enumerate(examples[:1]),
            }

        def _generate_examples(self):
            raise NotImplementedError

    Tiny(data_dir=root, config="de-en", file_format="array_record").download_and_prepare()
    return TranslationConfig(name="tfds", tfds_name="tiny_translate/de-en", dir=str(root), pairs=2)


def test_prepared_sets_of_tfds_are_read(tmp_path):
    config = prepare(tmp_path)
    sources, targets = load_pairs(config, "train")
    assert sorted(sources) == sorted(set(sources))
    assert set(sources) <= {"good 0", "good 1", "good 2"}
    assert targets == ["gut", "gut"]
    assert [len(load_pairs(config, split)[0]) for split in ("validation", "test")] == [2, 1]
    french = TranslationConfig(
        name="tfds", tfds_name="tiny_translate/de-en", dir=str(tmp_path), source="fr"
    )
    with pytest.raises(ValueError, match="has no language 'fr', only de, en"):
        load_pairs(french, "train")


def test_sets_of_tfds_that_cannot_be_read_are_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"example 0 .* is not UTF-8"):
        load_pairs(prepare(tmp_path / "1", german=b"\xff"), "train")
    config = TranslationConfig(name="tfds", dir=str(tmp_path / "2"))
    with pytest.raises(FileNotFoundError, match="`tfds build wmt16_translate/de-en"):
        load_pairs(config, "train")


@unchecked_annotations()
def test_files_that_cannot_be_read_are_one_clear_line(tmp_path):
    config = TranslationConfig(name="files", dir=str(tmp_path / "data"))

    def refused(error, message):
        with pytest.raises(error, match=message) as caught:
            load_pairs(config, "train")
        assert "\n" not in str(caught.value)

    refused(FileNotFoundError, "is no folder; give --data.dir")
    folder = write(tmp_path / "data", "train.en", ["a", "b"])
    refused(FileNotFoundError, r"holds no train\.de \(or \.gz")
    write(folder, "train.de", ["a"])
    refused(ValueError, "has 2 lines and .* has 1; a pair is one line of each")
    write(folder, "a_train.de", ["a", "b"])
    refused(ValueError, r"holds a_train\.de and train\.de; leave one set")
    (folder / "a_train.de").unlink()
    (folder / "train.de").write_bytes(b"\xff\n\xfe\n")
    refused(ValueError, r"train\.de is not UTF-8 text \(.*iconv")
    (folder / "train.de").unlink()
    for content in (b"no gzip", gzip.compress(b"a\nb\n" * 99)[:-12], b""):
        (folder / "train.de.gz").write_bytes(content)
        refused(ValueError, r"train\.de\.gz cannot be read|has 2 lines and .* has 0")
    (folder / "train.de.gz").unlink()
    for language in ("en", "de"):
        write(folder, f"train.{language}", [])
    refused(ValueError, "holds no pair in its train split")
    config = TranslationConfig(pairs=2, targets=str(tmp_path / "nowhere"))
    refused(FileNotFoundError, "nowhere is no file; give a UTF-8 text")
    with pytest.raises(ValueError, match="train, validation or test"):
        load_pairs(config, "valid")


def test_sides_end_with_end_and_are_padded_with_0():
    data = Pairs.encode(TOKENIZER, ["a b", ""], ["c", "d e f"], 8, long="leave out")
    assert data.source.tolist() == [[2, 3, 1], [1, 0, 0]]
    assert data.source_length.tolist() == [3, 1]
    assert data.target.tolist() == [[4, 1, 0, 0], [5, 6, 7, 1]]
    assert data.length.tolist() == [2, 4]
    assert (data.left_out, data.truncated, data.longest) == (0, 0, 4)


def test_long_pairs_are_left_out_or_truncated():
    sources, targets = ["a b c", "a b", "a"], ["d", "d e f g", "d e"]
    kept = Pairs.encode(TOKENIZER, sources, targets, 3, long="leave out")
    assert (len(kept), kept.left_out, kept.truncated) == (1, 2, 0)
    assert texts_of(TOKENIZER, kept.target, kept.length) == ["d e"]
    cut = Pairs.encode(TOKENIZER, sources, targets, 3, long="truncate")
    assert (len(cut), cut.left_out, cut.truncated) == (3, 0, 2)
    assert texts_of(TOKENIZER, cut.source, cut.source_length) == ["a b", "a b", "a"]
    assert texts_of(TOKENIZER, cut.target, cut.length) == ["d", "d e", "d e"]
    assert (cut.source == TOKENIZER.eos).sum() == 3


def test_texts_end_at_the_first_end_without_padding():
    tokens = np.array([[2, 3, 1, 4], [2, 0, 3, 4], [1, 2, 3, 4], [2, 3, 4, 5]])
    assert texts_of(TOKENIZER, tokens, np.array([4, 4, 3, 2])) == ["a b", "a b c", "", "a b"]


WORDS = Words(("<pad>", "</s>", "a", "b", "c"))


@pytest.mark.parametrize(
    ("text", "ids", "is_open"),
    [
        ("a _ b", [2, None, 3, 1], False),
        (" a ___ _ b c...", [2, None, None, None, None, 3, 4], True),
        ("_", [None, 1], False),
        ("...", [], True),
        ("a b ...", [2, 3], True),
    ],
)
def test_templates_give_some_tokens(text, ids, is_open):
    assert parse_template(WORDS, text) == (ids, is_open)


def test_the_space_before_a_hole_is_hidden_with_it():
    tokenizer = train_bpe(["ein mann"] * 2, 258)
    ids, is_open = parse_template(tokenizer, "ein __ mann")
    assert not is_open
    assert ids[3:5] == [None, None]
    assert tokenizer.decode(np.array(ids[:3])) == "ein"
    assert tokenizer.decode(np.array(ids[5:-1])) == " mann"
    assert ids[-1] == tokenizer.eos


def test_templates_of_unknown_words_or_with_end_are_refused():
    with pytest.raises(ValueError, match="not in the vocabulary: 'd'"):
        parse_template(WORDS, "a _ d")
    with pytest.raises(ValueError, match="spells the padding or the EOS token"):
        parse_template(WORDS, "a </s> _")


@settings(max_examples=30, deadline=None)
@given(shards=st.integers(1, 4), each=st.integers(1, 5), step=st.integers(0, 99))
def test_batches_are_pure_and_their_shards_join(shards, each, step):
    size = shards * each
    whole = DATA.batch(3, step, size)
    parts = [DATA.batch(3, step, size, shard=(index, shards)) for index in range(shards)]
    for name, array in whole.items():
        assert array.dtype == np.int32
        assert len(array) == size
        assert np.array_equal(np.concatenate([part[name] for part in parts]), array)
    assert whole["source"].shape == whole["target"].shape
    assert set(whole) == {"source", "source_length", "target", "length"}


def test_other_seeds_and_steps_are_other_batches():
    batches = [DATA.batch(seed, step, 16)["length"].tolist() for seed in (0, 1) for step in (0, 1)]
    assert len(set(map(tuple, batches))) == 4


def test_every_pair_is_whole_in_its_smallest_bucket():
    assert DATA.bucket_sizes.sum() == len(DATA)
    assert (DATA.bucket_sizes > 0).all()
    known = set(zip(SOURCES, TARGETS, strict=True))
    for step in range(40):
        batch = DATA.batch(0, step, 8)
        columns = batch["source"].shape[1]
        longest = np.maximum(batch["source_length"], batch["length"])
        smaller = max((b for b in DATA.buckets if b < columns), default=0)
        assert columns in DATA.buckets
        assert ((longest <= columns) & (longest > smaller)).all()
        sources = texts_of(TOKENIZER, batch["source"], batch["source_length"])
        targets = texts_of(TOKENIZER, batch["target"], batch["length"])
        assert set(zip(sources, targets, strict=True)) <= known
        for name, lengths in (("source", "source_length"), ("target", "length")):
            ends = np.arange(columns) == batch[lengths][:, None] - 1
            assert ((batch[name] == TOKENIZER.eos) == ends).all()
            assert ((batch[name] == 0) == (np.arange(columns) >= batch[lengths][:, None])).all()


def test_every_pair_is_equally_probable_and_so_is_its_bucket():
    sources = [" ".join(text) for text in ("a", "b", "abcde", "bcdef", "cdefg", "abcdefgh")]
    data = Pairs.encode(TOKENIZER, sources, sources, 9, long="truncate", buckets=(3, 6, 9))
    assert data.bucket_sizes.tolist() == [2, 3, 1]
    known = {
        (first, length): i
        for i, (first, length) in enumerate(zip(data.source[:, 0], data.length, strict=True))
    }
    counts, shares = np.zeros(6), dict.fromkeys(data.buckets, 0)
    for step in range(1800):
        batch = data.batch(5, step, 2)
        counts[known[batch["source"][0, 0], batch["length"][0]]] += 1
        shares[batch["source"].shape[1]] += 1
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.chisquare([*shares.values()], np.array([2, 3, 1]) * 300).pvalue > 1e-3


def test_the_pairs_of_a_batch_are_independent():
    sources = [*"abcd"]
    data = Pairs.encode(TOKENIZER, sources, sources, 4, long="truncate")
    draws = [data.batch(1, step, 2)["source"][:, 0] for step in range(1000)]
    table = np.zeros((4, 4))
    np.add.at(table, tuple(np.array(draws).T - 2), 1)
    assert stats.chisquare(table.ravel()).pvalue > 1e-3


def test_all_pairs_are_there_in_their_order():
    for max_length, expected in ((0, 12), (12, 12), (20, 20)):
        batch = DATA.all(max_length)
        assert batch["source"].shape == batch["target"].shape == (len(DATA), expected)
        assert texts_of(TOKENIZER, batch["source"], batch["source_length"]) == SOURCES
        assert texts_of(TOKENIZER, batch["target"], batch["length"]) == TARGETS
    with pytest.raises(ValueError, match="max_length is 11, too short for a side of 12 tokens"):
        DATA.all(11)


def test_the_default_buckets_hold_the_longest_side():
    assert default_buckets(40) == (12, 18, 26, 40)
    for length in range(2, 100):
        buckets = default_buckets(length)
        assert list(buckets) == sorted(set(buckets))
        assert buckets[-1] == length


def test_an_empty_bucket_is_never_drawn():
    data = Pairs.encode(TOKENIZER, ["a"], ["b"], 9, long="truncate", buckets=(1, 2, 9))
    assert data.bucket_sizes.tolist() == [0, 1, 0]
    assert all(data.batch(0, step, 1)["source"].shape == (1, 2) for step in range(20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Bytes(), ["a"], ["a"], 9), "needs a tokenizer with an EOS"),
        ((TOKENIZER, ["a"], ["a", "b"], 9), "not 2 and 1"),
        ((TOKENIZER, ["a"], ["a"], 1), "at least 2, not 1"),
        ((TOKENIZER, ["a </s> b"], ["a"], 9), "spells the padding or the EOS"),
        ((TOKENIZER, ["a b c"], ["a"], 3), "none of 1 pairs has sides of at most 3 tokens"),
        ((TOKENIZER, [], [], 3), "none of 0 pairs"),
    ],
)
@unchecked_annotations()
def test_pairs_that_cannot_be_encoded_are_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        Pairs.encode(*arguments, long="leave out")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not 'drop'"):
        Pairs.encode(TOKENIZER, ["a"], ["a"], 9, long="drop")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": np.zeros((2, 3))}, "source must be int32"),
        ({"target": np.zeros(2, np.int32)}, "target must be int32"),
        ({"target": np.zeros((3, 3), np.int32)}, "lengths of target must lie in 1..3, one a pair"),
        ({"length": np.ones(3, np.int32)}, r"lengths of target must be int32 \[2\]"),
        ({"length": np.array([0, 1], np.int32)}, "lengths of target must lie in 1..3"),
        ({"source_length": np.array([4, 1], np.int32)}, "lengths of source must lie in 1..3"),
        ({"buckets": ()}, "give rising lengths"),
        ({"buckets": (5, 3)}, "give rising lengths"),
        ({"buckets": (1, 2)}, "more than the last bucket"),
    ],
)
@unchecked_annotations()
def test_bad_arrays_are_refused(fields, message):
    tokens, lengths = np.ones((2, 3), np.int32), np.array([3, 1], np.int32)
    good = {
        "source": tokens,
        "source_length": lengths,
        "target": tokens,
        "length": lengths,
        "buckets": (2, 3),
    }
    assert len(Pairs(**good)) == 2
    with pytest.raises(ValueError, match=message):
        Pairs(**{**good, **fields})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1, 0, 4), "seed"), ((0, -1, 4), "step"), ((0, 0, 0), "batch size"), ((0, 0, 5), "shards")],
)
def test_bad_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DATA.batch(*arguments, shard=(0, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "wmt"}, "name must be one of 'synonyms', 'files', 'tfds', got 'wmt'"),
        ({"name": "files"}, "needs --data.dir"),
        ({"name": "tfds", "tfds_name": ""}, "needs --data.tfds-name"),
        ({"dir": "x"}, "files or tfds only"),
        ({"target": "en"}, "two languages"),
        ({"source": ""}, "two languages"),
        ({"vocabulary": 257}, "at least 258"),
        ({"max_length": 1}, "at least 2"),
        ({"pairs": -1}, "at least 0"),
        ({"seed": -1}, "at least 0"),
        ({"orders": 3}, "orders must be one of 1, 2, got 3"),
        ({"styles": 0}, "styles must be one of 1, 2, got 0"),
        ({"min_words": 9}, "must rise"),
    ],
)
@unchecked_annotations()
def test_a_bad_configuration_is_one_clear_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        TranslationConfig(**fields)
    assert "\n" not in str(caught.value)


def test_the_command_line_sets_the_fields():
    config = tyro.cli(TranslationConfig, args=["--orders", "1", "--max-length", "20"])
    assert config == TranslationConfig(orders=1, max_length=20)
