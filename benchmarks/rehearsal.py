"""The GPU benchmark where there is no GPU: its providers on small shapes, through the gate, untimed.

A GPU run's steps are made and run as on the day, on a CPU, the Triton kernels in Triton's interpreter
(TRITON_INTERPRET=1). What only a device can show is not rehearsed: CUDA events, ceilings, memory (their
code runs on a stand-in, ``tests/bench/stand_in.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .case import Case
from .gate import check
from .modes import MODES
from .shapes import Shape

#: Small enough for an interpreter; rows of both kinds, unequal heads, shared key heads.
SHAPES = (
    Shape("text", 40, 5, 18, (2, 4), (1, 2), 16, count=12),
    Shape("visual", 40, 5, 18, (2, 3), (2, 3), 16, rows="visual"),
    Shape("text-bf16", 40, 5, 18, (2, 4), (1, 2), 16, count=12, dtype=torch.bfloat16),
)


@dataclass(frozen=True)
class Verdict:
    """What came of one provider of a shape and mode.

    Attributes:
        wrong: what the gate refused, or "". left_out: why it did not run here, or "".
    """

    shape: str
    mode: str
    provider: str
    wrong: str = ""
    left_out: str = ""


def rehearse(
    providers: tuple[str, ...], modes: tuple[str, ...], say: Callable[[str], None]
) -> list[Verdict]:
    """Every provider that a GPU run would measure.

    Args:
        providers: names; none: all. modes: names. say: gets a line of progress for each shape.
    """
    return [
        verdict
        for shape in SHAPES
        for mode in modes
        for verdict in _one(shape, mode, providers, say)
    ]


def _one(
    shape: Shape, mode: str, providers: tuple[str, ...], say: Callable[[str], None]
) -> Iterator[Verdict]:
    kind, case = MODES[mode], Case.of(shape)
    limit = 2**30
    on_gpu = [
        name
        for name in kind.providers
        if (not providers or name in providers) and not kind.applies(name, shape, limit, "cuda")
    ]
    here = {name: kind.applies(name, shape, limit, "cpu") for name in on_gpu}
    steps = {name: kind.providers[name](case) for name, reason in here.items() if not reason}
    say(f"{shape.name}, {mode}: {', '.join(steps)}")
    verdicts = check(case, kind, steps)
    for name, reason in here.items():
        yield Verdict(shape.name, mode, name, verdicts.get(name, ""), reason)
