"""A kernel's tile: how much of the scores a program computes at a time, and with what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: What lists and workspaces are padded to: every tile's rows and keys divide it.
GRAIN = 128


@dataclass(frozen=True)
class Tile:
    """Rows x keys of a program's tile, warps, pipeline stages, and the reason.

    turned: dk's tile of scores lies keys x rows, so that the first product leaves dS where the second
    wants its left operand (tensor memory of tcgen05). registers: what a thread may take; without a number
    ptxas aims at many programs side by side and rather spills a few bytes than takes more. NVIDIA only.
    mma_sync: made for mma.sync although the architecture has wgmma or tcgen05; the gates then ask for that.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    why: str
    turned: bool = False
    registers: int | None = None
    mma_sync: bool = False

    def options(self) -> dict[str, Any]:
        """What triton's compiler is told beside the size: by a launch and by the gates alike."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


#: Tiles by name: kernel_variant_each (a map a head), kernel_variant (logs, scores), kernel, "other" (every
#: kernel without a row).
Table = dict[str, Tile]
