import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from annotations import unchecked_annotations
from gen_jax.pictures import grid, save_gif, save_images, save_png, to_uint8


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_to_uint8_inverts_the_scaling_of_every_byte():
    every = np.arange(256, dtype=np.uint8)
    for dtype in (np.float32, np.float64):
        assert np.array_equal(to_uint8(every.astype(dtype) / 127.5 - 1), every)


@unchecked_annotations()
def test_to_uint8_clips_and_refuses():
    assert to_uint8(np.array([-3.0, -1, 0, 1, np.inf])).tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="not numbers"):
        to_uint8(np.array([np.nan]))
    with pytest.raises(ValueError, match="expected floats"):
        to_uint8(np.array([1]))


@pytest.mark.parametrize(
    ("columns", "scale", "gap"), [(None, 1, 1), (2, 3, 0), (5, 1, 2), (9, 2, 1)]
)
def test_every_image_is_in_its_cell_of_the_grid(columns, scale, gap):
    images = noise(7, 4, 5, 3)
    sheet = grid(images, columns, scale, gap)
    width = columns or 3
    covered = np.zeros(sheet.shape[:2], bool)
    for place, image in enumerate(images):
        top, left = place // width * (4 * scale + gap), place % width * (5 * scale + gap)
        cell = slice(top, top + 4 * scale), slice(left, left + 5 * scale)
        assert np.array_equal(sheet[cell][::scale, ::scale], image)
        assert np.array_equal(sheet[cell], image.repeat(scale, 0).repeat(scale, 1))
        covered[cell] = True
    assert not sheet[~covered].any()
    rows = -(-7 // width)
    assert sheet.shape == (
        rows * (4 * scale + gap) - gap,
        width * (5 * scale + gap) - gap,
        3,
    )


def test_grey_images_become_rgb_in_the_grid():
    images = noise(1, 4, 4, 1)
    assert np.array_equal(grid(images), np.repeat(images[0], 3, axis=-1))


@pytest.mark.parametrize("shape", [(5, 6, 3), (5, 6, 1), (5, 6)])
def test_png_is_lossless(tmp_path, shape):
    array = noise(*shape)
    save_png(tmp_path / "new" / "x.png", array)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "x.png")), array.squeeze())


def test_images_are_numbered_from_the_start(tmp_path):
    images = noise(3, 4, 4, 3)
    save_images(tmp_path, images, start=9)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000009.png",
        "000010.png",
        "000011.png",
    ]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "000010.png")), images[1])


def test_gif_loops_and_holds_its_last_frame(tmp_path):
    frames = [np.full((4, 4, 3), value, np.uint8) for value in (0, 100, 200)]
    save_gif(tmp_path / "x.gif", frames, 50)
    with Image.open(tmp_path / "x.gif") as image:
        assert image.n_frames == 3
        assert image.info["loop"] == 0
        durations = []
        for number, frame in enumerate(frames):
            image.seek(number)
            durations.append(image.info["duration"])
            assert np.array_equal(np.asarray(image.convert("RGB")), frame)
    assert durations == [50, 50, 1500]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    save_png(path, noise(4, 4, 3))
    before = path.read_bytes()

    def fail(self, file, format):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        save_png(path, noise(5, 5, 3))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: grid(np.zeros((2, 4, 4, 3))), "uint8"),
        (lambda path: grid(noise(2, 4, 4)), "uint8"),
        (lambda path: grid(noise(0, 4, 4, 3)), "at least one"),
        (lambda path: grid(noise(2, 4, 4, 3), columns=0), "at least 1"),
        (lambda path: save_png(path, np.zeros((4, 4))), "float64"),
        (lambda path: save_png(path, noise(4, 4, 2)), r"\[4, 4, 2\]"),
        (lambda path: save_gif(path, [], 50), "no frames"),
        (lambda path: save_gif(path, [noise(4, 4)], 5), "10 to"),
        (lambda path: save_gif(path, [noise(4, 4), noise(5, 4)], 50), "one size"),
        (lambda path: save_images(path, noise(1, 4, 4, 3), start=-1), "at least 0"),
    ],
)
@unchecked_annotations()
def test_bad_arguments_are_refused(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_importing_pictures_does_not_import_jax():
    code = "import gen_jax.pictures, sys; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
