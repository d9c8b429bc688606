"""A backend's statistics of a captured layer: what reductions and analysis read, without a loss."""

from __future__ import annotations

from torch import Tensor

from ..backends.contract import Forward
from ..registry import backend_for
from ..spec import AlignSpec
from ..validate import build_problem
from .layer import LayerState


def layer_forward(
    student: LayerState,
    positions: Tensor,
    columns: Tensor,
    spec: AlignSpec,
    *,
    backend: str = "auto",
    teacher: LayerState | None = None,
    target: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Forward:
    """The forward of a layer against another one or a given target, visible as the first one's call says.

    Args:
        student: q holds the rows of ``positions``.
        positions: [B, R] int64, -1: no row. columns: [B, L] bool.
        spec: what is compared.
        backend: a backend's name.
        teacher, target: one of the two; ``target`` as in ``fused_attn_align_loss``.
        row_weight: [B, L], or None.
    """
    seen = student.visibility
    problem = build_problem(
        q_s=student.q,
        k_s=student.k,
        q_t=None if teacher is None else teacher.q,
        k_t=None if teacher is None else teacher.k,
        target=target,
        target_index=None,
        visual_mask=columns,
        query_mask=None,
        attention_mask=seen.segments >= 0,
        spec=spec,
        causal=seen.causal,
        scale_s=student.scale,
        scale_t=None if teacher is None else teacher.scale,
        lse_s=None,
        lse_t=None,
        mix=None,
        row_weight=row_weight,
        query_positions=positions,
        segment_ids=seen.segments,
        block_ids=seen.blocks,
        window=seen.window or None,
        chunk=None,
        softcap_s=student.softcap,
        softcap_t=None if teacher is None else teacher.softcap,
        sink_s=student.sinks,
        sink_t=None if teacher is None else teacher.sinks,
    )
    found: Forward = backend_for(backend, problem).forward(problem)
    return found
