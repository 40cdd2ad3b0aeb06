import os

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from gen_jax.data import DataConfig, load


def save(path, colour=(10, 20, 30), size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def read(directory, split="train", size=4):
    return load(DataConfig(name="folder", dir=str(directory), size=size), split)


def test_sub_folders_are_classes_in_sorted_order(tmp_path):
    for number in range(30):
        save(tmp_path / "dog" / f"{number}.png", (200, 0, 0))
        save(tmp_path / "cat" / f"{number}.png", (0, 200, 0))
    train, test = read(tmp_path), read(tmp_path, "test")
    assert train.label_names == test.label_names == ("cat", "dog")
    assert len(train) + len(test) == 60
    for data in (train, test):
        assert np.array_equal(data.images[:, 0, 0, 0] == 200, data.labels == 1)


def test_a_picture_keeps_its_split_when_others_come(tmp_path):
    for number in range(60):
        save(tmp_path / f"{number}.png", (number, 0, 0))
    before = set(read(tmp_path, "test").images[:, 0, 0, 0].tolist())
    for number in range(60, 90):
        save(tmp_path / f"{number}.png", (number, 0, 0))
    after = set(read(tmp_path, "test").images[:, 0, 0, 0].tolist())
    train = set(read(tmp_path).images[:, 0, 0, 0].tolist())
    assert before <= after
    assert not after & train
    assert after | train == set(range(90))
    assert 1 <= len(after) <= 25


def test_train_and_test_folders_are_the_splits(tmp_path):
    save(tmp_path / "train" / "a" / "1.png", (1, 0, 0))
    save(tmp_path / "train" / "b" / "2.png", (2, 0, 0))
    save(tmp_path / "test" / "b" / "3.png", (3, 0, 0))
    assert read(tmp_path).labels.tolist() == [0, 1]
    assert read(tmp_path, "test").labels.tolist() == [1]
    save(tmp_path / "test" / "c" / "4.png")
    with pytest.raises(ValueError, match="no class among those of the train folder: a, b"):
        read(tmp_path, "test")


def pair(tmp_path):
    """A folder whose only picture, to be written by the test, is in the training split."""
    save(tmp_path / "test" / "other.png")
    return tmp_path / "train"


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp", "bmp"])
def test_every_format_is_read(tmp_path, suffix):
    save(pair(tmp_path) / f"x.{suffix}", (10, 100, 200))
    error = read(tmp_path).images.astype(int) - np.array([10, 100, 200])
    assert np.abs(error).max() <= 3


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("LA", (80, 255), (80, 80, 80)),
        ("RGBA", (200, 100, 50, 0), (0, 0, 0)),
        ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_grey_becomes_rgb_and_transparency_becomes_black(tmp_path, mode, colour, expected):
    save(pair(tmp_path) / "x.png", colour, mode=mode)
    assert (read(tmp_path).images == expected).all()


def test_the_central_square_is_kept_and_averaged(tmp_path):
    image = np.zeros((8, 12, 3), np.uint8)
    image[:, :2], image[:, -2:] = 255, 255
    image[:, 2:10] = np.arange(8).reshape(1, 8, 1) // 2 * 40
    (tmp_path / "train").mkdir()
    Image.fromarray(image).save(pair(tmp_path) / "x.png")
    assert read(tmp_path).images[0, 0, :, 0].tolist() == [0, 40, 80, 120]


def test_other_sizes_are_resized(tmp_path):
    save(pair(tmp_path) / "x.png", size=(7, 9))
    assert (read(tmp_path, size=5).images == (10, 20, 30)).all()


def test_an_unreadable_image_is_named(tmp_path):
    (pair(tmp_path)).mkdir()
    (tmp_path / "train" / "bad.png").write_bytes(b"nothing of a picture")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_postscript_starts_no_program(tmp_path, monkeypatch):
    """Pillow goes by the content of a file, and leaves PostScript to Ghostscript."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path / 'it was run'}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    content = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    for i in range(20):
        (pictures / f"{i}.png").write_text(content)
    with pytest.raises(ValueError, match=r"\d\.png cannot be read as an image"):
        read(pictures)
    assert not (tmp_path / "it was run").exists()


def test_a_truncated_image_is_named(tmp_path):
    path = pair(tmp_path) / "cut.png"
    path.parent.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read"):
        read(tmp_path)


def test_no_folder_no_images_and_mixed_folders_are_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no images for the train split"):
        read(tmp_path)
    save(tmp_path / "a.png")
    save(tmp_path / "class" / "b.png")
    with pytest.raises(ValueError, match="mixes classes"):
        read(tmp_path)


def test_few_images_may_all_be_of_one_split(tmp_path):
    save(tmp_path / "a.png")
    (found,) = (split for split in ("train", "test") if _images_of(tmp_path, split))
    other = "test" if found == "train" else "train"
    with pytest.raises(ValueError, match=rf"none of the 1 images in .* falls in the {other} split"):
        read(tmp_path, other)


def _images_of(directory, split):
    try:
        return len(read(directory, split))
    except ValueError:
        return 0
