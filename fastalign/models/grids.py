"""Two models with other patch grids: which tokens correspond, and attention resampled by area.

Switched on by ``AttentionAlignment(..., resample="area")``. The k-th text token of a sample is the
same token in both models, whatever surrounds it; the k-th image is the same image. A row of the
teacher's map gives each patch's attention to the student's patches in proportion to the area (of videos:
area and time) that it shares with them, which keeps the row's mass; a visual row of the student is
compared with the mean of the teacher's rows, weighted by their share of the student's patch. Both are
linear maps of the teacher's map, so that the student's gradient needs nothing of them. Tokens that stand
for no patch (newlines) are neither rows nor columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layouts import Grid, Layout, layouts_of, patch_mask
from .tokens import Inputs, RowChoice, Tokens
from .view import ModelView


@dataclass(frozen=True)
class Relation:
    """How a batch of the student and one of the teacher correspond.

    Attributes:
        rows: the student's rows, without those on tokens that stand for no patch.
        teacher_rows: the teacher's rows that they need.
        columns, teacher_columns: [B, L] bool, the compared columns of each model.
        row_maps: a sample's [student rows, teacher rows] matrix, sparse.
        column_maps: a sample's [student patches, teacher patches] matrix, as the blocks of its images.
    """

    rows: RowChoice
    teacher_rows: RowChoice
    columns: Tensor
    teacher_columns: Tensor
    row_maps: list[Tensor]
    column_maps: list[list[Tensor]]

    def apply(self, maps: Tensor) -> Tensor:
        """[B, G, R_t, C_t] maps of the teacher, columns in order, on the student's rows and columns."""
        batch, groups = maps.shape[:2]
        sizes = [[block.shape for block in blocks] for blocks in self.column_maps]
        width = max((sum(n for n, _ in shapes) for shapes in sizes), default=0)
        out = maps.new_zeros(batch, groups, self.rows.positions.shape[1], width)
        for b, (rows, blocks) in enumerate(zip(self.row_maps, self.column_maps, strict=True)):
            old = new = 0
            for block in blocks:
                height, length = block.shape
                for g in range(groups):
                    taken = maps[b, g, : rows.shape[1], old : old + length]
                    part = torch.sparse.mm(rows.to(maps), taken @ block.T.to(maps))
                    out[b, g, :, new : new + height] = part
                old, new = old + length, new + height
        return out


def relate(
    student: tuple[ModelView, Tokens, Inputs],
    teacher: tuple[ModelView, Tokens, Inputs],
    rows: RowChoice,
) -> Relation:
    """How two batches of the same samples correspond.

    Args:
        student, teacher: the model, its tokens and its batch.
        rows: the chosen rows of the student.

    Raises:
        ValueError: texts of another length, another number of images, images whose views do not
            correspond, tokens whose grid is not known.
    """
    pairs = [layouts_of(*student), layouts_of(*teacher)]
    for b, (mine, theirs) in enumerate(zip(*pairs, strict=True)):
        if len(mine) != len(theirs):
            raise ValueError(
                f"sample {b} has {len(theirs)} images in the teacher's batch and {len(mine)} in the "
                "student's; allowed: equal numbers"
            )
    tokens_s, tokens_t = student[1], teacher[1]
    text_s, text_t = (t.valid & ~t.visual for t in (tokens_s, tokens_t))
    counts, others = text_s.sum(-1).tolist(), text_t.sum(-1).tolist()
    if counts != others:
        raise ValueError(
            f"text tokens per sample: student {counts}, teacher {others}; allowed: equal counts (the "
            "k-th text token is the same in both)"
        )
    columns, teacher_columns = (
        patch_mask(t.visual, layouts)
        for t, layouts in zip((tokens_s, tokens_t), pairs, strict=True)
    )
    kept = _without(rows, tokens_s.visual & ~columns)
    places, row_maps = [], []
    for b, positions in enumerate(kept.positions):
        row_map, places_b = _row_map(
            positions.cpu(),
            (text_s[b].cpu(), text_t[b].cpu()),
            (columns[b].cpu(), teacher_columns[b].cpu()),
            [_row_average(*images) for images in zip(pairs[0][b], pairs[1][b], strict=True)],
        )
        places.append(places_b)
        row_maps.append(row_map)
    width = max(1, *(len(p) for p in places))
    positions_t = torch.full((len(places), width), -1)
    for b, place in enumerate(places):
        positions_t[b, : len(place)] = place
    return Relation(
        rows=kept,
        teacher_rows=RowChoice(positions_t.to(tokens_t.valid.device), False, None),
        columns=columns,
        teacher_columns=teacher_columns,
        row_maps=row_maps,
        column_maps=[
            [_share(*images) for images in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(*pairs, strict=True)
        ],
    )


def _without(rows: RowChoice, dropped: Tensor) -> RowChoice:
    """The rows without those on ``dropped`` [B, L]."""
    at = rows.positions.clamp(min=0).to(dropped.device)
    gone = dropped.gather(1, at) | (rows.positions.to(dropped.device) < 0)
    if not bool((gone & (rows.positions.to(dropped.device) >= 0)).any()):
        return rows
    return RowChoice(torch.where(gone, -1, at), rows.every, rows.weight)


def _row_map(
    positions: Tensor,
    text: tuple[Tensor, Tensor],
    patches: tuple[Tensor, Tensor],
    average: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """(sparse [R_s, R_t], the teacher's positions [R_t]) of one sample.

    Args:
        positions: [R_s] of the student, -1: no row.
        text, patches: [L] bool of student and teacher.
        average: [student patches, teacher patches] of each image, rows sum to 1.
    """
    text_t, patches_t = text[1].nonzero().flatten(), patches[1].nonzero().flatten()
    ordinal_text, ordinal_patch = text[0].cumsum(0) - 1, patches[0].cumsum(0) - 1
    used = (positions >= 0).nonzero().flatten()
    is_text = text[0][positions[used]]
    rows = used[is_text]
    index, to = [rows], [text_t[ordinal_text[positions[rows]]]]
    value = [torch.ones(len(rows))]
    rows = used[~is_text]
    ordinals, old, new = ordinal_patch[positions[rows]], 0, 0
    for block in average:
        height, length = block.shape
        inside = (ordinals >= new) & (ordinals < new + height)
        shares = block[ordinals[inside] - new]
        at, near = shares.nonzero().unbind(-1)
        index.append(rows[inside][at])
        to.append(patches_t[old + near])
        value.append(shares[at, near])
        old, new = old + length, new + height
    places, column = torch.unique(torch.cat(to), return_inverse=True)
    entries = torch.stack([torch.cat(index), column])
    matrix = torch.sparse_coo_tensor(
        entries, torch.cat(value), (len(positions), len(places)), check_invariants=True
    )
    return matrix.coalesce(), places


# -------------------------------------------------------------------------------- weights


def _share(student: Layout, teacher: Layout) -> Tensor:
    """What part of each teacher patch's attention goes to each student patch; columns sum to 1."""
    return _by_view(student, teacher, [area_weights(t, s) for s, t in _views(student, teacher)])


def _row_average(student: Layout, teacher: Layout) -> Tensor:
    """What part of each student patch is each teacher patch; rows sum to 1."""
    blocks = [area_weights(s, t).T for s, t in _views(student, teacher)]
    matrix = _by_view(student, teacher, blocks)
    return matrix / matrix.sum(-1, keepdim=True)


def _views(student: Layout, teacher: Layout) -> list[tuple[Grid, Grid]]:
    if len(student.views) == len(teacher.views):
        return list(zip(student.views, teacher.views, strict=True))
    if len(student.views) == 1:
        return [(student.views[0], view) for view in teacher.views]
    raise ValueError(
        f"an image has {len(student.views)} views in the student and {len(teacher.views)} in the "
        "teacher; allowed with resample='area': as many, or one view in the student (which of "
        "several views a patch's attention belongs to is not known)"
    )


def _by_view(student: Layout, teacher: Layout, blocks: list[Tensor]) -> Tensor:
    """View by view, or all views of the teacher onto the student's one."""
    if len(student.views) == len(teacher.views):
        matrix: Tensor = torch.block_diag(*blocks)
        return matrix
    return torch.cat(blocks, dim=1)


def area_weights(source: Grid, target: Grid) -> Tensor:
    """[target patches, source patches] float32: the share of each source patch in each target patch.

    Columns sum to 1. Both grids cover the same image, or the same time of a video.
    """
    time, rows, columns = (_overlap(x, y) for x, y in zip(source, target, strict=True))
    return torch.kron(time, torch.kron(rows, columns))


def _overlap(source: int, target: int) -> Tensor:
    """[target, source]: the share of each of ``source`` equal intervals in each target interval."""
    s = torch.arange(source, dtype=torch.float64) / source
    t = torch.arange(target, dtype=torch.float64) / target
    low = torch.maximum(s[None], t[:, None])
    high = torch.minimum(s[None] + 1 / source, t[:, None] + 1 / target)
    return ((high - low).clamp(min=0) * source).float()
