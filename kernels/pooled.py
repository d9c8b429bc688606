"""Maps pooled over rows: sums down the columns, for compare="pooled".

    sum_i w_i A[i, j]  and  n_j = sum_i w_i,   over the rows i that keep column j

A program owns a block of columns and walks down the rows that can see it, so that no two programs add
to one number. For maps in logs the sums are kept as log-sum-exps over rows, (m, l) per column. When
columns are few the rows are cut into parts, which the caller adds up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Call, blocks_of, launch, splits_for
from .maps import MapTensors, at_sample, map_tile
from .primitives import LN2, online_logsumexp, part_of, reached, row_block, seen_keys, slot


@triton.jit
def _pooled_sums(
    p_qs, p_ks, p_lse_s, p_qt, p_kt, p_lse_t, p_mix, p_target, p_mass, p_high, p_weight, p_out,
    p_rows, p_keys,
    sqb_s, sqh_s, sqr_s, skb_s, skh_s, skl_s, heads_s, REPEAT_S: tl.constexpr, factor_s, cap_s,
    sqb_t, sqh_t, sqr_t, skb_t, skh_t, skl_t, heads_t, REPEAT_T: tl.constexpr, factor_t, cap_t,
    stb, stg, stn, rows, groups, n_batch, row_length, key_length, window, parts, length,
    BR: tl.constexpr, BC: tl.constexpr,
    DS: tl.constexpr, BDS: tl.constexpr, CAP_S: tl.constexpr,
    DT: tl.constexpr, BDT: tl.constexpr, CAP_T: tl.constexpr,
    HEADS: tl.constexpr, LOGS: tl.constexpr, SCORES: tl.constexpr, TEACHER: tl.constexpr,
    VISUAL: tl.constexpr, SINK: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_c, i_part, i_bg = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_g = (i_bg // groups).to(tl.int64), i_bg % groups
    p_rows += i_b * 11 * row_length
    p_keys += i_b * 5 * key_length
    student = (
        p_qs, p_ks, p_lse_s, sqb_s, sqh_s, sqr_s, skb_s, skh_s, skl_s, heads_s, factor_s, cap_s
    )  # fmt: skip
    teacher = (
        p_qt, p_kt, p_lse_t, sqb_t, sqh_t, sqr_t, skb_t, skh_t, skl_t, heads_t, factor_t, cap_t
    )  # fmt: skip
    given = (p_target, p_mass, p_high, stb, stg, stn, n_batch * groups)
    student, teacher, given = at_sample(
        student, teacher, given, i_b, i_g, rows, groups, TEACHER, SCORES, VISUAL, SINK
    )
    p_weight += i_b * rows

    o_c = i_c * BC + tl.arange(0, BC)  # [BC]
    b_j = slot(p_keys, o_c, key_length, 0)  # [BC]
    b_used = slot(p_keys, o_c, key_length, 1) >= 0  # [BC]
    i_lo, i_hi = reached(slot(p_keys, o_c, key_length, 3), slot(p_keys, o_c, key_length, 4), BR)
    i_lo, i_hi = part_of(i_lo, i_hi, i_part, parts)

    b_n = tl.zeros([BC], tl.float32)
    b_s = tl.zeros([BC], tl.float32)
    b_t = tl.zeros([BC], tl.float32)
    b_ms = tl.full([BC], float("-inf"), tl.float32)
    b_mt = tl.full([BC], float("-inf"), tl.float32)
    for i_r in range(i_lo, i_hi):
        o_r = i_r * BR + tl.arange(0, BR)  # [BR]
        b_row, b_who, b_lo, b_hi = row_block(p_rows, o_r, row_length, 6)
        b_see = seen_keys(
            p_keys, o_c, b_j, b_lo, b_hi, b_who, key_length, window,
            INTERVAL, CAUSAL, WINDOW, BLOCKS,
        )  # fmt: skip
        b_as, b_at, b_xs, b_xt, b_keep = map_tile(
            student, teacher, given, p_mix, b_row, b_row, b_j, o_c, b_see, i_g, rows, groups,
            REPEAT_S, REPEAT_T, BR, BC, DS, BDS, CAP_S, DT, BDT, CAP_T,
            HEADS, LOGS, SCORES, TEACHER, VISUAL, SINK, WIDE, UPCAST, PRECISION,
        )  # fmt: skip
        b_w = tl.load(p_weight + b_row, mask=b_who[0] >= 0, other=0.0)  # [BR]
        b_share = tl.where(b_keep, b_w[:, None], 0.0)  # [BR, BC]
        b_n += tl.sum(b_share, 0)
        if LOGS:
            b_share = tl.log2(b_share)
            b_ms, b_s = online_logsumexp(b_ms, b_s, tl.trans(b_xs + b_share))
            b_mt, b_t = online_logsumexp(b_mt, b_t, tl.trans(b_xt + b_share))
        else:
            b_s += tl.sum(b_share * b_as, 0)
            b_t += tl.sum(b_share * b_at, 0)
    if LOGS:
        b_s = tl.where(b_s > 0, (b_ms + tl.log2(b_s)) * LN2, float("-inf"))
        b_t = tl.where(b_t > 0, (b_mt + tl.log2(b_t)) * LN2, float("-inf"))
    n_out = n_batch * groups * length
    p_out += (i_part * 3 * n_batch * groups + i_bg).to(tl.int64) * length + b_j
    tl.store(p_out, b_s, mask=b_used)
    tl.store(p_out + n_out, b_t, mask=b_used)
    tl.store(p_out + 2 * n_out, b_n, mask=b_used)


def pooled_sums(call: Call, maps: MapTensors, weight: Tensor, length: int) -> Tensor:
    """[3, B, G, L] by position: student's and teacher's sum (its log for maps in logs), sum of weights.

    Args:
        weight: [B, R] fp32, contiguous. length: L.
    """
    tile = call.tile("pooled_sums", maps.size, maps.branches)
    columns = call.lists.compared.count
    programs = blocks_of(columns, tile.keys) * call.batch * call.groups
    most = blocks_of(call.lists.row_count, tile.rows)
    parts = splits_for(programs, most, call.multiprocessors())
    out = torch.zeros(
        (parts, 3, call.batch, call.groups, length), dtype=torch.float32, device=call.device
    )
    if call.logs:
        out[:, :2] = -torch.inf
    launch(
        _pooled_sums,
        lambda _, keys: (blocks_of(columns, keys), parts, call.batch * call.groups),
        {
            **maps.arguments(call),
            **call.masks(call.lists.compared),
            **call.mask_constants(),
            "p_weight": weight,
            "p_out": out,
            "parts": parts,
            "length": length,
        },
        tile,
    )
    if parts == 1:
        return out[0]
    if call.logs:
        return torch.cat([torch.logsumexp(out[:, :2], 0), out[:, 2:].sum(0)])
    return out.sum(0)
