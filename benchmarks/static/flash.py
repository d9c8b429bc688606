"""Attention's forward in the manner of the Triton tutorial, as a yardstick for the static bound.

Contiguous rows and keys, no mask, online softmax: the simplest kernel of that kind, in our style. Its
floor is the same as that of a pass of ours: 4 D FLOP and one exponential per score element.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _flash(
    p_q, p_k, p_v, p_out, factor, rows, keys,
    BR: tl.constexpr, BC: tl.constexpr, BDS: tl.constexpr, DS: tl.constexpr,
):  # fmt: skip
    i_r, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r = i_r * BR + tl.arange(0, BR)  # [BR]
    o_d = tl.arange(0, BDS)  # [BD]
    p_q += i_h * rows * DS
    p_k += i_h * keys * DS
    p_v += i_h * keys * DS
    b_q = tl.load(p_q + o_r[:, None] * DS + o_d[None, :])  # [BR, BD]
    b_m = tl.full([BR], float("-inf"), tl.float32)
    b_l = tl.zeros([BR], tl.float32)
    b_acc = tl.zeros([BR, BDS], tl.float32)
    for i_c in range(0, tl.cdiv(keys, BC)):
        o_c = i_c * BC + tl.arange(0, BC)  # [BC]
        b_k = tl.load(p_k + o_c[:, None] * DS + o_d[None, :])  # [BC, BD]
        b_s = tl.dot(b_q, tl.trans(b_k))  # [BR, BC]
        b_new = tl.maximum(b_m, tl.max(b_s, 1) * factor)
        b_p = tl.exp2(b_s * factor - b_new[:, None])
        b_move = tl.exp2(b_m - b_new)
        b_l = b_l * b_move + tl.sum(b_p, 1)
        b_v = tl.load(p_v + o_c[:, None] * DS + o_d[None, :])  # [BC, BD]
        b_acc = b_acc * b_move[:, None] + tl.dot(b_p.to(b_v.dtype), b_v)
        b_m = b_new
    o_out = i_h * rows * DS + o_r[:, None] * DS + o_d[None, :]
    tl.store(p_out + o_out, (b_acc / b_l[:, None]).to(p_out.dtype.element_ty))
