"""dk of one key head: dk[j] = (scale / temperature) sum over its heads and rows of dS_h[i, j] q_h[i].

Transposed: a program owns a block of keys, goes through the heads that share them and down the rows
that can see them, and writes once. No two programs add to one number, so there are no atomics and the
result is the same bits every time. One launch for the compared columns, one for the other keys, which
only get -P delta. With more than one chunk of rows the next launch continues from what the last wrote.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dq import HeadTensors
from .launch import Call, Side, blocks_of, launch
from .lists import KeyList
from .map_gradient import Workspace
from .primitives import (
    edge_tile,
    inner_tiles,
    load_tile,
    reached,
    score_gradient,
    slot,
    tile_offsets,
    visible,
    workspace_offsets,
)


@triton.jit
def by_row(b, TURNED: tl.constexpr):
    """A row vector [BR], to broadcast against a tile."""
    return b[None, :] if TURNED else b[:, None]


@triton.jit
def by_key(b, TURNED: tl.constexpr):
    """A key vector [BC], to broadcast against a tile."""
    return b[:, None] if TURNED else b[None, :]


@triton.jit
def _add_tile(
    b_acc, b_k, p_q, p_g, p_x, o_map, p_vectors, p_rows, o_r, o_c, o_d,
    b_who, b_lo, b_hi, sqr, row_length, window, row_count, pitch, factor, cap,
    MASK: tl.constexpr, TURNED: tl.constexpr, INSIDE: tl.constexpr, EACH: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, CAP: tl.constexpr,
    LOGS: tl.constexpr, SCORES: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """b_acc [BC, BD] plus dS^T q over the rows o_r of one head.

    The tile of scores lies as [BR, BC], or TURNED as [BC, BR]: as the second product's left operand.
    """
    b_row = slot(p_rows, o_r, row_length, 0)  # [BR]
    b_q = load_tile(p_q, tile_offsets(b_row, sqr, o_d, WIDE), o_d, D, BD, UPCAST)  # [BR, BD]
    if TURNED:
        b_dot = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BC, BR]
    else:
        b_dot = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BR, BC]
    b_g = b_dot
    b_x = b_dot
    if INSIDE:
        o_w = workspace_offsets(by_row(o_r, TURNED), by_key(o_c, TURNED), pitch)
        b_g = tl.load(p_g + o_map + o_w)
        if LOGS and not EACH:
            b_x = tl.load(p_x + o_map + o_w)
    b_l = o_r  # with SCORES no row vector is read
    b_fold = b_l
    b_delta = b_l
    if not SCORES:
        b_fold = slot(p_vectors, o_r, row_length, 0)  # [BR]
        b_delta = slot(p_vectors, o_r, row_length, 1)  # [BR]
        if LOGS:
            b_l = slot(p_vectors, o_r, row_length, 2)  # [BR]
    b_ds = score_gradient(
        b_dot, b_g, b_x, by_row(b_l, TURNED), by_row(b_fold, TURNED), by_row(b_delta, TURNED),
        factor, cap, INSIDE, EACH, LOGS, SCORES, CAP,
    )  # fmt: skip
    if MASK:
        b_r = by_row(o_r, TURNED)
        if INTERVAL:
            b_see = (b_r >= by_key(b_lo, TURNED)) & (b_r < by_key(b_hi, TURNED))
        else:
            b_j, b_sj, b_bj = b_who
            b_i = slot(p_rows, o_r, row_length, 1)  # [BR]
            b_si = slot(p_rows, o_r, row_length, 2)  # [BR]
            b_bi = slot(p_rows, o_r, row_length, 3)  # [BR]
            b_see = visible(
                by_row(b_i, TURNED), by_row(b_si, TURNED), by_row(b_bi, TURNED),
                by_key(b_j, TURNED), by_key(b_sj, TURNED), by_key(b_bj, TURNED),
                window, CAUSAL, WINDOW, BLOCKS,
            )  # fmt: skip
            b_see = b_see & (b_r < row_count)
        b_ds = tl.where(b_see, b_ds, 0.0)
    b_ds = b_ds.to(b_q.dtype)
    if not TURNED:
        b_ds = tl.trans(b_ds)  # [BC, BR]
    return b_acc + tl.dot(b_ds, b_q, input_precision=PRECISION)


@triton.jit
def _dk(
    p_qs, p_ks, p_vectors, p_g, p_x, p_out, p_rows, p_keys,
    sqb_s, sqh_s, sqr_s, skb_s, skh_s, skl_s, heads_s, REPEAT_S: tl.constexpr, factor_s, cap_s,
    row_length, key_length, length, window, row_start, row_count, pitch, space, slope,
    BR: tl.constexpr, BC: tl.constexpr, DS: tl.constexpr, BDS: tl.constexpr, CAP_S: tl.constexpr,
    EACH: tl.constexpr, LOGS: tl.constexpr, SCORES: tl.constexpr, INSIDE: tl.constexpr,
    ADD: tl.constexpr, TURNED: tl.constexpr, EDGE_STAGES: tl.constexpr, VECTORS: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_c, i_k, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p_rows += (
        i_b * 11 * row_length + row_start
    )  # from here on o_r counts from the chunk's first row
    p_vectors += i_b * heads_s * VECTORS * row_length + row_start
    p_keys += i_b * 5 * key_length
    p_ks += i_b * skb_s + i_k * skh_s
    p_qs += i_b * sqb_s

    o_c = i_c * BC + tl.arange(0, BC)  # [BC]
    o_d = tl.arange(0, BDS)  # [BD]
    b_j = slot(p_keys, o_c, key_length, 0)  # [BC]
    b_sj = slot(p_keys, o_c, key_length, 1)  # [BC]
    b_who = (b_j, b_sj, slot(p_keys, o_c, key_length, 2))
    # rows of this chunk that can see each key: what the loop covers, and with INTERVAL the mask
    b_lo = tl.maximum(slot(p_keys, o_c, key_length, 3) - row_start, 0)  # [BC]
    b_hi = tl.minimum(slot(p_keys, o_c, key_length, 4) - row_start, row_count)  # [BC]
    i_lo, i_hi = reached(b_lo, b_hi, BR)
    i_in, i_out = inner_tiles(b_sj >= 0, b_lo, b_hi, i_lo, i_hi, BR, INTERVAL)
    b_k = load_tile(p_ks, tile_offsets(b_j, skl_s, o_d, WIDE), o_d, DS, BDS, UPCAST)  # [BC, BD]

    b_acc = tl.zeros([BC, BDS], tl.float32)
    for i_share in range(0, REPEAT_S):
        i_h = i_k * REPEAT_S + i_share
        o_bh = i_b * heads_s + i_h
        i_g = o_bh if EACH else i_b
        p_head = p_vectors + i_h * VECTORS * row_length
        for i_edge in tl.range(i_lo, i_hi - (i_out - i_in), num_stages=EDGE_STAGES):
            o_r = edge_tile(i_edge, i_in, i_out) * BR + tl.arange(0, BR)  # [BR]
            b_acc = _add_tile(
                b_acc, b_k, p_qs + i_h * sqh_s, p_g, p_x, i_g * space,
                p_head, p_rows, o_r, o_c, o_d, b_who, b_lo, b_hi,
                sqr_s, row_length, window, row_count, pitch, factor_s, cap_s,
                True, TURNED, INSIDE, EACH, DS, BDS, CAP_S, LOGS, SCORES,
                INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION,
            )  # fmt: skip
        if INTERVAL:
            for i_r in range(i_in, i_out):
                o_r = i_r * BR + tl.arange(0, BR)  # [BR]
                b_acc = _add_tile(
                    b_acc, b_k, p_qs + i_h * sqh_s, p_g, p_x, i_g * space,
                    p_head, p_rows, o_r, o_c, o_d, b_who, b_lo, b_hi,
                    sqr_s, row_length, window, row_count, pitch, factor_s, cap_s,
                    False, TURNED, INSIDE, EACH, DS, BDS, CAP_S, LOGS, SCORES,
                    INTERVAL, CAUSAL, WINDOW, BLOCKS, WIDE, UPCAST, PRECISION,
                )  # fmt: skip

    i_kv = i_b * (heads_s // REPEAT_S) + i_k
    o_out = (i_kv * length + b_j)[:, None] * DS + o_d[None, :]  # [BC, BD]
    m_out = (b_sj >= 0)[:, None] & (o_d < DS)[None, :]
    b_acc *= tl.load(slope)
    if ADD:
        b_acc += tl.load(p_out + o_out, mask=m_out, other=0.0)
    tl.store(p_out + o_out, b_acc.to(p_out.dtype.element_ty), mask=m_out)


def _by_list(call: Call, heads: HeadTensors) -> Tensor:
    """[B, H, n, row_length]: fold, delta (and lse in logs) in the order of the row list.

    Tile after tile of rows needs them; so they come as runs and not by the rows' indices.
    """
    vectors = [heads.fold, heads.delta, heads.lse][: 3 if call.logs else 2]
    order = call.lists.rows[:, 0].long()[:, None, None]
    stacked = torch.stack(vectors, 2)
    return stacked.gather(3, order.expand(*stacked.shape[:3], -1))


def dk(
    call: Call, side: Side, heads: HeadTensors, space: Workspace, out: Tensor, add: bool
) -> None:
    """Write (or add) the workspace's rows' share of dk to out [B, K, L, D], contiguous.

    Args:
        add: continue from what is in ``out`` (fp32 then); keys on no list are never written.
    """
    vectors = _by_list(call, heads)
    shared = {
        **side.arguments("s"),
        **side.constants("s"),
        **call.mask_constants(),
        "p_vectors": vectors,
        "slope": heads.slope,
        "p_g": space.g,
        "p_x": space.x,
        "p_out": out,
        "length": side.k.shape[2],
        "row_start": space.start,
        "row_count": space.end - space.start,
        "pitch": space.pitch,
        "space": space.size,
        "EACH": heads.each,
        "LOGS": call.logs,
        "SCORES": call.scores,
        "ADD": add,
        "VECTORS": vectors.shape[2],
    }
    _over(call, side, call.lists.compared, {**shared, "INSIDE": True})
    if heads.others:
        _over(call, side, call.lists.others, {**shared, "INSIDE": False})


def _over(call: Call, side: Side, keys: KeyList, arguments: dict[str, Any]) -> None:
    """dk of one list of keys."""
    tile = call.tile("dk", side.size, side.branches)
    # turned, key bounds, row vectors and the workspace's tile fill the registers: no second pipeline
    stages = 1 if tile.turned else tile.stages
    launch(
        _dk,
        lambda _, size: (blocks_of(keys.count, size), side.heads // side.repeat, call.batch),
        {**arguments, **call.masks(keys), "TURNED": tile.turned, "EDGE_STAGES": stages},
        tile,
        restore=("p_out",),
    )
