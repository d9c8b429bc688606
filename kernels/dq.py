"""dq of one head: dq_h[i] = (scale / temperature) sum_j dS_h[i, j] k[j].

dS follows from the head's recomputed scores, the workspace and delta (``primitives.score_gradient``).
With a softmax over all keys, those outside V get -P delta; they form a list of their own and the
program visits it second, without touching the workspace. The rows of the block stay in registers. With few
rows the keys are cut into parts (``split``).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import Call, Side, blocks_of, launch, splits_for
from .map_gradient import Workspace
from .primitives import (
    edge_tile,
    inner_tiles,
    load_tile,
    part_of,
    reached,
    row_block,
    score_gradient,
    seen_keys,
    slot,
    tile_offsets,
    workspace_offsets,
)
from .split import add_up, block_and_part, empty_parts


@triton.jit
def _add_tile(
    b_acc, b_q, p_ks, p_g, p_x, p_keys, o_g, o_c, o_d, b_who, b_lo, b_hi, b_l, b_fold, b_delta,
    skl, key_length, window, pitch, factor, cap,
    MASK: tl.constexpr, INSIDE: tl.constexpr, EACH: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, CAP: tl.constexpr, LOGS: tl.constexpr, SCORES: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """b_acc [BR, BD] plus dS k over the keys o_c."""
    b_j = slot(p_keys, o_c, key_length, 0)  # [BC]
    b_k = load_tile(p_ks, tile_offsets(b_j, skl, o_d, WIDE), o_d, D, BD, UPCAST)  # [BC, BD]
    b_dot = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BR, BC]
    b_g = b_dot
    b_x = b_dot
    if INSIDE:
        o_w = workspace_offsets(o_g[:, None], o_c[None, :], pitch)  # [BR, BC]
        b_g = tl.load(p_g + o_w)
        if LOGS and not EACH:
            b_x = tl.load(p_x + o_w)
    b_ds = score_gradient(
        b_dot, b_g, b_x, b_l[:, None], b_fold[:, None], b_delta[:, None], factor, cap,
        INSIDE, EACH, LOGS, SCORES, CAP,
    )  # fmt: skip
    if MASK:
        b_see = seen_keys(
            p_keys, o_c, b_j, b_lo, b_hi, b_who, key_length, window,
            INTERVAL, CAUSAL, WINDOW, BLOCKS,
        )  # fmt: skip
        b_ds = tl.where(b_see, b_ds, 0.0)
    return b_acc + tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)


@triton.jit
def _sweep(
    b_acc, b_q, p_ks, p_g, p_x, p_keys, o_g, o_d, b_here, b_who, b_lo, b_hi, b_l, b_fold, b_delta,
    skl, key_length, window, pitch, factor, cap, i_part, parts, SPLIT: tl.constexpr,
    INSIDE: tl.constexpr, EACH: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CAP: tl.constexpr, LOGS: tl.constexpr, SCORES: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """b_acc [BR, BD] plus dS k over one list of keys: the tiles that need a mask, then the others."""
    i_lo, i_hi = reached(b_lo, b_hi, BC)
    if SPLIT:
        i_lo, i_hi = part_of(i_lo, i_hi, i_part, parts)
    i_in, i_out = inner_tiles(b_here, b_lo, b_hi, i_lo, i_hi, BC, INTERVAL)
    # one stage: with a pass or two to go a pipeline would be little but its own beginning
    for i_edge in tl.range(i_lo, i_hi - (i_out - i_in), num_stages=1):
        o_c = edge_tile(i_edge, i_in, i_out) * BC + tl.arange(0, BC)  # [BC]
        b_acc = _add_tile(
            b_acc, b_q, p_ks, p_g, p_x, p_keys, o_g, o_c, o_d, b_who, b_lo, b_hi,
            b_l, b_fold, b_delta, skl, key_length, window, pitch, factor, cap,
            True, INSIDE, EACH, D, BD, CAP, LOGS, SCORES,
            INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION,
        )  # fmt: skip
    if INTERVAL:
        for i_c in range(i_in, i_out):
            o_c = i_c * BC + tl.arange(0, BC)  # [BC]
            b_acc = _add_tile(
                b_acc, b_q, p_ks, p_g, p_x, p_keys, o_g, o_c, o_d, b_who, b_lo, b_hi,
                b_l, b_fold, b_delta, skl, key_length, window, pitch, factor, cap,
                False, INSIDE, EACH, D, BD, CAP, LOGS, SCORES,
                INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION,
            )  # fmt: skip
    return b_acc


@triton.jit
def _dq(
    p_qs, p_ks, p_lse, p_fold, p_delta, p_g, p_x, p_out, p_rows, p_keys, p_others,
    sqb_s, sqh_s, sqr_s, skb_s, skh_s, skl_s, heads_s, REPEAT_S: tl.constexpr, factor_s, cap_s,
    rows, groups, row_length, key_length, window, row_start, row_end, pitch, space, slope,
    parts, n_batch, SPLIT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, DS: tl.constexpr, BDS: tl.constexpr, CAP_S: tl.constexpr,
    EACH: tl.constexpr, LOGS: tl.constexpr, SCORES: tl.constexpr, OTHERS: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_r, i_part = block_and_part(parts, SPLIT)
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p_rows += i_b * 11 * row_length
    p_keys += i_b * 5 * key_length
    p_qs += i_b * sqb_s + i_h * sqh_s
    p_ks += i_b * skb_s + (i_h // REPEAT_S) * skh_s
    o_bh = i_b * heads_s + i_h

    o_r = row_start + i_r * BR + tl.arange(0, BR)  # [BR]
    o_d = tl.arange(0, BDS)  # [BD]
    b_row, b_who, b_lo, b_hi = row_block(p_rows, o_r, row_length, 6)
    b_here = (o_r < row_end) & (b_who[0] >= 0)  # [BR]
    i_g = o_bh if EACH else i_b
    o_g = o_r - row_start  # [BR]
    p_g += i_g * space
    if LOGS:
        p_x += i_g * space
    b_q = load_tile(p_qs, tile_offsets(b_row, sqr_s, o_d, WIDE), o_d, DS, BDS, UPCAST)  # [BR, BD]
    b_l = tl.zeros([BR], tl.float32)
    b_fold = b_l
    b_delta = b_l
    if not SCORES:
        b_fold = tl.load(p_fold + o_bh * rows + b_row)
        b_delta = tl.load(p_delta + o_bh * rows + b_row)
        if LOGS:
            b_l = tl.load(p_lse + o_bh * rows + b_row)

    b_acc = tl.zeros([BR, BDS], tl.float32)
    b_acc = _sweep(
        b_acc, b_q, p_ks, p_g, p_x, p_keys, o_g, o_d, b_here, b_who, b_lo, b_hi,
        b_l, b_fold, b_delta, skl_s, key_length, window, pitch, factor_s, cap_s, i_part, parts, SPLIT,
        True, EACH, BC, DS, BDS, CAP_S, LOGS, SCORES,
        INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION,
    )  # fmt: skip
    if OTHERS:
        b_row, b_who, b_lo, b_hi = row_block(p_rows, o_r, row_length, 8)
        b_acc = _sweep(
            b_acc, b_q, p_ks, p_g, p_x, p_others + i_b * 5 * key_length, o_g, o_d,
            b_here, b_who, b_lo, b_hi,
            b_l, b_fold, b_delta, skl_s, key_length, window, pitch, factor_s, cap_s, i_part, parts, SPLIT,
            False, EACH, BC, DS, BDS, CAP_S, LOGS, SCORES,
            INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION,
        )  # fmt: skip
    o_place = o_bh * rows + b_row  # [BR]
    if SPLIT:
        o_place = ((i_part * n_batch + i_b) * heads_s + i_h) * (row_end - row_start) + o_g
    o_out = o_place[:, None] * DS + o_d[None, :]  # [BR, BD]
    b_out = (b_acc * tl.load(slope)).to(p_out.dtype.element_ty)
    tl.store(p_out + o_out, b_out, mask=b_here[:, None] & (o_d < DS)[None, :])


@dataclass(frozen=True)
class HeadTensors:
    """What turns a head's scores into their gradient.

    Attributes:
        lse: [B, H, R] log2-sum-exp of the softmax. fold: the same with shares and normalisation in it.
        delta: [B, H, R] fp32. slope: fp32 scalar tensor, from dL/dS to dL/d(q.k).
        each: the workspace has one map a head. others: keys outside V have a gradient.
    """

    lse: Tensor
    fold: Tensor
    delta: Tensor
    slope: Tensor
    each: bool
    others: bool


def dq(call: Call, side: Side, heads: HeadTensors, space: Workspace, out: Tensor) -> None:
    """Write dq of the workspace's rows into out [B, H, R, D], contiguous, zero elsewhere."""
    tile = call.tile("dq", side.size, side.branches)
    count = space.end - space.start
    keys = max(call.lists.compared.count, call.lists.others.count if heads.others else 0)
    programs = blocks_of(count, tile.rows) * side.heads * call.batch
    parts = splits_for(programs, blocks_of(keys, tile.keys), call.multiprocessors())
    written = out if parts == 1 else empty_parts(parts, space, out)
    launch(
        _dq,
        lambda rows, _: (blocks_of(count, rows) * parts, side.heads, call.batch),
        {
            **side.arguments("s"),
            **side.constants("s"),
            **call.masks(call.lists.compared),
            **call.mask_constants(),
            "p_others": call.lists.others.entries,
            "p_lse": heads.lse,
            "p_fold": heads.fold,
            "p_delta": heads.delta,
            "slope": heads.slope,
            "p_g": space.g,
            "p_x": space.x,
            "p_out": written,
            "parts": parts,
            "n_batch": call.batch,
            "SPLIT": parts > 1,
            "rows": call.rows,
            "groups": call.groups,
            "row_start": space.start,
            "row_end": space.end,
            "pitch": space.pitch,
            "space": space.size,
            "EACH": heads.each,
            "LOGS": call.logs,
            "SCORES": call.scores,
            "OTHERS": heads.others,
        },
        tile,
    )
    if parts > 1:
        add_up(written, call, space, out)
