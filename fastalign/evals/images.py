"""Pictures of a benchmark, decoded when they are needed: files below a root, or bytes in a data file."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distill.data.images import FORMATS, MAX_PIXELS, load_image
from ..distill.data.records import SampleError
from .files import Encoded, Row, shown


@dataclass(frozen=True)
class Picture:
    """One image.

    Attributes:
        where: the sample that names it, for messages.
        source: a path below ``root``, or the image inside the data file.
    """

    where: str
    source: str | Encoded
    root: Path | None = None

    def load(self) -> Any:
        """An RGB image (Pillow).

        Raises:
            SampleError: no file, a path that leaves the root, bytes that are no image, too many pixels.
        """
        if isinstance(self.source, str):
            return load_image(self.source, self._root(), self.where)
        return _decode(self.source.read(), self.where)

    def identity(self) -> list[str | int]:
        """What tells it from another: the bytes' digest inside a data file, else path and size.

        Raises:
            SampleError: there is no such file, or it lies outside the root.
        """
        if isinstance(self.source, Encoded):
            return [hashlib.sha256(self.source.read()).hexdigest()]
        path = _inside(self.source, self._root(), self.where)
        return [self.source, path.stat().st_size]

    def _root(self) -> Path:
        if self.root is None:
            raise SampleError(
                self.where,
                f"names an image file, {self.source!r}; give the images' folder (--images)",
            )
        return self.root


def picture(row: Row, *names: str, root: Path | None, suffixes: Sequence[str] = ("",)) -> Picture:
    """The picture in a field: a name in ``root`` (with the first of ``suffixes`` that exists), or bytes."""
    value = row.value(*names)
    if isinstance(value, Encoded):
        return Picture(row.where, value)
    if not isinstance(value, str) or not value:
        raise SampleError(row.where, f"{names[0]!r} is {shown(value)}; allowed: an image's name")
    return named_picture(row.where, value, root, suffixes)


def named_picture(where: str, name: str, root: Path | None, suffixes: Sequence[str]) -> Picture:
    """The picture ``name`` + one of ``suffixes`` in ``root``."""
    if root is not None:
        for suffix in suffixes:
            try:
                if (root / (name + suffix)).is_file():
                    return Picture(where, name + suffix, root)
            except (OSError, ValueError):  # a name that no file can have; ``load`` says so
                break
    return Picture(where, name + suffixes[0], root)


def base64_picture(row: Row, name: str) -> Picture:
    """The picture in a base64 field, checked when it is read."""
    text = row.text(name)

    def read() -> bytes:
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise SampleError(row.where, f"{name!r} is no base64: {error}") from error

    return Picture(row.where, Encoded(read))


def _decode(data: bytes, where: str) -> Any:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings of odd metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS:
                    raise SampleError(
                        where, f"its image has {width} x {height} pixels; allowed: {MAX_PIXELS}"
                    )
                return opened.convert("RGB")
    except SampleError:
        raise
    except Exception as error:  # decoders of hostile bytes raise nearly anything
        raise SampleError(where, f"its image cannot be decoded: {error}") from error


def _inside(name: str, root: Path, where: str) -> Path:
    """The file, without reading it; the same rule as ``load_image``'s."""
    try:
        base = root.resolve()
        path = (base / name).resolve()
        if path.is_relative_to(base) and path.is_file():
            return path
    except (OSError, ValueError, RuntimeError) as error:
        raise SampleError(where, f"image path {name[:80]!r} cannot be used: {error}") from error
    raise SampleError(where, f"image {name[:80]!r} is not a file inside {root}")
