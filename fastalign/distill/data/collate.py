"""Encoded samples to a batch: every output of the processor is forwarded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import IGNORE_INDEX


class Collator:
    """Pads per-token lists and concatenates everything else over the batch's images.

    Args:
        pad_id: the token that fills ``input_ids``.
        side: "right" or "left".
    """

    def __init__(self, pad_id: int, side: str = "right") -> None:
        if side not in ("left", "right"):
            raise ValueError(f"side is {side!r}; allowed: 'left', 'right'")
        self.fill = {"input_ids": pad_id, "labels": IGNORE_INDEX}
        self.side = side

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        names = dict.fromkeys(name for item in items for name in item)
        batch: dict[str, Any] = {}
        for name in names:
            values = [item[name] for item in items if name in item]
            if name == "skipped_samples":
                batch[name] = [reason for value in values for reason in value]
            elif name == "recorded":
                batch[name] = values
            elif isinstance(values[0], Tensor):
                batch[name] = _concatenate(values)
            else:
                if len(values) < len(items):
                    raise ValueError(f"{name!r} is given for {len(values)} of {len(items)} samples")
                batch[name] = self._pad(values, self.fill.get(name, 0))
        return batch

    def _pad(self, rows: list[list[int]], fill: int) -> Tensor:
        width = max(map(len, rows))
        padded = []
        for row in rows:
            blank = [fill] * (width - len(row))
            padded.append(blank + list(row) if self.side == "left" else list(row) + blank)
        return torch.tensor(padded)


def _concatenate(values: list[Tensor]) -> Tensor:
    """Along the images; images cut into different numbers of tiles are filled with empty tiles."""
    shapes = {value.shape[1:] for value in values}
    if len(shapes) > 1 and all(v.dim() == 5 for v in values):
        most = max(v.shape[1] for v in values)
        values = [F.pad(v, (0, 0) * 3 + (0, most - v.shape[1])) for v in values]
    return torch.cat(values)
