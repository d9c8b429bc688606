"""Two models with other patch grids: which tokens correspond, and attention resampled by area.

Switched on by ``AttentionAlignment(..., resample="area")``. The k-th text token of a sample is the
same token in both models, whatever surrounds it; the k-th image is the same image, and each of its
patches gives its attention to the student's patches in proportion to the area that it shares with
them. That is a linear map of the teacher's columns that keeps every row's mass, so the student's
gradient needs nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .tokens import Inputs, Tokens
from .view import ModelView

#: (frames, height, width) of each image or video, in patches as the decoder sees them.
Grid = tuple[int, int, int]


def grids_of(view: ModelView, tokens: Tokens, inputs: Inputs) -> list[list[Grid]]:
    """The grids of each sample's images, in order.

    Qwen-VL's come from ``image_grid_thw`` / ``video_grid_thw``; elsewhere a run of consecutive
    visual tokens is one image, whose number of tokens must be a square.

    Raises:
        ValueError: a run of tokens that is no grid (tiles and newlines of LLaVA-NeXT).
    """
    runs = [_run_lengths(row) for row in tokens.visual]
    vision = getattr(view.config, "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", None)
    given = inputs.get("image_grid_thw", inputs.get("video_grid_thw"))
    if given is not None and merge:
        if inputs.get("image_grid_thw") is not None and inputs.get("video_grid_thw") is not None:
            raise ValueError("inputs hold images and videos; allowed with resample: one of the two")
        found = [(t, h // merge, w // merge) for t, h, w in given.tolist()]
        return _by_run(runs, found, view.role)
    grids: list[list[Grid]] = []
    for lengths in runs:
        for length in lengths:
            if math.isqrt(length) ** 2 != length:
                raise ValueError(
                    f"{view.role}: an image has {length} tokens, which is no square grid; allowed "
                    "with resample='area': square images in one run of tokens each, or families with "
                    "image_grid_thw"
                )
        grids.append([(1, math.isqrt(n), math.isqrt(n)) for n in lengths])
    return grids


def _by_run(runs: list[list[int]], found: list[Grid], role: str) -> list[list[Grid]]:
    """Deal the batch's grids out to the samples; a video may be several runs, one a frame."""
    grids, rest = [], list(found)
    for lengths in runs:
        mine, covered = [], 0
        while covered < sum(lengths) and rest:
            mine.append(rest.pop(0))
            covered += math.prod(mine[-1])
        if covered != sum(lengths):
            raise ValueError(
                f"{role}: a sample has {sum(lengths)} visual tokens and grids of {covered}; allowed: "
                "equal numbers"
            )
        grids.append(mine)
    return grids


def _run_lengths(mask: Tensor) -> list[int]:
    before = torch.nn.functional.pad(mask, (1, 0))[:-1]
    run = (mask & ~before).cumsum(0)[mask]
    return torch.bincount(run)[1:].tolist() if len(run) else []


def area_weights(source: Grid, target: Grid) -> Tensor:
    """[target patches, source patches] float32: the share of each source patch in each target patch.

    Columns sum to 1. Frames must be as many on both sides.
    """
    if source[0] != target[0]:
        raise ValueError(
            f"a video has {source[0]} frames in the teacher and {target[0]} in the student; allowed "
            "with resample='area': equal numbers (space is resampled, time is not)"
        )
    rows, columns = _overlap(source[1], target[1]), _overlap(source[2], target[2])
    space = torch.kron(rows, columns)
    weights: Tensor = torch.block_diag(*[space] * source[0])
    return weights


def _overlap(source: int, target: int) -> Tensor:
    """[target, source]: the share of each of ``source`` equal intervals in each target interval."""
    s = torch.arange(source, dtype=torch.float64) / source
    t = torch.arange(target, dtype=torch.float64) / target
    low = torch.maximum(s[None], t[:, None])
    high = torch.minimum(s[None] + 1 / source, t[:, None] + 1 / target)
    return ((high - low).clamp(min=0) * source).float()


def resample(
    maps: Tensor, source: Sequence[Sequence[Grid]], target: Sequence[Sequence[Grid]]
) -> Tensor:
    """[B, G, R, C_t] teacher maps, columns in order, to [B, G, R, C_s] on the student's grids.

    Raises:
        ValueError: another number of images.
    """
    width = max((sum(map(math.prod, grids)) for grids in target), default=0)
    out = maps.new_zeros(*maps.shape[:3], width)
    for b, (old, new) in enumerate(zip(source, target, strict=True)):
        if len(old) != len(new):
            raise ValueError(
                f"sample {b} has {len(old)} images in the teacher's batch and {len(new)} in the "
                "student's; allowed: equal numbers"
            )
        if not old:
            continue
        weights = torch.block_diag(*[area_weights(x, y) for x, y in zip(old, new, strict=True)])
        weights = weights.to(maps)
        out[b, :, :, : weights.shape[0]] = maps[b, :, :, : weights.shape[1]] @ weights.T
    return out


def corresponding_rows(positions: Tensor, student: Tokens, teacher: Tokens) -> Tensor:
    """[B, R]: where the student's rows lie in the teacher's sequence; -1 stays -1.

    Raises:
        ValueError: rows on visual tokens, whose grids differ; texts of another length.
    """
    text_s, text_t = student.valid & ~student.visual, teacher.valid & ~teacher.visual
    text_t = text_t.to(text_s.device)
    counts, other = text_s.sum(-1), text_t.sum(-1)
    if not torch.equal(counts, other):
        raise ValueError(
            f"text tokens per sample: student {counts.tolist()}, teacher {other.tolist()}; allowed: "
            "equal counts (the k-th text token is the same in both)"
        )
    used = positions >= 0
    place = positions.clamp(min=0)
    if bool((used & student.visual.gather(1, place)).any()):
        raise ValueError(
            "rows hold visual tokens and the patch grids differ; allowed with resample='area': rows "
            "on text, such as 'text', 'response' or 'instruction'"
        )
    ordinal = (text_s.cumsum(-1) - 1).gather(1, place)
    length = text_t.shape[1]
    order = torch.where(text_t, torch.arange(length, device=text_t.device), length)
    order = order.sort(-1).values
    return torch.where(used, order.gather(1, ordinal.clamp(0, length - 1)), -1)
