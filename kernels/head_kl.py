"""KL(teacher || student) of every head and row in one pass: both log-sum-exps and the divergence at once.

With s, t the scores (log2), LS, LT their log2-sum-exps over N(i), and V the compared columns,

    KL = ln 2 sum_V 2^(t - LT) ((t - LT) - (s - LS))
       = ln 2 2^(m - LT) (a - (LT - LS) b),    a = sum_V 2^(t - m) (t - s),    b = sum_V 2^(t - m)

so a row needs (m, l) of both sides and a, b, all rescaled together when the teacher's pivot m moves: no
sweep for the log-sum-exps comes first. Keys of N outside V add to the log-sum-exps alone; they form a
list of their own and come second. A row that sees no compared column gives 0.

Where products are FMA, AGAIN, the rows' q of both sides are read again (out of the L1) at every tile: FMA
takes its operands from registers, which cannot hold both from one tile to the next.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Call, Side, blocks_of, launch
from .primitives import (
    LN2,
    LOG2E,
    edge_tile,
    inner_tiles,
    load_tile,
    log2_scores,
    online_logsumexp,
    reached,
    row_block,
    seen_keys,
    slot,
    tile_offsets,
)


@triton.jit
def _add_tile(
    state, queries, p_ks, p_kt, p_keys, o_c, o_ds, o_dt, b_who, b_lo, b_hi,
    skl_s, skl_t, key_length, window, factor_s, cap_s, factor_t, cap_t,
    MASK: tl.constexpr, INSIDE: tl.constexpr,
    DS: tl.constexpr, BDS: tl.constexpr, CAP_S: tl.constexpr,
    DT: tl.constexpr, BDT: tl.constexpr, CAP_T: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """The state with the keys o_c in it.

    queries: q [BR, BD] of both sides, and where to read them again.
    """
    b_ms, b_ls, b_mt, b_lt, b_a, b_b = state
    b_qs, b_qt, p_qs, p_qt, sqr_s, sqr_t, b_row = queries
    if AGAIN:
        b_qs = _read_again(p_qs, tile_offsets(b_row, sqr_s, o_ds, WIDE), o_ds, DS)
    b_j = slot(p_keys, o_c, key_length, 0)  # [BC]
    b_k = load_tile(p_ks, tile_offsets(b_j, skl_s, o_ds, WIDE), o_ds, DS, BDS, UPCAST)
    b_s = tl.dot(b_qs, tl.trans(b_k), input_precision=PRECISION)  # [BR, BC]
    b_s = log2_scores(b_s, factor_s, cap_s, CAP_S)
    b_k = load_tile(p_kt, tile_offsets(b_j, skl_t, o_dt, WIDE), o_dt, DT, BDT, UPCAST)
    if AGAIN:
        b_qt = _read_again(p_qt, tile_offsets(b_row, sqr_t, o_dt, WIDE), o_dt, DT)
    b_t = tl.dot(b_qt, tl.trans(b_k), input_precision=PRECISION)  # [BR, BC]
    b_t = log2_scores(b_t, factor_t, cap_t, CAP_T)
    b_gap = b_t - b_s
    if MASK:
        b_see = seen_keys(
            p_keys, o_c, b_j, b_lo, b_hi, b_who, key_length, window,
            INTERVAL, CAUSAL, WINDOW, BLOCKS,
        )  # fmt: skip
        b_s = tl.where(b_see, b_s, float("-inf"))
        b_t = tl.where(b_see, b_t, float("-inf"))
        b_gap = tl.where(b_see, b_gap, 0.0)
    b_ms, b_ls = online_logsumexp(b_ms, b_ls, b_s)
    b_old = b_mt
    b_mt = tl.maximum(b_mt, tl.max(b_t, 1))
    b_pivot = tl.where(b_mt == float("-inf"), 0.0, b_mt)
    b_move = tl.exp2(b_old - b_pivot)  # [BR], 0 at the first visible tile
    b_p = tl.exp2(b_t - b_pivot[:, None])  # [BR, BC]
    b_new = tl.sum(b_p, 1)
    b_lt = b_lt * b_move + b_new
    b_a = b_a * b_move
    b_b = b_b * b_move
    if INSIDE:
        b_a += tl.sum(b_p * b_gap, 1)
        b_b += b_new
    return b_ms, b_ls, b_mt, b_lt, b_a, b_b


@triton.jit
def _sweep(
    state, queries, p_ks, p_kt, p_keys, o_ds, o_dt, b_who, b_lo, b_hi,
    skl_s, skl_t, key_length, window, factor_s, cap_s, factor_t, cap_t,
    INSIDE: tl.constexpr, BC: tl.constexpr,
    DS: tl.constexpr, BDS: tl.constexpr, CAP_S: tl.constexpr,
    DT: tl.constexpr, BDT: tl.constexpr, CAP_T: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """The state, six numbers [BR], after one list of keys: tiles that need a mask, then the others."""
    i_lo, i_hi = reached(b_lo, b_hi, BC)
    i_in, i_out = inner_tiles(b_who[0] >= 0, b_lo, b_hi, i_lo, i_hi, BC, INTERVAL)
    for i_edge in range(i_lo, i_hi - (i_out - i_in)):
        o_c = edge_tile(i_edge, i_in, i_out) * BC + tl.arange(0, BC)  # [BC]
        state = _add_tile(
            state, queries, p_ks, p_kt, p_keys, o_c, o_ds, o_dt, b_who, b_lo, b_hi,
            skl_s, skl_t, key_length, window, factor_s, cap_s, factor_t, cap_t,
            True, INSIDE, DS, BDS, CAP_S, DT, BDT, CAP_T,
            INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION, AGAIN,
        )  # fmt: skip
    if INTERVAL:
        for i_c in range(i_in, i_out):
            o_c = i_c * BC + tl.arange(0, BC)  # [BC]
            state = _add_tile(
                state, queries, p_ks, p_kt, p_keys, o_c, o_ds, o_dt, b_who, b_lo, b_hi,
                skl_s, skl_t, key_length, window, factor_s, cap_s, factor_t, cap_t,
                False, INSIDE, DS, BDS, CAP_S, DT, BDT, CAP_T,
                INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION, AGAIN,
            )  # fmt: skip
    return state


@triton.jit
def _head_kl(
    p_qs, p_ks, p_qt, p_kt, p_sink_s, p_sink_t, p_lse_s, p_lse_t, p_out, p_rows, p_keys, p_others,
    sqb_s, sqh_s, sqr_s, skb_s, skh_s, skl_s, heads_s, REPEAT_S: tl.constexpr, factor_s, cap_s,
    sqb_t, sqh_t, sqr_t, skb_t, skh_t, skl_t, heads_t, REPEAT_T: tl.constexpr, factor_t, cap_t,
    rows, row_length, key_length, window,
    BR: tl.constexpr, BC: tl.constexpr,
    DS: tl.constexpr, BDS: tl.constexpr, CAP_S: tl.constexpr,
    DT: tl.constexpr, BDT: tl.constexpr, CAP_T: tl.constexpr,
    SINK_S: tl.constexpr, SINK_T: tl.constexpr, OTHERS: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    i_r, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p_rows += i_b * 11 * row_length
    p_keys += i_b * 5 * key_length
    p_qs += i_b * sqb_s + i_h * sqh_s
    p_ks += i_b * skb_s + (i_h // REPEAT_S) * skh_s
    p_qt += i_b * sqb_t + i_h * sqh_t
    p_kt += i_b * skb_t + (i_h // REPEAT_T) * skh_t

    o_r = i_r * BR + tl.arange(0, BR)  # [BR]
    o_ds, o_dt = tl.arange(0, BDS), tl.arange(0, BDT)  # [BD]
    b_row, b_who, b_lo, b_hi = row_block(p_rows, o_r, row_length, 6)
    b_qs = load_tile(p_qs, tile_offsets(b_row, sqr_s, o_ds, WIDE), o_ds, DS, BDS, UPCAST)
    b_qt = load_tile(p_qt, tile_offsets(b_row, sqr_t, o_dt, WIDE), o_dt, DT, BDT, UPCAST)
    queries = (b_qs, b_qt, p_qs, p_qt, sqr_s, sqr_t, b_row)
    b_never = tl.full([BR], float("-inf"), tl.float32)
    b_0 = tl.zeros([BR], tl.float32)
    state = _sweep(
        (b_never, b_0, b_never, b_0, b_0, b_0), queries, p_ks, p_kt, p_keys, o_ds, o_dt,
        b_who, b_lo, b_hi, skl_s, skl_t, key_length, window, factor_s, cap_s, factor_t, cap_t,
        True, BC, DS, BDS, CAP_S, DT, BDT, CAP_T,
        INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION, AGAIN,
    )  # fmt: skip
    if OTHERS:
        b_row, b_who, b_lo, b_hi = row_block(p_rows, o_r, row_length, 8)
        state = _sweep(
            state, queries, p_ks, p_kt, p_others + i_b * 5 * key_length, o_ds, o_dt,
            b_who, b_lo, b_hi, skl_s, skl_t, key_length, window, factor_s, cap_s, factor_t, cap_t,
            False, BC, DS, BDS, CAP_S, DT, BDT, CAP_T,
            INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION, AGAIN,
        )  # fmt: skip
    b_ms, b_ls, b_mt, b_lt, b_a, b_b = state
    b_alive = b_lt > 0
    b_ms = tl.where(b_alive, b_ms, 0.0)
    b_mt = tl.where(b_alive, b_mt, 0.0)
    b_lse_s = b_ms + tl.log2(tl.where(b_alive, b_ls, 1.0))
    b_lse_t = b_mt + tl.log2(tl.where(b_alive, b_lt, 1.0))
    if SINK_S:
        b_lse_s = _with_sink(b_lse_s, tl.load(p_sink_s + i_h) * LOG2E)
    if SINK_T:
        b_lse_t = _with_sink(b_lse_t, tl.load(p_sink_t + i_h) * LOG2E)
    b_kl = tl.exp2(b_mt - b_lse_t) * (b_a - (b_lse_t - b_lse_s) * b_b) * LN2
    o_out = (i_b * heads_s + i_h) * rows + b_row
    m_out = (b_who[0] >= 0) & b_alive
    tl.store(p_lse_s + o_out, b_lse_s * LN2, mask=m_out)
    tl.store(p_lse_t + o_out, b_lse_t * LN2, mask=m_out)
    tl.store(p_out + o_out, b_kl, mask=m_out)


@triton.jit
def _read_again(p, o, o_d, D: tl.constexpr):
    """[BR, BD]: fp32 rows of q; volatile, so that no compiler moves the load out of the loop."""
    return tl.load(p + o, mask=o_d[None, :] < D, other=0.0, volatile=True)


@triton.jit
def _with_sink(b_lse, b_sink):
    """log2(2^lse + 2^sink)."""
    b_high = tl.maximum(b_lse, b_sink)
    return b_high + tl.log2(tl.exp2(b_lse - b_high) + tl.exp2(b_sink - b_high))


def head_kl(
    call: Call,
    student: Side,
    teacher: Side,
    sink_s: Tensor | None,
    sink_t: Tensor | None,
    others: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse_s, lse_t, kl), each [B, H, R] fp32 in natural units; 0 for rows that see no key.

    Args:
        sink_s, sink_t: [H] fp32 logits over the temperature, or None.
        others: the softmax runs over keys outside the compared columns, too.
    """
    shape = (call.batch, student.heads, call.rows)
    lse_s = torch.zeros(shape, dtype=torch.float32, device=call.device)
    lse_t, out = torch.zeros_like(lse_s), torch.zeros_like(lse_s)
    size = max(student.size, teacher.size)
    tile = call.tile("head_kl", size, student.branches or teacher.branches)
    launch(
        _head_kl,
        lambda rows, _: (blocks_of(call.lists.row_count, rows), student.heads, call.batch),
        {
            **student.arguments("s"),
            **student.constants("s"),
            **teacher.arguments("t"),
            **teacher.constants("t"),
            **call.masks(call.lists.compared),
            **call.mask_constants(),
            "p_others": call.lists.others.entries,
            "p_sink_s": sink_s,
            "p_sink_t": sink_t,
            "p_lse_s": lse_s,
            "p_lse_t": lse_t,
            "p_out": out,
            "rows": call.rows,
            "SINK_S": sink_s is not None,
            "SINK_T": sink_t is not None,
            "OTHERS": others,
            "AGAIN": call.by_fma,
        },
        tile,
    )
    return lse_s, lse_t, out
