"""A tile of both compared maps: what the forward, the pooled sums and the gradient have in common.

One function, so that the sink filter's mask of the backward is the mask of the forward, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .branches import GIVEN, SINK_FILTER, SOFTCAP
from .launch import Call, Side
from .primitives import as_map, below_sinks, given_map, side_map


@triton.jit
def at_sample(
    student, teacher, given, i_b, i_g, rows, groups,
    TEACHER: tl.constexpr, SCORES: tl.constexpr, VISUAL: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """(student, teacher, given) of ``map_tile`` with the pointers moved to a sample and its map i_g."""
    student = side_at(student, i_b, rows, SCORES)
    p_target, p_mass, p_high, stb, stg, stn, n_maps = given
    i_bg = i_b * groups + i_g
    if TEACHER == "map":
        p_target += i_b * stb + i_g * stg
        if VISUAL:
            p_mass += i_bg * rows
    elif TEACHER == "model":
        teacher = side_at(teacher, i_b, rows, SCORES)
    if SINK:
        p_high += i_bg
    return student, teacher, (p_target, p_mass, p_high, stb, stg, stn, n_maps)


@triton.jit
def side_at(side, i_b, rows, SCORES: tl.constexpr):
    """A side with the pointers moved to a sample."""
    p_q, p_k, p_lse, sqb, sqh, sqr, skb, skh, skl, heads, factor, cap = side
    p_q += i_b * sqb
    p_k += i_b * skb
    if not SCORES:
        p_lse += i_b * heads * rows
    return p_q, p_k, p_lse, sqb, sqh, sqr, skb, skh, skl, heads, factor, cap


@triton.jit
def map_tile(
    student, teacher, given, p_mix, b_row, b_ordinal, b_j, o_c, b_see, i_g, rows, groups,
    REPEAT_S: tl.constexpr, REPEAT_T: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    DS: tl.constexpr, BDS: tl.constexpr, CAP_S: tl.constexpr,
    DT: tl.constexpr, BDT: tl.constexpr, CAP_T: tl.constexpr,
    HEADS: tl.constexpr, LOGS: tl.constexpr, SCORES: tl.constexpr, TEACHER: tl.constexpr,
    VISUAL: tl.constexpr, SINK: tl.constexpr,
    WIDE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(A_s, A_t, log2 A_s, log2 A_t, kept), each [BR, BC], 0 where hidden.

    student, teacher: as ``side_map``. given: (map, its mass, the filter's thresholds; strides of the map
    by sample, map, row; distance of the student's threshold to the teacher's), pointers at the map.
    TEACHER: "model", "map" (a given one), or "none" (zeros).
    """
    b_x = side_map(
        student, p_mix, b_row, b_j, i_g, rows, groups, REPEAT_S, BR, BC, DS, BDS,
        HEADS == "each", HEADS == "mix", LOGS, SCORES, CAP_S, WIDE, UPCAST, PRECISION,
    )  # fmt: skip
    b_as, b_xs = as_map(b_x, b_see, LOGS)
    p_target, p_mass, p_high, _, _, stn, n_maps = given
    if TEACHER == "none":
        b_at = tl.zeros([BR, BC], tl.float32)
        b_xt = b_at
    elif TEACHER == "map":
        b_mass = b_as  # no mass is read unless VISUAL
        if VISUAL:
            b_mass = tl.load(p_mass + b_row)  # [BR]
        b_at, b_xt = given_map(p_target, b_ordinal, stn, o_c, b_see, b_mass, LOGS, VISUAL)
    else:
        b_x = side_map(
            teacher, p_mix, b_row, b_j, i_g, rows, groups, REPEAT_T, BR, BC, DT, BDT,
            HEADS != "mean", False, LOGS, SCORES, CAP_T, WIDE, UPCAST, PRECISION,
        )  # fmt: skip
        b_at, b_xt = as_map(b_x, b_see, LOGS)
    b_keep = b_see
    if SINK:
        b_keep = below_sinks(b_see, b_as, b_at, tl.load(p_high), tl.load(p_high + n_maps))
    return b_as, b_at, b_xs, b_xt, b_keep


@dataclass(frozen=True)
class MapTensors:
    """What the maps of both sides are made of.

    Attributes:
        student: its side. teacher: its side, or None with a target.
        lse_s, lse_t: [B, H, R] fp32 in log2, the head's share and the normalisation folded in.
        mix: [H_s, G] fp32. target: [B, G, N, C], unit stride along C. mass: [B, G, R].
        thresholds: [2, B, G] fp32 of the sink filter, or None. visual: a target is divided by its mass.
    """

    student: Side
    teacher: Side | None
    lse_s: Tensor
    lse_t: Tensor | None
    mix: Tensor | None
    target: Tensor | None
    mass: Tensor | None
    thresholds: Tensor | None
    visual: bool

    @property
    def size(self) -> int:
        """The larger head size."""
        return max(self.student.size, 0 if self.teacher is None else self.teacher.size)

    @property
    def branches(self) -> tuple[str, ...]:
        """Its branches (``branches``)."""
        capped = self.student.capped or (self.teacher is not None and self.teacher.capped)
        has = {SOFTCAP: capped, SINK_FILTER: self.thresholds is not None, GIVEN: self.kind == "map"}
        return tuple(name for name, on in has.items() if on)

    @property
    def kind(self) -> str:
        """Where the teacher's map comes from: "model", "map" or "none"."""
        if self.target is not None:
            return "map"
        return "none" if self.teacher is None else "model"

    def arguments(self, call: Call) -> dict[str, Any]:
        """Kernel arguments and compile-time facts of ``map_tile`` (filter excluded)."""
        student = self.student
        teacher = student if self.teacher is None else self.teacher
        target = self.target
        return {
            **student.arguments("s"),
            **student.constants("s"),
            **teacher.arguments("t"),
            **teacher.constants("t"),
            "p_lse_s": self.lse_s,
            "p_lse_t": self.lse_t,
            "p_mix": self.mix,
            "p_target": target,
            "p_mass": self.mass,
            "stb": 0 if target is None else target.stride(0),
            "stg": 0 if target is None else target.stride(1),
            "stn": 0 if target is None else target.stride(2),
            "p_high": self.thresholds,
            "rows": call.rows,
            "groups": call.groups,
            "n_batch": call.batch,
            "HEADS": call.heads,
            "LOGS": call.logs,
            "SCORES": call.scores,
            "TEACHER": self.kind,
            "VISUAL": self.visual and target is not None,
            "SINK": self.thresholds is not None,
        }
