"""Rendering: a scene -> a 48 x 48 RGB image. A pure function of the scene."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from fastalign.evals.shapes.world import IMAGE_SIZE, Scene, Thing

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

RGB = {
    "red": (225, 30, 30),
    "green": (20, 160, 40),
    "blue": (35, 60, 230),
    "yellow": (245, 220, 30),
    "purple": (165, 40, 200),
    "cyan": (40, 215, 225),
}
NOISE = 12
"""Amplitude of the uniform pixel noise, in grey levels of 0..255."""

_OVERSAMPLE = 4  # drawn at four times the size and averaged down, for smooth edges


def render(scene: Scene) -> PILImage:
    """The scene as an RGB image of IMAGE_SIZE x IMAGE_SIZE pixels."""
    side = IMAGE_SIZE * _OVERSAMPLE
    canvas = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(draw, thing)
    pixels = np.asarray(canvas.reduce(_OVERSAMPLE), dtype=np.int16)
    noise = np.random.default_rng(scene.noise_seed).integers(
        -NOISE, NOISE, size=pixels.shape, dtype=np.int16, endpoint=True
    )
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def render_batch(scenes: list[Scene]) -> np.ndarray:
    """uint8 [N, H, W, 3]."""
    return np.stack([np.asarray(render(scene)) for scene in scenes])


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y = (value * _OVERSAMPLE for value in thing.centre)
    r = thing.radius * _OVERSAMPLE
    fill = RGB[thing.colour]
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "square":
        h = r * 0.85
        draw.rectangle((x - h, y - h, x + h, y + h), fill=fill)
    elif thing.shape == "triangle":
        half, drop = r * math.sqrt(3) / 2, r / 2
        draw.polygon([(x, y - r), (x + half, y + drop), (x - half, y + drop)], fill=fill)
    elif thing.shape == "cross":
        w = r / 3
        draw.rectangle((x - r, y - w, x + r, y + w), fill=fill)
        draw.rectangle((x - w, y - r, x + w, y + r), fill=fill)
    else:
        raise ValueError(f"unknown shape {thing.shape!r}")
