"""Data that an enemy wrote: refused in one line, before memory is taken, and nothing is run."""

import gzip
import io
import os
import pickle
import random
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageFile

from gen_jax import bounded
from gen_jax.data import DataConfig, TextConfig, TranslationConfig, load, load_text
from gen_jax.data.cifar10 import PYTHON_FOLDER, TEST_FILES
from gen_jax.data.translation import load_pairs

MIB = 2**20


@pytest.fixture
def memory():
    """The most bytes that Python and NumPy have taken since the start of the test."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def refused(call, *arguments):
    """The line with which a call refuses; an error that another package raised passes."""
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    assert caught.traceback[-1].frame.f_globals["__name__"].startswith("gen_jax.")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def bomb(path, mebibytes=100):
    """A small file that becomes a hundred megabytes."""
    with gzip.open(path, "wb") as file:
        for _ in range(mebibytes):
            file.write(b"x" * (MIB - 1) + b"\n")
    assert path.stat().st_size < MIB
    return path


def test_a_text_is_unpacked_no_further_than_its_limit(tmp_path, memory):
    path = bomb(tmp_path / "text.gz")
    config = TextConfig(name="file", path=str(path), max_bytes=4 * MIB)
    line = refused(load_text, config, "train")
    assert line.endswith("has more than 4194304 bytes when unpacked; raise --data.max-bytes")
    few = TextConfig(name="file", path=str(path), max_bytes=4 * MIB, characters=100)
    assert load_text(few, "train") == "x" * 90
    assert memory() < 20 * MIB


def test_sentences_are_unpacked_no_further_than_their_limit(tmp_path, memory):
    for language in ("en", "de"):
        bomb(tmp_path / f"train.{language}.gz")
    config = TranslationConfig(name="files", dir=str(tmp_path), max_bytes=4 * MIB)
    assert "raise --data.max-bytes" in refused(load_pairs, config, "train")
    assert memory() < 20 * MIB
    with gzip.open(tmp_path / "train.en.gz", "wb") as file:
        file.write(b"\n" * (2 * MIB))
    line = refused(load_pairs, config, "train")
    assert line.endswith("has more than 65536 lines; raise --data.max-bytes")
    assert memory() < 20 * MIB


def test_a_text_that_fits_its_limit_is_read(tmp_path):
    content = "Zwölf Boxkämpfer\r\n" * 1000
    for path in (tmp_path / "text.txt", tmp_path / "text.gz"):
        packed = gzip.compress(content.encode())
        path.write_bytes(packed if path.suffix == ".gz" else content.encode())
        size = len(content.encode())
        config = TextConfig(name="file", path=str(path), max_bytes=size)
        assert load_text(config, "train") + load_text(config, "test") == content
        smaller = TextConfig(name="file", path=str(path), max_bytes=size - 1)
        assert "raise --data.max-bytes" in refused(load_text, smaller, "train")


def test_a_damaged_archive_is_one_line(tmp_path):
    content = gzip.compress(os.urandom(1000).hex().encode())
    generator = random.Random(0)
    config = TextConfig(name="file", path=str(tmp_path / "text.gz"))
    for _ in range(200):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        (tmp_path / "text.gz").write_bytes(damaged[: generator.choice([len(content), 50, 1, 500])])
        try:
            load_text(config, "train")
        except ValueError as error:
            assert "text.gz" in str(error)  # noqa: PT017, most are refused, by name
        else:
            assert damaged[:10] != content[:10], "only the name and the time may differ"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or a device" in refused(bounded.read_bytes, tmp_path / "pipe", 10)
    assert "is a pipe or a device" in refused(bounded.read_bytes, "/dev/zero", 10)
    assert "is a pipe or a device" in refused(bounded.read_text, tmp_path / "pipe", 10, "it")


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (TextConfig, {"max_bytes": 0}, "from 1 up"),
        (TextConfig, {"max_bytes": 10, "characters": 11}, "from data.characters up"),
        (TranslationConfig, {"max_bytes": 0}, "give at least 1"),
        (DataConfig, {"max_pixels": 0}, "of at least 1"),
    ],
)
def test_limits_are_checked(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def pictures(folder, size, suffix=".png"):
    """A folder for the train split with one picture of so many pixels."""
    for split in ("train", "test"):
        (folder / split).mkdir()
        Image.new("1", size).save(folder / split / f"0{suffix}")
    return DataConfig(name="folder", dir=str(folder), size=4)


def test_a_picture_of_169_million_pixels_is_not_decoded(tmp_path, monkeypatch):
    config = pictures(tmp_path, (13_000, 13_000))
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
        line = refused(load, config, "train")
    assert "0.png has 169000000 pixels, and at most 67108864 are read" in line
    assert "raise --data.max-pixels" in line


def test_the_limit_of_pictures_can_be_raised_beyond_that_of_pillow(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # which refuses at 100
    config = pictures(tmp_path, (12, 11))
    assert load(config, "train").images.shape == (1, 4, 4, 3)
    assert Image.MAX_IMAGE_PIXELS == 50
    small = DataConfig(name="folder", dir=str(tmp_path), size=4, max_pixels=131)
    assert "has 132 pixels, and at most 131 are read" in refused(load, small, "train")
    assert Image.MAX_IMAGE_PIXELS == 50


def test_a_picture_file_of_a_gigabyte_is_not_read(tmp_path):
    """WebP is read whole when it is opened; this one takes no room on the disk."""
    config = pictures(tmp_path, (4, 4), ".webp")
    os.truncate(tmp_path / "train" / "0.webp", 2**40)
    assert "pixels, and at most" in refused(load, config, "train")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_flipped_bytes_of_pictures_never_end_in_a_traceback(tmp_path, suffix):
    config, generator = pictures(tmp_path, (16, 16), suffix), random.Random(0)
    path = tmp_path / "train" / f"0{suffix}"
    content = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, Image.registered_extensions()[suffix], exif=exif)
    for _ in range(300):
        damaged = bytearray(content.getvalue())
        for _ in range(generator.randrange(1, 6)):
            place = generator.randrange(min(len(damaged), 120))
            damaged[place] = generator.choice([0, 255, damaged[place] ^ 1])
        path.write_bytes(damaged)
        try:
            load(config, "train")
        except ValueError as error:
            assert str(path) in str(error).splitlines()[-1]  # noqa: PT017, some are pictures


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x80\x02Nr\xff\xff\xff\x7f.", id="a place that takes 32 GB"),
        pytest.param(b"\x80\x02Np4294967295\n.", id="the same in the first protocol"),
        pytest.param(b"\x80\x02" + b"N0" * 2**17 + b"N.", id="too long"),
        pytest.param(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", id="bytes that are not there"),
        pytest.param(b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".", id="deep"),
        pytest.param(b"\x80\x02cnumpy\ndtype\nU\x02u1\x85RK\x03U\x01|NNN(t(tt(tb.", id="dtype"),
    ],
)
def test_a_hostile_pickle_is_one_line(tmp_path, memory, content):
    (tmp_path / PYTHON_FOLDER).mkdir()
    for name in TEST_FILES:
        (tmp_path / PYTHON_FOLDER / name).write_bytes(content)
    config = DataConfig(name="cifar10", dir=str(tmp_path))
    assert "test_batch" in refused(load, config, "test")
    assert memory() < 200 * MIB


def test_flipped_bytes_of_pickles_never_end_in_a_traceback(tmp_path):
    (tmp_path / PYTHON_FOLDER).mkdir()
    data = np.zeros((2, 3072), np.uint8)
    content = pickle.dumps({b"data": data, b"labels": [1, 2]}, protocol=2)
    config, generator = DataConfig(name="cifar10", dir=str(tmp_path)), random.Random(0)
    places = [i for i in range(len(content)) if not 200 < i < len(content) - 100]
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.choice(places)] = generator.randrange(256)
        (tmp_path / PYTHON_FOLDER / "test_batch").write_bytes(damaged)
        try:
            load(config, "test")
        except ValueError as error:
            assert "test_batch" in str(error)  # noqa: PT017, some are still right
