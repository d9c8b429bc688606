"""The log-sum-exp of every row and head over a list of keys: what turns scores into probabilities.

    LSE_h[i] = log sum_{j in N(i)} exp S_h[i, j],   one online pass: (m, l) with sum = l 2^m in log2

Only tiles that some row of the block can reach are visited, and those that all of its rows see entirely
have no mask. A row whose first tiles are hidden keeps
m = -inf and adds exactly 0; a row that sees nothing at all ends as 0. With few rows the keys are cut
into parts; each part writes its own log-sum-exp and the caller adds them up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Call, Side, blocks_of, launch, splits_for
from .lists import KeyList
from .primitives import (
    LN2,
    edge_tile,
    inner_tiles,
    key_positions,
    load_tile,
    log2_scores,
    online_logsumexp,
    part_of,
    reached,
    row_block,
    seen_keys,
    tile_offsets,
)


@triton.jit
def _add_tile(
    b_m, b_l, b_q, p_ks, p_keys, o_c, o_d, b_who, b_lo, b_hi, skl, key_length, last, window,
    factor, cap, MASK: tl.constexpr, DENSE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, CAP: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(m, l) [BR] with the keys o_c in it."""
    b_j = key_positions(p_keys, o_c, key_length, last, DENSE)  # [BC]
    b_k = load_tile(p_ks, tile_offsets(b_j, skl, o_d, WIDE), o_d, D, BD, UPCAST)  # [BC, BD]
    b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BR, BC]
    b_x = log2_scores(b_x, factor, cap, CAP)
    if MASK:
        b_see = seen_keys(
            p_keys, o_c, b_j, b_lo, b_hi, b_who, key_length, window,
            INTERVAL, CAUSAL, WINDOW, BLOCKS,
        )  # fmt: skip
        b_x = tl.where(b_see, b_x, float("-inf"))
    return online_logsumexp(b_m, b_l, b_x)


@triton.jit
def _row_lse(
    p_qs, p_ks, p_lse, p_rows, p_keys,
    sqb_s, sqh_s, sqr_s, skb_s, skh_s, skl_s, heads_s, REPEAT_S: tl.constexpr, factor_s, cap_s,
    rows, row_length, key_length, last, window, parts, n_batch,
    DS: tl.constexpr, BDS: tl.constexpr, CAP_S: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, LO: tl.constexpr, DENSE: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_r, i_part, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // heads_s).to(tl.int64), (i_bh % heads_s).to(tl.int64)
    p_rows += i_b * 11 * row_length
    p_keys += i_b * 5 * key_length
    p_qs += i_b * sqb_s + i_h * sqh_s
    p_ks += i_b * skb_s + (i_h // REPEAT_S) * skh_s

    o_r = i_r * BR + tl.arange(0, BR)  # [BR]
    o_d = tl.arange(0, BDS)  # [BD]
    b_row, b_who, b_lo, b_hi = row_block(p_rows, o_r, row_length, LO)
    b_here = b_who[0] >= 0  # [BR]
    i_lo, i_hi = reached(b_lo, b_hi, BC)
    i_lo, i_hi = part_of(i_lo, i_hi, i_part, parts)
    i_in, i_out = inner_tiles(b_here, b_lo, b_hi, i_lo, i_hi, BC, INTERVAL)

    b_q = load_tile(p_qs, tile_offsets(b_row, sqr_s, o_d, WIDE), o_d, DS, BDS, UPCAST)  # [BR, BD]
    b_m = tl.full([BR], float("-inf"), tl.float32)
    b_l = tl.zeros([BR], tl.float32)
    for i_edge in range(i_lo, i_hi - (i_out - i_in)):
        o_c = edge_tile(i_edge, i_in, i_out) * BC + tl.arange(0, BC)  # [BC]
        b_m, b_l = _add_tile(
            b_m, b_l, b_q, p_ks, p_keys, o_c, o_d, b_who, b_lo, b_hi, skl_s, key_length, last,
            window, factor_s, cap_s, True, DENSE, DS, BDS, CAP_S,
            INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION,
        )  # fmt: skip
    if INTERVAL:
        for i_c in range(i_in, i_out):
            o_c = i_c * BC + tl.arange(0, BC)  # [BC]
            b_m, b_l = _add_tile(
                b_m, b_l, b_q, p_ks, p_keys, o_c, o_d, b_who, b_lo, b_hi, skl_s, key_length, last,
                window, factor_s, cap_s, False, DENSE, DS, BDS, CAP_S,
                INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION,
            )  # fmt: skip
    b_lse = tl.where(b_l > 0, (b_m + tl.log2(b_l)) * LN2, float("-inf"))  # [BR]
    o_lse = ((i_part * n_batch + i_b) * heads_s + i_h) * rows + b_row
    tl.store(p_lse + o_lse, b_lse, mask=b_here)


def row_lse(call: Call, side: Side, keys: KeyList, sink: Tensor | None) -> Tensor:
    """[B, H, R] natural log-sum-exp over ``keys``, sink logits ([H], natural) included.

    0 for rows that are not compared or see no key.
    """
    tile = call.tile("row_lse", side.size, side.branches)
    row_blocks = blocks_of(call.lists.row_count, tile.rows)
    programs = row_blocks * call.batch * side.heads
    parts = splits_for(programs, blocks_of(keys.count, tile.keys), call.multiprocessors())
    lse = torch.full(
        (parts, call.batch, side.heads, call.rows),
        -torch.inf,
        dtype=torch.float32,
        device=call.device,
    )
    launch(
        _row_lse,
        lambda rows, _: (blocks_of(call.lists.row_count, rows), parts, call.batch * side.heads),
        {
            **side.arguments("s"),
            **side.constants("s"),
            **call.masks(keys),
            **call.mask_constants(),
            "p_lse": lse,
            "rows": call.rows,
            "parts": parts,
            "n_batch": call.batch,
            "LO": keys.slot,
            "DENSE": keys.dense,
            "last": keys.last,
        },
        tile,
    )
    total = lse[0] if parts == 1 else torch.logsumexp(lse, 0)
    alive = total > -torch.inf
    if sink is not None:
        total = torch.logaddexp(total, sink.float().view(1, -1, 1))
    return torch.where(alive, total, 0.0)
