"""The gradient of the head-free map, tile by tile, into a workspace that every head then reads.

    g[i, j] = dL/dA_s[i, j]           maps as they are
    E[i, j] = dL/d log A_s[i, j]      maps in logs, together with log2 A_s

Recomputing A_s and A_t costs one exponential and 2 D multiply-adds a head and entry; done here once,
not once for every head of dq and of dk. With normalize="visual" the renormalisation's own term,

    E <- E - A_s sum_V E      (A_s normalised: ``gradients.through_renormalisation``)

needs the whole row: the program goes over its tiles a second time, which reads the workspace only.
For pooled vectors E or g of an entry is its share of its column's (``gradients.through_pooling``).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import Call, blocks_of, launch, splits_for
from .maps import MapTensors, at_sample, map_tile
from .primitives import (
    LOG2E,
    entry_gradient,
    part_of,
    reached,
    row_block,
    seen_keys,
    slot,
    workspace_offsets,
)


@triton.jit
def _map_gradient(
    p_qs, p_ks, p_lse_s, p_qt, p_kt, p_lse_t, p_mix, p_target, p_mass, p_high,
    p_c0, p_c1, p_weight, p_up, p_count, p_pooled, p_g, p_x, p_rows, p_keys,
    sqb_s, sqh_s, sqr_s, skb_s, skh_s, skl_s, heads_s, REPEAT_S: tl.constexpr, factor_s, cap_s,
    sqb_t, sqh_t, sqr_t, skb_t, skh_t, skl_t, heads_t, REPEAT_T: tl.constexpr, factor_t, cap_t,
    stb, stg, stn, rows, groups, n_batch, row_length, key_length, window, parts, length,
    row_start, pitch, space,
    BR: tl.constexpr, BC: tl.constexpr,
    DS: tl.constexpr, BDS: tl.constexpr, CAP_S: tl.constexpr,
    DT: tl.constexpr, BDT: tl.constexpr, CAP_T: tl.constexpr,
    HEADS: tl.constexpr, LOGS: tl.constexpr, SCORES: tl.constexpr, DIVERGENCE: tl.constexpr,
    TEACHER: tl.constexpr, VISUAL: tl.constexpr, RENORMALISE: tl.constexpr, SINK: tl.constexpr,
    POOLED: tl.constexpr,
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

    o_r = row_start + i_r * BR + tl.arange(0, BR)  # [BR]
    b_row, b_who, b_lo, b_hi = row_block(p_rows, o_r, row_length, 6)
    b_ordinal = slot(p_rows, o_r, row_length, 10)  # [BR]
    b_here = b_who[0] >= 0  # [BR]
    i_lo, i_hi = reached(b_lo, b_hi, BC)
    i_lo, i_hi = part_of(i_lo, i_hi, i_part, parts)
    p_g += i_bg.to(tl.int64) * space
    if LOGS:
        p_x += i_bg.to(tl.int64) * space
    if POOLED:
        b_w = tl.load(p_weight + i_b * rows + b_row, mask=b_here, other=0.0)  # [BR]
    else:
        b_c0 = tl.load(p_c0 + i_bg * rows + b_row)  # [BR]
        b_c1 = b_c0
        if DIVERGENCE == "cosine":
            b_c1 = tl.load(p_c1 + i_bg * rows + b_row)  # [BR]

    b_sum = tl.zeros([BR], tl.float32)
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
        if POOLED:
            o_v = i_bg.to(tl.int64) * length + b_j  # [BC]
            b_n = tl.load(p_count + o_v)  # [BC]
            b_u = tl.load(p_up + o_v) / tl.where(b_n > 0, b_n, 1.0)  # [BC]
            b_keep = b_keep & (b_w > 0)[:, None]
            b_g = b_u[None, :] * b_w[:, None]
            if LOGS:
                b_g *= tl.exp2(b_xs - tl.load(p_pooled + o_v)[None, :] * LOG2E)
        else:
            b_g = entry_gradient(
                b_as, b_at, b_xs, b_xt, b_c0[:, None], b_c1[:, None], DIVERGENCE, LOGS
            )
        b_g = tl.where(b_keep, b_g, 0.0)
        if RENORMALISE:
            b_sum += tl.sum(b_g, 1)
        o_w = workspace_offsets((o_r - row_start)[:, None], o_c[None, :], pitch)  # [BR, BC]
        tl.store(p_g + o_w, b_g)
        if LOGS:
            tl.store(p_x + o_w, b_xs)
    if RENORMALISE:
        tl.debug_barrier()
        for i_c in range(i_lo, i_hi):
            o_c = i_c * BC + tl.arange(0, BC)  # [BC]
            o_w = workspace_offsets((o_r - row_start)[:, None], o_c[None, :], pitch)  # [BR, BC]
            b_g = tl.load(p_g + o_w)
            b_x = tl.load(p_x + o_w)
            tl.store(p_g + o_w, b_g - tl.exp2(b_x) * b_sum[:, None])


@dataclass(frozen=True)
class Workspace:
    """Head-free maps of the rows [start, end) of the row list.

    Attributes:
        g: [B, G, rows, pitch] fp32 gradient. Rows and pitch are padded to whole tiles (``GRAIN``), so
            that no access needs a mask; entries that no row of a tile reaches are never written, and
            readers drop what is hidden. x: the same of log2 A_s for maps in logs, else None.
    """

    g: Tensor
    x: Tensor | None
    start: int
    end: int

    @property
    def size(self) -> int:
        """Entries from map to map."""
        return self.g.shape[2] * self.g.shape[3]

    @property
    def pitch(self) -> int:
        """Entries from row to row."""
        return self.g.shape[3]


@dataclass(frozen=True)
class Upstream:
    """What the gradient of an entry is made of besides the maps.

    Attributes:
        coefficients: [n, B, G, R] of ``gradients.row_coefficients``, contiguous.
        pooled: None, or ([B, G, L] gradient of the pooled vector, sum of weights, its natural log).
        weight: [B, R] fp32 row weights (pooled only).
    """

    coefficients: Tensor
    pooled: tuple[Tensor, Tensor, Tensor] | None
    weight: Tensor


def map_gradient(call: Call, maps: MapTensors, upstream: Upstream, space: Workspace) -> None:
    """Fill the workspace."""
    tile = call.tile("map_gradient", maps.size, maps.branches)
    row_blocks = blocks_of(space.end - space.start, tile.rows)
    parts = 1
    if not maps.visual:
        most = blocks_of(call.lists.compared.count, tile.keys)
        parts = splits_for(row_blocks * call.batch * call.groups, most, call.multiprocessors())
    up, count, log_pooled = upstream.pooled or (None, None, None)
    coefficients = upstream.coefficients
    launch(
        _map_gradient,
        lambda rows, _: (blocks_of(space.end - space.start, rows), parts, call.batch * call.groups),
        {
            **maps.arguments(call),
            **call.masks(call.lists.compared),
            **call.mask_constants(),
            "p_c0": coefficients[0],
            "p_c1": coefficients[1] if len(coefficients) > 1 else None,
            "p_weight": upstream.weight,
            "p_up": up,
            "p_count": count,
            "p_pooled": log_pooled,
            "p_g": space.g,
            "p_x": space.x,
            "parts": parts,
            "length": 0 if up is None else up.shape[2],
            "row_start": space.start,
            "pitch": space.pitch,
            "space": space.size,
            "DIVERGENCE": call.divergence,
            "RENORMALISE": maps.visual,
            "POOLED": up is not None,
        },
        tile,
    )
