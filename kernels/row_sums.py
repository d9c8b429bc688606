"""Sums over a row that no score enters: how many compared columns it sees, and a given map's mass there.

entries[i] = |{j in V : i sees j}|,    mass_g[i] = sum_{j in V, i sees j} target_g[i, j]
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Call, blocks_of, launch
from .primitives import reached, row_block, seen_keys, slot


@triton.jit
def _row_sums(
    p_entries, p_mass, p_target, p_rows, p_keys, stb, stg, stn,
    rows, groups, row_length, key_length, window,
    BR: tl.constexpr, BC: tl.constexpr, TARGET: tl.constexpr,
    INTERVAL: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    i_r, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_rows += i_b * 11 * row_length
    p_keys += i_b * 5 * key_length
    o_r = i_r * BR + tl.arange(0, BR)  # [BR]
    b_row, b_who, b_lo, b_hi = row_block(p_rows, o_r, row_length, 6)
    b_ordinal = slot(p_rows, o_r, row_length, 10)  # [BR]
    b_here = b_who[0] >= 0  # [BR]
    i_lo, i_hi = reached(b_lo, b_hi, BC)
    b_entries = tl.zeros([BR], tl.int32)
    b_mass = tl.zeros([BR], tl.float32)
    for i_c in range(i_lo, i_hi):
        o_c = i_c * BC + tl.arange(0, BC)  # [BC]
        b_j = slot(p_keys, o_c, key_length, 0)  # [BC]
        b_see = seen_keys(
            p_keys, o_c, b_j, b_lo, b_hi, b_who, key_length, window,
            INTERVAL, CAUSAL, WINDOW, BLOCKS,
        )  # fmt: skip
        b_entries += tl.sum(b_see.to(tl.int32), 1)
        if TARGET:
            o_t = b_ordinal.to(tl.int64)[:, None] * stn + o_c[None, :]
            b_t = tl.load(p_target + i_b * stb + i_g * stg + o_t, mask=b_see, other=0.0)
            b_mass += tl.sum(b_t.to(tl.float32), 1)
    if i_g == 0:
        tl.store(p_entries + i_b * rows + b_row, b_entries.to(tl.float32), mask=b_here)
    if TARGET:
        o_mass = (i_b * groups + i_g) * rows + b_row
        tl.store(p_mass + o_mass, b_mass, mask=b_here)


def row_sums(call: Call, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(entries [B, R], mass [B, G, R] or None) in fp32; 0 for rows that are not compared.

    Args:
        target: [B, G, N, C] with unit stride along C, or None.
    """
    tile = call.tile("row_sums", 16, ())
    shape = (call.batch, call.groups, call.rows)
    entries = torch.zeros((call.batch, call.rows), dtype=torch.float32, device=call.device)
    mass = None
    if target is not None:
        mass = torch.zeros(shape, dtype=torch.float32, device=call.device)
    masks: dict[str, Any] = call.mask_constants()
    launch(
        _row_sums,
        lambda rows, _: (
            blocks_of(call.lists.row_count, rows),
            1 if target is None else call.groups,
            call.batch,
        ),
        {
            **call.masks(call.lists.compared),
            "p_entries": entries,
            "p_mass": mass,
            "p_target": target,
            "stb": 0 if target is None else target.stride(0),
            "stg": 0 if target is None else target.stride(1),
            "stn": 0 if target is None else target.stride(2),
            "rows": call.rows,
            "groups": call.groups,
            "TARGET": target is not None,
            **{name: masks[name] for name in ("INTERVAL", "CAUSAL", "WINDOW", "BLOCKS")},
        },
        tile,
    )
    return entries, mass
