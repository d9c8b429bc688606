"""What every launch shares: the two sides, the objective as compile-time facts, and the launch itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import tuning
from .branches import MIX, SCATTERED, SOFTCAP, WIDE, branch_tile
from .configs import Tile, tile_for
from .lists import KeyList, Lists

#: Called in place of a launch when set: ``benchmarks.static_report`` compiles what would have run.
recorder: Callable[[Any, dict[str, Any], Tile], None] | None = None
#: The architecture whose configurations are taken, when not the device's own.
target_override: str | None = None


@dataclass(frozen=True)
class Side:
    """One model's q and k as kernels take them.

    Attributes:
        q: [B, H, R, D]. k: [B, K, L, D]. Both with unit stride along D.
        factor, cap: a score is dot * factor, or cap * tanh(dot * factor) if ``capped``; in log2, except
            for maps of scores, which are in natural units.
    """

    q: Tensor
    k: Tensor
    factor: float
    cap: float
    capped: bool

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.q.shape[1]

    @property
    def repeat(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def size(self) -> int:
        """D."""
        return self.q.shape[3]

    @property
    def branches(self) -> tuple[str, ...]:
        """Its branches (``branches``)."""
        return (SOFTCAP,) if self.capped else ()

    def arguments(self, suffix: str) -> dict[str, Any]:
        """The kernel arguments that describe this side; ``suffix`` is "s" or "t"."""
        q, k = self.q, self.k
        return {
            f"p_q{suffix}": q,
            f"p_k{suffix}": k,
            f"sqb_{suffix}": q.stride(0),
            f"sqh_{suffix}": q.stride(1),
            f"sqr_{suffix}": q.stride(2),
            f"skb_{suffix}": k.stride(0),
            f"skh_{suffix}": k.stride(1),
            f"skl_{suffix}": k.stride(2),
            f"heads_{suffix}": self.heads,
            f"REPEAT_{suffix.upper()}": self.repeat,
            f"factor_{suffix}": self.factor,
            f"cap_{suffix}": self.cap,
        }

    def constants(self, suffix: str) -> dict[str, Any]:
        """The compile-time facts of this side."""
        side = suffix.upper()
        return {
            f"D{side}": self.size,
            f"BD{side}": padded_size(self.size),
            f"CAP_{side}": self.capped,
        }


@dataclass(frozen=True)
class Call:
    """Everything of a call that is not one kernel's own.

    Attributes:
        lists: rows and keys. blocks, causal, window: visibility beyond segments.
        heads: "mean", "each" or "mix". logs, scores: what the maps hold. divergence: its name.
        groups: compared maps a sample. dtype: of q and k. rows: R, query rows of q.
    """

    lists: Lists
    causal: bool
    window: int
    blocks: bool
    heads: str
    logs: bool
    scores: bool
    divergence: str
    groups: int
    batch: int
    rows: int
    dtype: torch.dtype
    device: torch.device
    wide: bool

    def masks(self, keys: KeyList) -> dict[str, Any]:
        """Arguments of the lists."""
        return {
            "p_rows": self.lists.rows,
            "p_keys": keys.entries,
            "row_length": self.lists.row_length,
            "key_length": keys.length,
            "window": self.window,
        }

    def mask_constants(self) -> dict[str, Any]:
        """Compile-time facts of visibility and arithmetic."""
        return {
            "INTERVAL": self.lists.interval,
            "CAUSAL": self.causal,
            "WINDOW": self.window > 0,
            "BLOCKS": self.blocks,
            "WIDE": self.wide,
            "UPCAST": upcast(self.dtype),
            "PRECISION": precision(self.dtype, architecture(self.device)),
        }

    def tile(self, kernel: str, size: int, branches: Sequence[str]) -> Tile:
        """The configuration of a kernel for head size ``size``; branches: those that the call knows not."""
        variant = "logs" if self.logs else "scores" if self.scores else ""
        own = {MIX: self.heads == "mix", WIDE: self.wide, SCATTERED: not self.lists.interval}
        named = (*branches, *(name for name, on in own.items() if on))
        what = (kernel, variant, architecture(self.device), size, self.dtype.itemsize)
        return branch_tile(*what, named) or tile_for(*what, self.heads == "each", self.by_fma)

    @property
    def by_fma(self) -> bool:
        """Whether products are FMA, with operands in registers: fp32's own, but for AMD's matrix units."""
        name = architecture(self.device)
        return by_fma(self.dtype, precision(self.dtype, name), name)

    def multiprocessors(self) -> int:
        """How many programs run at once, about; what splitting few rows aims at."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).multi_processor_count
        return 108 if recorder is not None else 4


def interpreting() -> bool:
    """Whether kernels run under the interpreter."""
    return bool(triton.knobs.runtime.interpret)


def upcast(dtype: torch.dtype) -> bool:
    """The interpreter's bf16 arithmetic is wrong: there, and there only, tiles become fp32."""
    return interpreting() and dtype == torch.bfloat16


def precision(dtype: torch.dtype, architecture: str) -> str:
    """How fp32 products are taken: as torch takes its own, in tf32 only where there is any."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32" if has_tf32(architecture) else "ieee"


def has_tf32(architecture: str) -> bool:
    """Whether an architecture has products in tf32: of AMD's, gfx942 alone."""
    return architecture == "gfx942" or not architecture.startswith("gfx")


def by_fma(dtype: torch.dtype, precision: str, architecture: str) -> bool:
    """Whether products are not the matrix unit's: fp32's own (``precision``), but for AMD's."""
    return dtype == torch.float32 and precision == "ieee" and not architecture.startswith("gfx")


def padded_size(size: int) -> int:
    """The power of two that holds a head."""
    return max(16, triton.next_power_of_2(size))


def architecture(device: torch.device) -> str:
    """The name of the device's architecture in the configuration tables."""
    if target_override is not None:
        return target_override
    if interpreting():
        return "interpreter"
    if device.type == "xpu":
        return "xpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def launch(
    kernel: Any,
    grid: Callable[[int, int], tuple[int, ...]],
    arguments: dict[str, Any],
    tile: Tile,
    restore: tuple[str, ...] = (),
) -> None:
    """Run a kernel once (or hand it to the recorder).

    Args:
        grid: rows and keys of a tile -> how many programs. arguments: all but the tile's size, BR and BC.
        restore: arguments that the kernel both reads and writes (``tuning``).
    """
    sized = {**arguments, "BR": tile.rows, "BC": tile.keys}
    if recorder is not None:
        recorder(kernel, sized, tile)
        return
    programs = grid(tile.rows, tile.keys)
    if 0 in programs:
        return
    if tuning.wanted() and not interpreting() and not _capturing():
        chosen = tuning.tuned(kernel, tile, restore)
        chosen[lambda meta: grid(meta["BR"], meta["BC"])](**arguments, enable_fp_fusion=True)
        return
    kernel[programs](**sized, **tile.options())


def _capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing can be timed then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def blocks_of(count: int, size: int) -> int:
    """How many tiles of ``size`` cover ``count``."""
    return -(-count // size)


def splits_for(programs: int, most: int, multiprocessors: int) -> int:
    """Into how many parts the keys of a row block are cut when there are few row blocks.

    Two waves of programs are aimed at; the parts are reduced in their order afterwards, so that the
    result does not depend on which finishes first.
    """
    return max(1, min(most, 2 * multiprocessors // max(1, programs)))
