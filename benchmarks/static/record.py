"""The launches of a real call, without a device: what the backend would run, with which arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from fastalign.kernels import launch
from fastalign.kernels.configs import Tile

from fastalign.backends import triton as backend
from fastalign.spec import AlignSpec
from fastalign.validate import build_problem

#: Rows and keys of the recorded call: no multiple of 16, as real prompts.
LENGTH, VISUAL = 1100, 729


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments by name, and the tile it was given."""

    kernel: Any
    arguments: dict[str, Any]
    tile: Tile

    @property
    def name(self) -> str:
        """The kernel's name without the leading underscore."""
        return str(self.kernel.__name__).lstrip("_")


@dataclass(frozen=True)
class Case:
    """A call to record.

    Attributes:
        head_dim: of both sides. dtype: of q and k. heads_s, heads_t: query heads; repeat: query heads
            per key head. spec: the objective.
    """

    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    heads_s: int = 16
    heads_t: int = 20
    repeat: int = 4
    spec: AlignSpec = field(default_factory=AlignSpec)


@contextmanager
def _recording(target: str) -> Iterator[list[Launch]]:
    launches: list[Launch] = []

    def record(kernel: Any, arguments: dict[str, Any], tile: Tile) -> None:
        launches.append(Launch(kernel, arguments, tile))

    launch.recorder, launch.target_override = record, target
    try:
        yield launches
    finally:
        launch.recorder, launch.target_override = None, None


def record(case: Case, target: str) -> list[Launch]:
    """The launches of a forward and a backward on ``target`` (sm_80, gfx942, ...).

    fp32 products are recorded as tf32: "ieee" ones are no matter of the matrix unit.
    """
    shape = (1, LENGTH, case.head_dim)

    def random(heads: int) -> torch.Tensor:
        # [B, L, H, D] transposed, as a projection leaves it
        return torch.zeros(1, LENGTH, heads, shape[2], dtype=case.dtype).transpose(1, 2)

    visual = torch.zeros(1, LENGTH, dtype=torch.bool)
    visual[:, 35 : 35 + VISUAL] = True
    problem = build_problem(
        **dict.fromkeys(_NAMES),
        q_s=random(case.heads_s),
        k_s=random(case.heads_s // case.repeat),
        q_t=random(case.heads_t),
        k_t=random(case.heads_t // case.repeat),
        visual_mask=visual,
        spec=case.spec,
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with _recording(target) as launches:
            saved = backend.forward(problem)
            backend.backward(problem, saved, torch.ones(()))
    finally:
        torch.set_float32_matmul_precision(before)
    return launches


_NAMES = [
    *("query_mask", "attention_mask", "causal", "scale_s", "scale_t", "lse_s", "lse_t", "target"),
    *("target_index", "mix", "row_weight", "query_positions", "segment_ids", "block_ids"),
    *("window", "chunk", "softcap_s", "softcap_t", "sink_s", "sink_t"),
]
