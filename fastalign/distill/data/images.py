"""Images from below a root, decoded whole, or a ``SampleError``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from .records import SampleError

#: Formats that are decoded inside the library; others (EPS) start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 50_000_000


def load_image(image: Any, root: Path, where: str, max_pixels: int = MAX_PIXELS) -> Any:
    """An RGB image.

    Args:
        image: a path below ``root``, or a decoded image.
        root: nothing outside of it is opened, also through links.
        max_pixels: more are refused before anything is decoded.

    Raises:
        SampleError: the path leaves the root, no file, no image, a truncated or too large one.
    """
    from PIL import Image

    if not isinstance(image, str):
        return image.convert("RGB")
    path = _inside(image, root, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow's warnings of odd metadata and of its own limit
            with Image.open(path, formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > max_pixels:
                    raise SampleError(
                        where,
                        f"image {image!r} has {width} x {height} pixels; allowed: {max_pixels}",
                    )
                if min(width, height) < 1:
                    raise SampleError(where, f"image {image!r} has {width} x {height} pixels")
                return opened.convert("RGB")
    except SampleError:
        raise
    except Exception as error:
        # Decoders of hostile bytes raise nearly anything (OSError, SyntaxError, struct.error, zlib's,
        # ValueError, OverflowError, MemoryError); all of it means that this file is no good.
        raise SampleError(where, f"image {image!r} cannot be decoded: {error}") from error


def _inside(image: str, root: Path, where: str) -> Path:
    try:
        base = root.resolve()
        path = (base / image).resolve()
        inside = path.is_relative_to(base)
        there = inside and path.is_file()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a null byte, a loop of links, a long name
        raise SampleError(where, f"image path {image[:80]!r} cannot be used: {error}") from error
    if not inside:
        raise SampleError(where, f"image {image[:80]!r} lies outside the image root {root}")
    if not there:
        raise SampleError(where, f"image {image[:80]!r} is not a file in {root}")
    return path
