"""A plan as a table, and sizes as text."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .plan import GIB, PHASES, RESERVE_BYTES, StagePlan

if TYPE_CHECKING:
    from rich.table import Table

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """Bytes of ``80GiB``, ``24 GB`` or a plain number.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text.upper())
    if match is None:
        raise ValueError(f"{text!r}; allowed: a number with KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def found_memory(cpu: bool) -> tuple[int, str]:
    """(bytes, name) of the device that a run on this machine would use."""
    import torch

    if not cpu and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return int(found.total_memory), str(found.name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = container_limit()
    if limit is not None and limit < memory:
        return limit, "this container's memory"
    return memory, "this machine's memory"


def container_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a container may use, where there is such a limit (cgroup version 2, then 1)."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return int((root / name).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None


def plan_table(plan: StagePlan, memory: int, device: str) -> Table:
    """Lines with their formulas, the sum of each phase, and whether it fits."""
    from rich.table import Table

    shape = plan.shape
    table = Table(
        title=f"memory of stage {plan.stage}: {shape.batch} x {shape.tokens:,} tokens a time, "
        f"{shape.visual:,} of an image, {shape.labelled:,} labelled",
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("line")
    table.add_column("GiB", justify="right")
    table.add_column("alive in")
    table.add_column("how", overflow="fold")
    for line in plan.lines:
        when = "always" if line.phases == PHASES else ", ".join(line.phases)
        table.add_row(line.name, f"{line.size / GIB:.2f}", when, line.formula)
    table.add_section()
    largest = max(PHASES, key=plan.phase)
    for name in PHASES:
        style = "bold" if name == largest else ""
        table.add_row(f"sum: {name}", f"{plan.phase(name) / GIB:.2f}", "", "", style=style)
    verdict = "fits" if plan.fits(memory) else "DOES NOT FIT"
    table.caption = (
        f"{verdict}: {plan.total / GIB:.1f} GiB and {RESERVE_BYTES / GIB:.0f} GiB left free, of "
        f"{memory / GIB:.1f} GiB ({device}). One device; several processes share nothing in this plan."
    )
    table.caption_justify = "left"
    return table
