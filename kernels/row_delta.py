"""delta: the sum over the compared columns of P_h g, which the softmax's backward subtracts.

    dS_h = X_h - P_h delta_h,    delta_h[i] = sum_{j in V} X_h[i, j]
    X_h = P_h w_h g,  or in logs  X_h = E exp(log P_h + log w_h - log A), which is E where each head is
                      compared by itself: no score is needed then

One program per row block and (head, map) pair; the learned mix needs every pair, since the gradient of
mix[h, g] is the sum of P_h g_g over everything.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Call, Side, blocks_of, launch, splits_for
from .map_gradient import Workspace
from .primitives import (
    edge_tile,
    inner_tiles,
    load_tile,
    log2_scores,
    part_of,
    reached,
    row_block,
    seen_keys,
    slot,
    tile_offsets,
    workspace_offsets,
)
from .split import add_up, block_and_part, empty_parts


@triton.jit
def _add_tile(
    b_delta, b_q, b_l, p_ks, p_g, p_x, p_keys, o_g, o_c, o_d, b_who, b_lo, b_hi,
    skl, key_length, window, pitch, factor, cap,
    MASK: tl.constexpr, EACH: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CAP: tl.constexpr,
    LOGS: tl.constexpr, SCORES: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta [BR] with the columns o_c in it."""
    b_j = slot(p_keys, o_c, key_length, 0)  # [BC]
    o_w = workspace_offsets(o_g[:, None], o_c[None, :], pitch)  # [BR, BC]
    b_x = tl.load(p_g + o_w)  # [BR, BC]
    if not (EACH and LOGS):
        b_k = load_tile(p_ks, tile_offsets(b_j, skl, o_d, WIDE), o_d, D, BD, UPCAST)  # [BC, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BR, BC]
        b_s = log2_scores(b_s, factor, cap, CAP)
        if not SCORES:
            b_s -= b_l[:, None]
            if LOGS:
                b_s -= tl.load(p_x + o_w)
            b_s = tl.exp2(b_s)
        b_x *= b_s
    if MASK:
        b_see = seen_keys(
            p_keys, o_c, b_j, b_lo, b_hi, b_who, key_length, window,
            INTERVAL, CAUSAL, WINDOW, BLOCKS,
        )  # fmt: skip
        b_x = tl.where(b_see, b_x, 0.0)
    return b_delta + tl.sum(b_x, 1)


@triton.jit
def _row_delta(
    p_qs, p_ks, p_lse, p_g, p_x, p_delta, p_rows, p_keys,
    sqb_s, sqh_s, sqr_s, skb_s, skh_s, skl_s, heads_s, REPEAT_S: tl.constexpr, factor_s, cap_s,
    rows, groups, pairs, row_length, key_length, window, row_start, row_end, pitch, space,
    parts, n_batch, SPLIT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, DS: tl.constexpr, BDS: tl.constexpr, CAP_S: tl.constexpr,
    HEADS: tl.constexpr, LOGS: tl.constexpr, SCORES: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_r, i_part = block_and_part(parts, SPLIT)
    i_pair, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_h = i_pair
    i_g = 0
    if HEADS == "each":
        i_g = i_h
    elif HEADS == "mix":
        i_h = i_pair // groups
        i_g = i_pair % groups
    i_h = tl.cast(i_h, tl.int64)
    p_rows += i_b * 11 * row_length
    p_keys += i_b * 5 * key_length
    p_qs += i_b * sqb_s + i_h * sqh_s
    p_ks += i_b * skb_s + (i_h // REPEAT_S) * skh_s

    o_r = row_start + i_r * BR + tl.arange(0, BR)  # [BR]
    o_d = tl.arange(0, BDS)  # [BD]
    b_row, b_who, b_lo, b_hi = row_block(p_rows, o_r, row_length, 6)
    i_lo, i_hi = reached(b_lo, b_hi, BC)
    if SPLIT:
        i_lo, i_hi = part_of(i_lo, i_hi, i_part, parts)
    i_in, i_out = inner_tiles(b_who[0] >= 0, b_lo, b_hi, i_lo, i_hi, BC, INTERVAL)
    p_g += (i_b * groups + i_g) * space
    if LOGS:
        p_x += (i_b * groups + i_g) * space
    b_here = (o_r < row_end) & (b_who[0] >= 0)  # [BR]
    b_q = load_tile(p_qs, tile_offsets(b_row, sqr_s, o_d, WIDE), o_d, DS, BDS, UPCAST)  # [BR, BD]
    b_l = tl.zeros([BR], tl.float32)
    if not SCORES:
        b_l = tl.load(p_lse + (i_b * heads_s + i_h) * rows + b_row)  # [BR]
    b_delta = tl.zeros([BR], tl.float32)
    o_g = o_r - row_start  # [BR]
    for i_edge in range(i_lo, i_hi - (i_out - i_in)):
        o_c = edge_tile(i_edge, i_in, i_out) * BC + tl.arange(0, BC)  # [BC]
        b_delta = _add_tile(
            b_delta, b_q, b_l, p_ks, p_g, p_x, p_keys, o_g, o_c, o_d, b_who, b_lo, b_hi,
            skl_s, key_length, window, pitch, factor_s, cap_s, True, HEADS == "each", DS, BDS, CAP_S,
            LOGS, SCORES, INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION,
        )  # fmt: skip
    if INTERVAL:
        for i_c in range(i_in, i_out):
            o_c = i_c * BC + tl.arange(0, BC)  # [BC]
            b_delta = _add_tile(
                b_delta, b_q, b_l, p_ks, p_g, p_x, p_keys, o_g, o_c, o_d, b_who, b_lo, b_hi,
                skl_s, key_length, window, pitch, factor_s, cap_s, False, HEADS == "each", DS, BDS, CAP_S,
                LOGS, SCORES, INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION,
            )  # fmt: skip
    o_place = (i_b * pairs + i_pair) * rows + b_row  # [BR]
    if SPLIT:
        o_place = ((i_part * n_batch + i_b) * pairs + i_pair) * (row_end - row_start) + o_g
    tl.store(p_delta + o_place, b_delta, mask=b_here)


def row_delta(call: Call, side: Side, lse: Tensor, space: Workspace, delta: Tensor) -> None:
    """Write the sums of the workspace's rows into delta, zero elsewhere.

    Args:
        lse: [B, H, R] in log2, shares and normalisation folded in.
        delta: [B, pairs, R] fp32: pairs is H, or H x G (h-major) for heads="mix".
    """
    tile = call.tile("row_delta", side.size, side.branches)
    count, pairs = space.end - space.start, delta.shape[1]
    programs = blocks_of(count, tile.rows) * pairs * call.batch
    most = blocks_of(call.lists.compared.count, tile.keys)
    parts = splits_for(programs, most, call.multiprocessors())
    written = delta if parts == 1 else empty_parts(parts, space, delta)
    launch(
        _row_delta,
        lambda rows, _: (blocks_of(count, rows) * parts, pairs, call.batch),
        {
            **side.arguments("s"),
            **side.constants("s"),
            **call.masks(call.lists.compared),
            **call.mask_constants(),
            "p_lse": lse,
            "p_g": space.g,
            "p_x": space.x,
            "p_delta": written,
            "parts": parts,
            "n_batch": call.batch,
            "SPLIT": parts > 1,
            "rows": call.rows,
            "groups": call.groups,
            "pairs": pairs,
            "row_start": space.start,
            "row_end": space.end,
            "pitch": space.pitch,
            "space": space.size,
            "HEADS": call.heads,
            "LOGS": call.logs,
            "SCORES": call.scores,
        },
        tile,
    )
    if parts > 1:
        add_up(written, call, space, delta)
