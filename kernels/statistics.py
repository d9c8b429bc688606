"""The forward: row statistics of both maps, from which the loss follows.

For a block of rows, tile after tile of compared columns: the head loop sums both sides' maps in
registers (``maps.map_tile``), and what the loss needs of them is added to a few numbers a row:

    cosine: sum st, sum s^2, sum t^2;   kl, reverse_kl, js, mse: the divergence itself

The head axis is inside, so that neither map is ever written. MOMENTS, the sink filter's first sweep,
keeps (sum, squared deviations from the row's own mean) of both maps instead. Tiles are joined by

    M2 = M2_a + M2_b + (mean_b - mean_a)^2 n_a n_b / (n_a + n_b)

which is exact where a sum of squares minus a squared sum cancels; hidden columns count as zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .branches import SINK_FILTER
from .launch import Call, blocks_of, launch, splits_for
from .maps import MapTensors, at_sample, map_tile
from .primitives import divergence_term, part_of, reached, row_block, seen_keys, slot


@triton.jit
def _join_moments(b_sum, b_square, b_n, b_a, b_column):
    """Add the columns b_column ([BC] bool) of a tile [BR, BC] to running moments of n columns."""
    b_more = tl.sum(b_column.to(tl.float32), 0)
    b_total = tl.sum(b_a, 1)  # [BR]
    b_mean = b_total / tl.maximum(b_more, 1.0)
    b_off = tl.where(b_column[None, :], b_a - b_mean[:, None], 0.0)
    b_gap = b_mean - b_sum / tl.maximum(b_n, 1.0)
    b_cross = b_gap * b_gap * (b_n * b_more / tl.maximum(b_n + b_more, 1.0))
    return b_sum + b_total, b_square + tl.sum(b_off * b_off, 1) + b_cross


@triton.jit
def _statistics(
    p_qs, p_ks, p_lse_s, p_qt, p_kt, p_lse_t, p_mix, p_target, p_mass, p_high, p_out,
    p_rows, p_keys, p_width,
    sqb_s, sqh_s, sqr_s, skb_s, skh_s, skl_s, heads_s, REPEAT_S: tl.constexpr, factor_s, cap_s,
    sqb_t, sqh_t, sqr_t, skb_t, skh_t, skl_t, heads_t, REPEAT_T: tl.constexpr, factor_t, cap_t,
    stb, stg, stn, rows, groups, n_batch, row_length, key_length, window, parts,
    BR: tl.constexpr, BC: tl.constexpr,
    DS: tl.constexpr, BDS: tl.constexpr, CAP_S: tl.constexpr,
    DT: tl.constexpr, BDT: tl.constexpr, CAP_T: tl.constexpr,
    HEADS: tl.constexpr, LOGS: tl.constexpr, SCORES: tl.constexpr, DIVERGENCE: tl.constexpr,
    TEACHER: tl.constexpr, VISUAL: tl.constexpr, SINK: tl.constexpr, MOMENTS: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_r, i_part, i_bg = tl.program_id(0), tl.program_id(1), tl.program_id(2)
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

    o_r = i_r * BR + tl.arange(0, BR)  # [BR]
    b_row, b_who, b_lo, b_hi = row_block(p_rows, o_r, row_length, 6)
    b_ordinal = slot(p_rows, o_r, row_length, 10)  # [BR]
    b_here = b_who[0] >= 0  # [BR]
    i_lo, i_hi = reached(b_lo, b_hi, BC)
    i_lo, i_hi = part_of(i_lo, i_hi, i_part, parts)

    b_0 = tl.zeros([BR], tl.float32)
    b_1 = tl.zeros([BR], tl.float32)
    b_2 = tl.zeros([BR], tl.float32)
    b_3 = tl.zeros([BR], tl.float32)
    b_n = 0.0
    if MOMENTS:
        n_columns = tl.load(p_width + i_b).to(tl.int32)
    for i_c in range(i_lo, i_hi):
        o_c = i_c * BC + tl.arange(0, BC)  # [BC]
        b_j = slot(p_keys, o_c, key_length, 0)  # [BC]
        b_see = seen_keys(
            p_keys, o_c, b_j, b_lo, b_hi, b_who, key_length, window,
            INTERVAL, CAUSAL, WINDOW, BLOCKS,
        )  # fmt: skip
        b_as, b_at, b_xs, b_xt, b_keep = map_tile(
            student, teacher, given, p_mix, b_row, b_ordinal, b_j, o_c, b_see, i_g, rows, groups,
            REPEAT_S, REPEAT_T, BR, BC, DS, BDS, CAP_S, DT, BDT, CAP_T,
            HEADS, LOGS, SCORES, TEACHER, VISUAL, SINK, WIDE, UPCAST, PRECISION,
        )  # fmt: skip
        if MOMENTS:
            b_column = o_c < n_columns
            b_0, b_1 = _join_moments(b_0, b_1, b_n, b_as, b_column)
            b_2, b_3 = _join_moments(b_2, b_3, b_n, b_at, b_column)
            b_n += tl.sum(b_column.to(tl.float32), 0)
        elif DIVERGENCE == "cosine":
            b_0 += tl.sum(tl.where(b_keep, b_as * b_at, 0.0), 1)
            b_1 += tl.sum(tl.where(b_keep, b_as * b_as, 0.0), 1)
            b_2 += tl.sum(tl.where(b_keep, b_at * b_at, 0.0), 1)
        else:
            b_term = divergence_term(b_as, b_at, b_xs, b_xt, DIVERGENCE)
            b_0 += tl.sum(tl.where(b_keep, b_term, 0.0), 1)

    n_out = n_batch * groups * rows
    p_out += i_bg.to(tl.int64) * rows + b_row
    if MOMENTS:  # the columns of tiles that no row of the block reaches are zeros of every row
        b_rest = n_columns - b_n
        b_share = b_n * b_rest / tl.maximum(n_columns, 1).to(tl.float32)
        b_s, b_t = b_0 / tl.maximum(b_n, 1.0), b_2 / tl.maximum(b_n, 1.0)
        tl.store(p_out, b_0, mask=b_here)
        tl.store(p_out + n_out, b_1 + b_s * b_s * b_share, mask=b_here)
        tl.store(p_out + 2 * n_out, b_2, mask=b_here)
        tl.store(p_out + 3 * n_out, b_3 + b_t * b_t * b_share, mask=b_here)
    else:
        if DIVERGENCE == "cosine":
            p_out += i_part * 3 * n_out
            tl.store(p_out + n_out, b_1, mask=b_here)
            tl.store(p_out + 2 * n_out, b_2, mask=b_here)
        else:
            p_out += i_part * n_out
        tl.store(p_out, b_0, mask=b_here)


def row_statistics(call: Call, maps: MapTensors) -> Tensor:
    """[n, B, G, R] ``maths.row_statistics`` of every row, 0 for rows that are not compared."""
    count = 3 if call.divergence == "cosine" else 1
    tile = call.tile("statistics", maps.size, maps.branches)
    programs = blocks_of(call.lists.row_count, tile.rows) * call.batch * call.groups
    most = blocks_of(call.lists.compared.count, tile.keys)
    parts = splits_for(programs, most, call.multiprocessors())
    out = _launch(call, maps, (parts, count), parts, None)
    return out[0] if parts == 1 else out.sum(0)


def row_moments(call: Call, maps: MapTensors, width: Tensor) -> Tensor:
    """[2, 2, B, G, R]: (student, teacher) x (sum, squared deviations from the row's mean) of each row.

    Args:
        width: [B] int32, the compared columns of each sample; a row counts all of them.
    """
    return _launch(call, maps, (2, 2), 1, width)


def _launch(
    call: Call, maps: MapTensors, shape: tuple[int, int], parts: int, width: Tensor | None
) -> Tensor:
    # the moments are the sink filter's, which has no thresholds yet
    branches = maps.branches if width is None else (*maps.branches, SINK_FILTER)
    tile = call.tile("statistics", maps.size, branches)
    out = torch.zeros(
        (*shape, call.batch, call.groups, call.rows), dtype=torch.float32, device=call.device
    )
    launch(
        _statistics,
        lambda rows, _: (blocks_of(call.lists.row_count, rows), parts, call.batch * call.groups),
        {
            **maps.arguments(call),
            **call.masks(call.lists.compared),
            **call.mask_constants(),
            "p_out": out,
            "p_width": width,
            "parts": parts,
            "DIVERGENCE": call.divergence,
            "MOMENTS": width is not None,
        },
        tile,
    )
    return out
