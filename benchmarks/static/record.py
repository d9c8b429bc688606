"""The launches of a real call, without a device: what the backend would run, with which arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
            per key head. spec: the objective. rows: compared rows, the last ones; 0: all. pitch: elements
            from one row of q and k to the next; 0: as a projection leaves them. given: further arguments
            of the call. tf32: how fp32 products are taken where there is any, as by torch's own precision.
    """

    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    heads_s: int = 16
    heads_t: int = 20
    repeat: int = 4
    spec: AlignSpec = field(default_factory=AlignSpec)
    rows: int = 0
    pitch: int = 0
    given: Mapping[str, Any] = field(default_factory=dict)
    tf32: bool = False


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
    """The launches of a forward and a backward on ``target`` (sm_80, gfx942, ...)."""
    size = case.head_dim
    rows = case.rows or LENGTH

    def tensor(heads: int, length: int) -> torch.Tensor:
        # [B, L, H, D] transposed, as a projection leaves it; nobody looks at the numbers, so that the
        # memory of a wide pitch is reserved and never touched
        pitch = case.pitch or heads * size
        x = torch.empty((length - 1) * pitch + heads * size, dtype=case.dtype)
        return x.as_strided((1, heads, length, size), (x.numel(), size, pitch, 1))

    visual = torch.zeros(1, LENGTH, dtype=torch.bool)
    visual[:, 35 : 35 + VISUAL] = True
    given = {**dict.fromkeys(_NAMES), **case.given}
    if case.rows:
        given["query_positions"] = torch.arange(LENGTH - rows, LENGTH)[None]
    if given["target"] is None:
        given["q_t"] = tensor(case.heads_t, rows)
        given["k_t"] = tensor(case.heads_t // case.repeat, LENGTH)
    problem = build_problem(
        **given,
        q_s=tensor(case.heads_s, rows),
        k_s=tensor(case.heads_s // case.repeat, LENGTH),
        visual_mask=visual,
        spec=case.spec,
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
    try:
        with _recording(target) as launches:
            saved = backend.forward(problem)
            backend.backward(problem, saved, torch.ones(()))
    finally:
        torch.set_float32_matmul_precision(before)
    return launches


_NAMES = [
    *(
        "q_t",
        "k_t",
        "query_mask",
        "attention_mask",
        "causal",
        "scale_s",
        "scale_t",
        "lse_s",
        "lse_t",
        "target",
    ),
    *("target_index", "mix", "row_weight", "query_positions", "segment_ids", "block_ids"),
    *("window", "chunk", "softcap_s", "softcap_t", "sink_s", "sink_t"),
]
