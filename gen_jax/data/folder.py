"""A folder of pictures as a data set: one class per sub-folder, or a single class."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from gen_jax.data.config import Split
from gen_jax.data.images import Images

__all__ = ["SUFFIXES", "read"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_HEADER, _BYTES = 2**20, 8  # of a file, and of a pixel in it, at most
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # by content: Pillow would start a program for PostScript


def read(directory: str | Path, split: Split, size: int, max_pixels: int) -> Images:
    """Reads pictures, crops each to its central square and resizes it.

    Where the folder holds `train` and `test`, those are the splits. Otherwise a picture belongs
    to the test split when a hash of its relative path falls in the first tenth: adding or
    removing other pictures does not move it.

    Args:
      directory: holds pictures, or one sub-folder of pictures per class; labels follow the
        sorted names of the sub-folders. Names that begin with a dot are left out.
      split: "train" or "test".
      size: side of the result in pixels.
      max_pixels: of a picture as it is stored; larger ones are refused before they are decoded.

    Returns:
      Images uint8 [examples, size, size, 3] with labels; grey pictures become RGB and transparent
      ones are laid on black.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no pictures for this split, or one of them is too large or damaged.
    """
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; give --data.dir the folder of the images")
    if (root / "train").is_dir() and (root / "test").is_dir():
        classes = _classes(root / "train")
        base, paths = root / split, _pictures(root / split)
    else:
        classes, base = _classes(root), root
        pictures = _pictures(root)
        paths = [path for path in pictures if _in_test(path, root) == (split == "test")]
        if pictures and not paths:
            raise ValueError(
                f"none of the {len(pictures)} images in {root} falls in the {split} split (a tenth "
                "of them, by their names, is for tests): add images, or make folders train and test"
            )
    if not paths:
        raise ValueError(
            f"{base} holds no images for the {split} split; put {', '.join(SUFFIXES)} files there, "
            "or into one sub-folder per class"
        )
    labels = [_label(path, base, classes) for path in paths]
    with _any_size():
        images = np.stack([_square(path, size, max_pixels) for path in paths])
    return Images(images, np.array(labels, np.int32), classes or ("image",))


def _pictures(root: Path) -> list[Path]:
    found = [
        path
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _classes(root: Path) -> tuple[str, ...]:
    tops = {path.relative_to(root).parts for path in _pictures(root)}
    names = sorted({parts[0] for parts in tops if len(parts) > 1})
    loose = [parts[0] for parts in tops if len(parts) == 1]
    if names and loose:
        raise ValueError(
            f"{root} mixes classes ({names[0]}/) with loose images ({min(loose)}); "
            "move every image into a sub-folder, or none"
        )
    return tuple(names)


def _label(path: Path, root: Path, classes: tuple[str, ...]) -> int:
    parts = path.relative_to(root).parts
    name = parts[0] if len(parts) > 1 else ""
    if not classes and not name:
        return 0
    if name not in classes:
        raise ValueError(
            f"{path} has no class among those of the train folder: {', '.join(classes) or 'none'}"
        )
    return classes.index(name)


def _in_test(path: Path, root: Path) -> bool:
    name = path.relative_to(root).as_posix().encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8]) % 10 == 0


@contextlib.contextmanager
def _any_size() -> Iterator[None]:
    """Switches off the limit of Pillow, which warns of a size and refuses twice that."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


class _TooLarge(ValueError):
    pass


def _check_size(path: Path, pixels: int, max_pixels: int) -> None:
    if pixels > max_pixels:
        raise _TooLarge(
            f"{path} has {pixels} pixels, and at most {max_pixels} are read; shrink or move it, or "
            "raise --data.max-pixels"
        )


def _square(path: Path, size: int, max_pixels: int) -> np.ndarray:
    try:
        # No format needs more for a pixel; some are read whole when they are opened.
        _check_size(path, (path.stat().st_size - _HEADER) // _BYTES, max_pixels)
        with Image.open(path, formats=_FORMATS) as file:
            _check_size(path, file.width * file.height, max_pixels)
            image = ImageOps.exif_transpose(file)
            has_alpha = image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info
            if has_alpha:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            image = image.convert("RGB")
    except (MemoryError, _TooLarge):
        raise
    except Exception as error:  # of decoders, on damaged bytes
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as an image ({reason}); mend or move it") from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    method = Image.Resampling.BOX if side % size == 0 else Image.Resampling.LANCZOS
    return np.asarray(image.resize((size, size), method))
