"""How many exponentials a second a GPU takes: a kernel that does nothing else.

torch.exp reads and writes memory for each one, which on a GPU takes longer than the exponential itself.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

#: Numbers of a program (eight a thread: chains that do not wait for one another), and turns of its loop.
SIZE, TURNS = 1024, 4096
#: Programs for each multiprocessor.
PROGRAMS = 32


@triton.jit
def _exponentials(p_out, turns, SIZE: tl.constexpr):
    """x <- 2^-x of SIZE numbers, ``turns`` times: one instruction each, all in registers."""
    o_x = tl.arange(0, SIZE)  # [SIZE]
    b_x = o_x.to(tl.float32) / SIZE
    for _ in range(turns):
        b_x = tl.exp2(-b_x)
    tl.store(p_out + tl.program_id(0) * SIZE + o_x, b_x)


def exponentials(device: str) -> tuple[float, Callable[[], torch.Tensor]]:
    """(how many exponentials a run takes, the run, which returns the last numbers [programs, SIZE])."""
    programs = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs, SIZE, device=device)

    def run() -> torch.Tensor:
        _exponentials[(programs,)](out, TURNS, SIZE=SIZE, num_warps=4)
        return out

    return float(programs * SIZE * TURNS), run
