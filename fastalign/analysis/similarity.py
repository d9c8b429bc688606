"""How alike two layers look at the image, row by row, from the streaming kernels.

Everything here comes from a backend's statistics of rows (``Forward.statistics``, ``Forward.lse_s``):
no map of heads x rows x columns is held, whatever the length.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..backends.contract import Forward
from ..maths import cosine
from ..models.forward import layer_forward
from ..models.layer import LayerState
from ..models.visibility import same_visibility
from ..spec import AlignSpec

#: cosine of the joint maps cut to the columns; KL(teacher || student) and Jensen-Shannon (nats) of the
#: distributions over the columns.
METRICS: dict[str, AlignSpec] = {
    "cosine": AlignSpec(compare="row", divergence="cosine"),
    "kl": AlignSpec(compare="row", divergence="kl", normalize="visual"),
    "js": AlignSpec(compare="row", divergence="js", normalize="visual"),
}
_JOINT = AlignSpec(compare="row", divergence="mse")
_INSIDE = AlignSpec(compare="row", divergence="mse", normalize="visual_per_head")
_SPREAD = AlignSpec(compare="row", divergence="reverse_kl", normalize="visual")


def row_values(
    student: LayerState, teacher: LayerState, positions: Tensor, columns: Tensor, metric: str
) -> Tensor:
    """[B, R]: the metric of each row's head-mean maps; nan where a row sees none of the columns.

    Args:
        student, teacher: q holds the rows of ``positions``; heads and head sizes may differ.
        positions: [B, R] int64, -1: no row. columns: [B, L] bool.
        metric: a name of ``METRICS``.

    Raises:
        ValueError: an unknown metric, or layers that see different tokens.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; allowed: {', '.join(METRICS)}")
    if not same_visibility(student.visibility, teacher.visibility):
        raise ValueError(
            "the two layers see different tokens (sliding windows, chunks or blocks); allowed: layers "
            "of the same visibility"
        )
    found = _run(student, teacher, positions, columns, METRICS[metric])
    statistics = found.statistics[:, :, 0]
    values = cosine(statistics) if metric == "cosine" else statistics[0]
    return _where_seen(values, found, positions)


def head_values(
    student: LayerState, teacher: LayerState, positions: Tensor, columns: Tensor, metric: str
) -> Tensor:
    """[B, H, R]: the same for each head of the student against the teacher's head mean."""
    return torch.stack(
        [
            row_values(one_head(student, h), teacher, positions, columns, metric)
            for h in range(student.q.shape[1])
        ],
        dim=1,
    )


def one_head(state: LayerState, head: int) -> LayerState:
    """A layer that has this head alone."""
    key = head // (state.q.shape[1] // state.k.shape[1])
    return replace(
        state,
        q=state.q[:, head : head + 1],
        k=state.k[:, key : key + 1],
        sinks=None if state.sinks is None else state.sinks[head : head + 1],
    )


def column_mass(state: LayerState, positions: Tensor, columns: Tensor) -> Tensor:
    """[B, R]: the share of each row's attention that goes to the columns, mean over heads.

    A head's share is exp(LSE over the columns - LSE over all visible keys); 0 where none is seen.
    """
    if state.sinks is not None:  # they join the denominator of the softmax over the columns, too
        raise ValueError("the layer has attention sinks; allowed: layers without")
    everywhere = _run(state, None, positions, columns, _JOINT)
    inside = _run(state, None, positions, columns, _INSIDE)
    share = (inside.lse_s - everywhere.lse_s).exp().mean(1)
    seen = (inside.entries > 0) & (positions >= 0)
    return torch.where(seen, share, 0.0)


def column_entropy(state: LayerState, positions: Tensor, columns: Tensor) -> Tensor:
    """[B, R]: entropy (nats) of each row's head-mean attention over the columns, renormalised.

    log(columns seen) - KL(attention || uniform), with the uniform map as the one of zero scores. nan
    where a row sees none of the columns.
    """
    found = _run(state, None, positions, columns, _SPREAD)
    entropy = found.entries.clamp(min=1).log() - found.statistics[0, :, 0]
    return _where_seen(entropy, found, positions)


def _where_seen(values: Tensor, found: Forward, positions: Tensor) -> Tensor:
    return torch.where((found.entries > 0) & (positions >= 0), values, torch.nan)


def _run(
    student: LayerState,
    teacher: LayerState | None,
    positions: Tensor,
    columns: Tensor,
    spec: AlignSpec,
) -> Forward:
    """The backend's statistics; without a teacher, against a layer whose scores are all 0."""
    if teacher is None:
        teacher = LayerState(
            q=student.q.new_zeros(student.q.shape[0], 1, student.q.shape[2], 1),
            k=student.k.new_zeros(student.k.shape[0], 1, student.k.shape[2], 1),
            scale=1.0,
            softcap=None,
            sinks=None,
            visibility=student.visibility,
        )
    return layer_forward(student, positions, columns, spec, teacher=teacher)
