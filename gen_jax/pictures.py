"""Arrays to picture files; a file appears whole under its name or not at all."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from gen_jax import whole_file

__all__ = ["grid", "save_gif", "save_images", "save_png", "to_uint8"]

Picture = UInt8[Any, "height width"] | UInt8[Any, "height width 1"] | UInt8[Any, "height width 3"]

_HOLD_MILLISECONDS = 1500
_LONGEST_MILLISECONDS = 655_350  # two bytes of hundredths of a second


def to_uint8(images: Float[Any, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Maps [-1, 1] to 0..255, rounding to nearest and clipping what lies outside.

    Raises:
      ValueError: the array is not of floats, or holds a NaN.
    """
    images = np.asarray(images)
    if images.dtype.kind != "f" and images.dtype.name != "bfloat16":
        raise ValueError(f"images are {images.dtype}; expected floats in [-1, 1]")
    scaled = (images.astype(np.float32) + 1) * 127.5
    if np.isnan(scaled).any():
        raise ValueError("images hold values that are not numbers; did the sampler diverge?")
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def grid(
    images: UInt8[Any, "B height width C"],
    columns: int | None = None,
    scale: int = 1,
    gap: int = 1,
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """Lays images out in rows on black, in reading order.

    Args:
      images: with C of 1 or 3, and B >= 1.
      columns: images per row; the smallest square that holds all of them when not given.
      scale: pixels drawn per pixel of an image, in both directions, from 1 up.
      gap: black pixels between neighbours, from 0 up.

    Raises:
      ValueError: another dtype or shape, or a number out of range.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            "images must be uint8 [B, height, width, 1 or 3], "
            f"not {images.dtype} {list(images.shape)}"
        )
    count = len(images)
    if count == 0:
        raise ValueError("there are no images to lay out; give at least one")
    columns = math.isqrt(count - 1) + 1 if columns is None else columns
    if columns < 1 or scale < 1 or gap < 0:
        raise ValueError(
            f"columns is {columns}, scale {scale}, gap {gap}; they must be at least 1, 1 and 0"
        )
    rows = -(-count // columns)
    drawn = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = drawn.shape[1] + gap, drawn.shape[2] + gap
    sheet = np.zeros((rows * height - gap, columns * width - gap, 3), np.uint8)
    for place, image in enumerate(drawn):
        top, left = place // columns * height, place % columns * width
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def save_png(path: str | Path, array: Picture) -> None:
    """Writes one image as PNG, making its folder.

    Args:
      path: of the file, replaced when it is there.
      array: grey or RGB.

    Raises:
      ValueError: another dtype or shape.
      OSError: the file cannot be written.
    """
    image = _image(array)
    with whole_file.replacing(path, durable=False) as file:
        image.save(file, format="PNG")


def save_gif(path: str | Path, frames: Sequence[Picture], milliseconds: int) -> None:
    """Writes frames as an animated GIF that loops and holds its last frame for 1.5 s or more.

    Args:
      path: of the file, replaced when it is there.
      frames: grey or RGB, all of one size, at least one.
      milliseconds: per frame, from 10 to 655350; GIF rounds to hundredths of a second.

    Raises:
      ValueError: another dtype, shape or duration, or no frames.
      OSError: the file cannot be written.
    """
    if not 10 <= milliseconds <= _LONGEST_MILLISECONDS:
        raise ValueError(
            f"milliseconds is {milliseconds}; a frame of a GIF takes 10 to {_LONGEST_MILLISECONDS}"
        )
    if len(frames) == 0:
        raise ValueError("there are no frames to save; give at least one")
    images = [_image(frame) for frame in frames]
    if len({image.size for image in images}) > 1:
        raise ValueError("frames differ in size; a GIF needs frames of one size")
    durations = [milliseconds] * (len(images) - 1) + [max(milliseconds, _HOLD_MILLISECONDS)]
    first, rest = images[0], images[1:]
    more = {"append_images": rest, "duration": durations, "loop": 0}
    with whole_file.replacing(path, durable=False) as file:
        first.save(file, format="GIF", save_all=True, **more)


def save_images(
    directory: str | Path, images: UInt8[Any, "B height width C"], start: int = 0
) -> None:
    """Writes images as 000000.png, 000001.png and so on, making their folder.

    Args:
      directory: of the files.
      images: with C of 1 or 3.
      start: number of the first file, from 0 up.

    Raises:
      ValueError: another dtype or shape, or a negative start.
      OSError: a file cannot be written.
    """
    if start < 0:
        raise ValueError(f"start is {start}; it must be at least 0")
    for number, image in enumerate(images, start):
        save_png(Path(directory) / f"{number:06d}.png", image)


def _image(array: np.ndarray) -> Image.Image:
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise ValueError(
            "an image must be uint8 [height, width], [height, width, 1] or [height, width, 3], "
            f"not {array.dtype} {list(array.shape)}"
        )
    return Image.fromarray(array)
