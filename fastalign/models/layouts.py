"""Which patch of which image every visual token stands for, family by family.

An image is one or several *views*, grids of patches that each cover the whole of it (LLaVA-NeXT: the
small image, then the large one out of tiles), and tokens that cover nothing (newlines).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tokens import Inputs, Tokens
from .view import ModelView

#: (frames, height, width) of a view, in patches as the decoder sees them.
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """One image or video.

    Attributes:
        views: the grids, in order.
        patches: for each of its tokens, in order, whether it stands for a patch. The patches come view
            by view, frame by frame, row by row.
    """

    views: tuple[Grid, ...]
    patches: tuple[bool, ...]


def layouts_of(view: ModelView, tokens: Tokens, inputs: Inputs) -> list[list[Layout]]:
    """The images of each sample of a batch, in order.

    Qwen-VL's grids come from ``image_grid_thw`` / ``video_grid_thw``, Pixtral's from ``image_sizes``,
    Gemma 4's from ``image_position_ids``, LLaVA-NeXT's and OneVision's from ``image_sizes`` and the
    configuration. Elsewhere the visual tokens of the batch are shared out evenly among its
    ``pixel_values``, and each image (or tile: a tile counts as an image) must be a square; where these do
    not tell how many images there are, a run of consecutive visual tokens is one.

    Raises:
        ValueError: tokens that these rules do not explain.
    """
    counts = tokens.visual.sum(-1).tolist()
    for known in (_from_thw, _from_anyres, _from_pixtral, _from_positions, _from_pixels):
        found = known(view, inputs, sum(counts))
        if found is not None:
            return _deal(found, counts, view.role)
    return [[_square(n, view.role) for n in _run_lengths(row)] for row in tokens.visual]


def patch_mask(visual: Tensor, layouts: list[list[Layout]]) -> Tensor:
    """[B, L] bool: the visual tokens that stand for a patch."""
    mask = visual.clone()
    for b, images in enumerate(layouts):
        flags = [flag for image in images for flag in image.patches]
        mask[b, visual[b]] = torch.tensor(flags, dtype=torch.bool, device=visual.device)
    return mask


# ------------------------------------------------------------------------------- families


def _from_thw(view: ModelView, inputs: Inputs, count: int) -> list[Layout] | None:
    merge = getattr(getattr(view.config, "vision_config", None), "spatial_merge_size", None)
    given = inputs.get("image_grid_thw"), inputs.get("video_grid_thw")
    if merge is None or given == (None, None):
        return None
    if None not in given:
        raise ValueError("inputs hold images and videos; allowed with resample: one of the two")
    thw = next(x for x in given if x is not None)
    return [_plain((t, h // merge, w // merge)) for t, h, w in thw.tolist()]


def _from_anyres(view: ModelView, inputs: Inputs, count: int) -> list[Layout] | None:
    """A small view, and a large one of tiles, cut to the image, with a newline after each row."""
    sizes = inputs.get("image_sizes")
    if view.config.model_type not in ("llava_next", "llava_onevision") or sizes is None:
        return None
    if inputs.get("pixel_values_videos") is not None:
        raise ValueError(
            f"inputs hold videos; allowed with resample for {view.config.model_type}: images"
        )
    one_view = [False] * len(sizes)
    numbers = inputs.get("batch_num_images")
    if view.config.model_type == "llava_onevision" and numbers is not None:
        one_view = [n != 1 for n in torch.as_tensor(numbers).tolist() for _ in range(n)]
    side = view.config.vision_config.image_size // view.config.vision_config.patch_size
    base = _plain((1, side, side))
    found = []
    for size, alone in zip(sizes.tolist(), one_view, strict=True):
        if alone:
            found.append(Layout(base.views, (*base.patches, False)))
            continue
        height, width = _anyres_grid(view.config, size, side)
        row = (True,) * width + (False,)
        found.append(Layout((*base.views, (1, height, width)), base.patches + row * height))
    return found


def _anyres_grid(config: Any, size: list[int], side: int) -> tuple[int, int]:
    from transformers.models.llava_next import modeling_llava_next as theirs

    tiles = theirs.get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    whole = torch.empty(1, tiles[0] * side, tiles[1] * side, device="meta")
    height, width = theirs.unpad_image(whole, size).shape[1:]
    limit = getattr(config, "vision_aspect_ratio", None)  # OneVision shrinks what is too large
    if limit is not None:
        ratio = math.sqrt(height * width / (int(limit.removeprefix("anyres_max_")) * side**2))
        if ratio > 1.1:
            return int(height // ratio), int(width // ratio)
    return height, width


def _from_pixtral(view: ModelView, inputs: Inputs, count: int) -> list[Layout] | None:
    sizes, vision = inputs.get("image_sizes"), getattr(view.config, "vision_config", None)
    if vision is None or sizes is None or vision.model_type != "pixtral":
        return None
    patch = vision.patch_size * getattr(view.config, "spatial_merge_size", 1)
    return [_plain((1, h // patch, w // patch)) for h, w in torch.as_tensor(sizes).tolist()]


def _from_positions(view: ModelView, inputs: Inputs, count: int) -> list[Layout] | None:
    places = inputs.get("image_position_ids")
    if places is None:
        return None
    pool = view.config.vision_config.pooling_kernel_size
    widths, heights = ((places.amax(1) + 1) // pool).unbind(-1)
    return [_plain((1, h, w)) for h, w in zip(heights.tolist(), widths.tolist(), strict=True)]


def _from_pixels(view: ModelView, inputs: Inputs, count: int) -> list[Layout] | None:
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or not len(pixels):
        return None
    each, rest = divmod(count, len(pixels))
    if rest:
        raise ValueError(
            f"{view.role}: {count} visual tokens for {len(pixels)} images or tiles; allowed with "
            "resample='area': equally many for each"
        )
    return [_square(each, view.role)] * len(pixels)


# ---------------------------------------------------------------------------------- parts


def _plain(grid: Grid) -> Layout:
    return Layout((grid,), (True,) * math.prod(grid))


def _square(count: int, role: str) -> Layout:
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(
            f"{role}: an image has {count} tokens, which is no square grid; allowed with "
            "resample='area': square images (or tiles), or a family that tells its grids"
        )
    return _plain((1, side, side))


def _deal(found: list[Layout], counts: list[int], role: str) -> list[list[Layout]]:
    """Deal the batch's images out to the samples, by their numbers of visual tokens."""
    dealt, rest = [], list(found)
    for count in counts:
        mine: list[Layout] = []
        covered = 0
        while covered < count and rest:
            mine.append(rest.pop(0))
            covered += len(mine[-1].patches)
        if covered != count:
            raise ValueError(
                f"{role}: a sample has {count} visual tokens and its images' grids make {covered}; "
                "allowed: equal numbers"
            )
        dealt.append(mine)
    return dealt


def _run_lengths(mask: Tensor) -> list[int]:
    before = torch.nn.functional.pad(mask, (1, 0))[:-1]
    run = (mask & ~before).cumsum(0)[mask]
    return torch.bincount(run)[1:].tolist() if len(run) else []
