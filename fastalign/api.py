"""The one public function: validate once, choose a backend, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import maths, ops
from .registry import check_backend_name
from .spec import AlignSpec
from .validate import build_problem, check_values


def fused_attn_align_loss(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor | None = None,
    k_t: Tensor | None = None,
    *,
    visual_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    spec: AlignSpec | str = "compodistill",
    backend: str = "auto",
    causal: bool | None = None,
    scale_s: float | None = None,
    scale_t: float | None = None,
    lse_s: Tensor | None = None,
    lse_t: Tensor | None = None,
    target: Tensor | None = None,
    target_index: Tensor | None = None,
    mix: Tensor | None = None,
    row_weight: Tensor | None = None,
    query_positions: Tensor | None = None,
    segment_ids: Tensor | None = None,
    block_ids: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap_s: float | None = None,
    softcap_t: float | None = None,
    sink_s: Tensor | None = None,
    sink_t: Tensor | None = None,
) -> Tensor:
    """The divergence between a student's and a teacher's attention over the visual tokens.

    The definition is ``fastalign.maths``, the derivation of the gradient DESIGN.md. No tensor of size
    heads x rows x columns and none of size L x L is held, forward or backward (``backend="reference"``
    alone is materialised). Gradients flow to ``q_s``, ``k_s``, ``mix`` and ``sink_s``; never to the
    teacher, to given log-sum-exps or to weights. There is no second derivative.

    Shapes: B samples, L positions, R query rows, H heads and K key heads (K divides H), D head size.
    H, K and D may differ between student and teacher; B, L and R may not. Floating-point inputs may be
    float16, bfloat16, float32 or float64, with any strides, on one device; the arithmetic runs in
    float32, or in float64 if any q or k is.

    Args:
        q_s: [B, H_s, R, D_s] the student's queries, after rotary embedding; R = L unless
            ``query_positions`` is given.
        k_s: [B, K_s, L, D_s] the student's keys, after rotary embedding.
        q_t: [B, H_t, R, D_t] the teacher's queries; None if ``target`` is given.
        k_t: [B, K_t, L, D_t] the teacher's keys; None if ``target`` is given. The layers of a window
            with equal head counts, concatenated along heads, are one teacher with window x H_t heads.
        visual_mask: [B, L] bool, the compared columns. None: the recipe's own (every valid position
            where its columns are ``"all"``; otherwise the mask is required).
        query_mask: [B, L] bool, the compared rows. None: the recipe's own (``AlignSpec.rows``).
        attention_mask: [B, L] bool, True for tokens, False for padding, left or right. None: all valid.
        spec: a recipe's name (``fastalign recipes`` lists them) or an ``AlignSpec``.
        backend: ``"reference"`` (materialised), ``"tiled"`` (torch, any device), or ``"auto"``. An
            explicit backend is never replaced by another.
        causal: whether keys after the query are hidden. None: the recipe's own, True for nearly all.
        scale_s, scale_t: factor of q k^T. None: 1 / sqrt(D).
        lse_s, lse_t: [B, H, R] natural log-sum-exp of each row's scores over every visible key and its
            sink, as ``fastalign.lse`` gets it from attention kernels; saves a sweep. It stands for a
            value of q and k: the gradient is the same as without it. With ``normalize`` joint or visual
            and temperature 1 only.
        target: a given teacher map instead of ``q_t`` and ``k_t``, not negative. [B, G, N, C]: row n
            for the n-th compared row of the sample, column c for its c-th compared column, both in
            order of position; what lies beyond a sample's own rows and columns is not read. G: 1 for
            heads="mean", H_s for "each". For ``compare="pooled"`` [B, G, C], the pooled vector.
        target_index: int64, the shape of ``target``: the map is sparse, and this is the column of
            each entry (as above, c-th compared column; -1: none).
        mix: [H_s, H_t] for heads="mix": student head h has weight ``mix[h, g]`` in the map that is
            compared with the teacher's head g.
        row_weight: [B, L] weights >= 0 of the rows (floating point). A row of weight 0 is not
            compared. For ``compare="row"`` the mean is the weighted one, sum w d / sum w.
        query_positions: [B, R] int64: q holds only these rows of the sequence (-1: padding, not
            compared); ``query_mask`` must then be None.
        segment_ids: [B, L] integers, packed sequences: tokens see only their own segment.
        block_ids: [B, L] integers: tokens of the same block >= 0 see each other both ways
            (bidirectional image blocks, prefixes); -1: in no block.
        window: keys at a distance of ``window`` or more are hidden (sliding window).
        chunk: tokens see only their own chunk of this many positions, counted from the first valid one.
        softcap_s, softcap_t: scores become cap * tanh(score / cap).
        sink_s, sink_t: [H] a logit a head that joins the denominator of its softmax.

    Returns:
        Scalar, float32 (float64 for float64 inputs). ``reduction="mean"`` is the sum over the compared
        units divided once by their count: samples with at least one row that sees a compared column
        (``map``, ``pooled``), or such rows (``row``), times the groups. A batch without a unit gives
        exactly 0 with zero gradients. A map whose norm is below 3e-16 (float32) has no direction: its
        cosine is 0 and its gradient too.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed, before any work.
        RuntimeError: when a second derivative is asked for.

    Source: CompoDistill, arXiv 2510.12184 (the default recipe); ``AlignSpec`` names the others.
    """
    problem = build_problem(
        q_s=q_s,
        k_s=k_s,
        q_t=q_t,
        k_t=k_t,
        visual_mask=visual_mask,
        query_mask=query_mask,
        attention_mask=attention_mask,
        spec=spec,
        causal=causal,
        scale_s=scale_s,
        scale_t=scale_t,
        lse_s=lse_s,
        lse_t=lse_t,
        target=target,
        target_index=target_index,
        mix=mix,
        row_weight=row_weight,
        query_positions=query_positions,
        segment_ids=segment_ids,
        block_ids=block_ids,
        window=window,
        chunk=chunk,
        softcap_s=softcap_s,
        softcap_t=softcap_t,
        sink_s=sink_s,
        sink_t=sink_t,
    )
    check_backend_name(backend)
    if not torch.compiler.is_compiling():
        check_values(problem)
    if backend == "reference":
        return maths.align_loss(problem)
    return ops.run(problem, backend)
