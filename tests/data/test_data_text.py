import hashlib
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from annotations import unchecked_annotations
from gen_jax.data import TextConfig, TokenStream, load_text
from gen_jax.data.text import digest


def stream(count, dtype=np.int32):
    """Tokens that tell where they are."""
    return TokenStream(np.arange(count, dtype=dtype), count)


def in_file(tmp_path, text, **fields):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return TextConfig(name="file", path=str(path), **fields)


@settings(max_examples=50, deadline=None)
@given(shards=st.integers(1, 8), each=st.integers(1, 9), step=st.integers(0, 1000))
def test_the_shards_concatenated_are_the_batch(shards, each, step):
    data, size = stream(40), shards * each
    whole = data.batch(7, step, size, length=5)["tokens"]
    parts = [data.batch(7, step, size, length=5, shard=(i, shards)) for i in range(shards)]
    assert whole.shape == (size, 6)
    assert np.array_equal(whole, np.concatenate([part["tokens"] for part in parts]))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_windows_of_a_batch_are_pieces_of_the_text(dtype):
    tokens = stream(40, dtype).batch(0, 3, 500, length=36)["tokens"]
    assert tokens.dtype == np.int32
    assert (np.diff(tokens, axis=1) == 1).all()
    assert set(tokens[:, 0].tolist()) == {0, 1, 2, 3}  # every offset, the last one included


def test_a_batch_is_a_function_of_seed_and_step():
    data = stream(10_000)
    batches = {
        (seed, step): data.batch(seed, step, 8, length=4)["tokens"]
        for seed in range(3)
        for step in range(3)
    }
    assert len({tokens.tobytes() for tokens in batches.values()}) == 9
    for (seed, step), tokens in batches.items():
        assert np.array_equal(tokens, stream(10_000).batch(seed, step, 8, length=4)["tokens"])


@settings(max_examples=100, deadline=None)
@given(count=st.integers(2, 60), length=st.integers(1, 70))
def test_every_token_but_the_first_is_a_target_once(count, length):
    windows, targets = stream(count).windows(length)
    assert windows.shape == (len(targets), length + 1) == (-(-(count - 1) // length), length + 1)
    assert windows.dtype == targets.dtype == np.int32
    seen = [
        token
        for window, number in zip(windows, targets, strict=True)
        for token in window[1 : number + 1]
    ]
    assert seen == list(range(1, count))
    for window, number in zip(windows, targets, strict=True):
        assert (np.diff(window[: number + 1]) == 1).all()
        assert (window[number + 1 :] == 0).all()
    assert (targets[:-1] == length).all()


def test_writing_into_a_window_leaves_the_data_alone():
    data = stream(5)
    data.windows(4)[0][:] = 99
    data.batch(0, 0, 2, length=4)["tokens"][:] = 99
    assert np.array_equal(data.tokens, np.arange(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: data.batch(0, 0, 2, length=5), "5 tokens are too few for a window of 6"),
        (lambda data: data.batch(0, 0, 2, length=0), "length is 0"),
        (lambda data: data.windows(0), "length is 0"),
        (lambda data: stream(1).windows(3), "too few for a window"),
        (lambda data: data.batch(0, 0, 4, length=2, shard=(0, 3)), "not a multiple of the 3"),
        (lambda data: data.batch(0, 0, 3, length=2, shard=(3, 3)), "0 <= index < count"),
        (lambda data: data.batch(-1, 0, 3, length=2), "seed is -1"),
        (lambda data: data.batch(0, -1, 3, length=2), "step is -1"),
        (lambda data: data.batch(0, 0, 0, length=2), "batch size is 0"),
        (lambda data: TokenStream(data.tokens, 4), r"tokens span 0\.\.4; they must lie in 0\.\.3"),
        (lambda data: TokenStream(data.tokens - 1, 5), r"tokens span -1\.\.3"),
        (lambda data: TokenStream(data.tokens.astype(np.int64), 5), r"not int64 \[5\]"),
        (lambda data: TokenStream(data.tokens[:0], 5), "at least one"),
        (lambda data: TokenStream(data.tokens[None], 5), r"\[1, 5\]"),
    ],
)
@unchecked_annotations()
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(stream(5))


def test_the_default_is_english_that_needs_no_download():
    train, test = load_text(TextConfig(), "train"), load_text(TextConfig(), "test")
    assert train.count(" the ") > 1000
    assert len(train) == int(0.9 * len(train + test))
    assert train + test == load_text(TextConfig(validation=0.5), "train") + load_text(
        TextConfig(validation=0.5), "test"
    )


@settings(max_examples=30, deadline=None)
@given(
    text=st.text(min_size=2), validation=st.floats(0.01, 0.99), characters=st.sampled_from([0, 2])
)
def test_the_splits_of_a_file_are_the_file(tmp_path_factory, text, validation, characters):
    folder = tmp_path_factory.mktemp("text")
    config = in_file(folder, text, validation=validation, characters=characters)
    whole = text[: characters or None]
    end = int(len(whole) * (1 - validation))
    for split, part in (("train", whole[:end]), ("test", whole[end:])):
        if part:
            assert load_text(config, split) == part
        else:
            with pytest.raises(ValueError, match=f"no character for the {split} split"):
                load_text(config, split)


def test_characters_are_counted_before_the_split(tmp_path):
    for config in (TextConfig(characters=100), in_file(tmp_path, "é\r\n" * 99, characters=100)):
        assert len(load_text(config, "train")) == 90
        assert len(load_text(config, "test")) == 10


def test_the_digest_is_that_of_the_file():
    assert digest("né\n") == hashlib.sha256("né\n".encode()).hexdigest()


@unchecked_annotations()
def test_a_text_that_cannot_be_read_is_one_clear_line(tmp_path, monkeypatch):
    missing = TextConfig(name="file", path=str(tmp_path / "none.txt"))
    with pytest.raises(FileNotFoundError, match=r"none\.txt is no file; .*--data\.name pydoc"):
        load_text(missing, "train")
    with pytest.raises(ValueError, match=r"text\.txt is not UTF-8 text \(invalid start byte\)"):
        load_text(in_file(tmp_path, b"a\xff"), "train")
    with pytest.raises(ValueError, match=r"text\.txt leaves no character for the train split"):
        load_text(in_file(tmp_path, ""), "train")
    with pytest.raises(ValueError, match="train or test"):
        load_text(TextConfig(), "validation")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match=r"without pydoc_data; .*--data\.name file"):
        load_text(TextConfig(), "train")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "book"}, "name must be one of 'pydoc', 'file', 'tfds', got 'book'"),
        ({"name": "file"}, "needs --data.path"),
        ({"path": "x"}, "data.name=file only, not pydoc"),
        ({"name": "tfds", "tfds_name": ""}, "needs --data.tfds-name"),
        ({"validation": 0.0}, "between 0 and 1"),
        ({"validation": float("nan")}, "validation must be finite"),
        ({"characters": -1}, "0 for all"),
    ],
)
@unchecked_annotations()
def test_a_bad_configuration_is_one_clear_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        TextConfig(**fields)
    assert "\n" not in str(caught.value)


def prepare(root, feature="text", **splits):
    """A TFDS data set of documents, prepared for random access without TensorFlow."""

    class Verses(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "verses"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({feature: tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {
                split: ((key, {feature: text}) for key, text in enumerate(texts))
                for split, texts in splits.items()
            }

        def _generate_examples(self):
            raise NotImplementedError

    Verses(data_dir=root, file_format="array_record").download_and_prepare()


def read_tfds(root, split="train", **fields):
    fields = {"tfds_name": "verses", **fields}
    return load_text(TextConfig(name="tfds", dir=str(root), **fields), split)


def test_documents_of_a_prepared_set_are_joined_by_line_ends(tmp_path):
    documents = ["o né", "two\nlines", "three", "four"]
    prepare(tmp_path, train=documents, validation=["held out"])
    text = read_tfds(tmp_path)
    assert sorted(text.replace("two\nlines", "two lines").split("\n")) == sorted(
        document.replace("\n", " ") for document in documents
    )
    assert read_tfds(tmp_path, "test") == "held out"
    size = len("".join(documents).encode())
    assert read_tfds(tmp_path, max_bytes=size) == text
    with pytest.raises(
        ValueError, match=f"more than {size - 1} bytes of text; raise --data.max-by"
    ):
        read_tfds(tmp_path, max_bytes=size - 1)
    for characters in range(1, len(text) + 2):
        assert read_tfds(tmp_path, characters=characters) == text[:characters]


def test_a_test_split_comes_before_the_validation_split(tmp_path):
    prepare(tmp_path, train=["a"], validation=["b"], test=["c"])
    assert read_tfds(tmp_path, "test") == "c"


def test_sets_that_do_not_fit_are_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="tfds build imdb_reviews"):
        read_tfds(tmp_path, tfds_name="imdb_reviews")
    with pytest.raises(FileNotFoundError, match="knows no data set 'nothing_of_the_kind'"):
        read_tfds(tmp_path, tfds_name="nothing_of_the_kind")
    prepare(tmp_path / "1", train=[b"a\xff"])
    with pytest.raises(ValueError, match="example 0 of the TFDS data set verses is not UTF-8"):
        read_tfds(tmp_path / "1")
    with pytest.raises(ValueError, match="has no split test, only train"):
        read_tfds(tmp_path / "1", "test")
    prepare(tmp_path / "2", feature="document", train=["a"])
    with pytest.raises(ValueError, match="holds no feature `text`"):
        read_tfds(tmp_path / "2")
