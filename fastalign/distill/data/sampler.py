"""Batches of samples that are alike in modality and in length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class GroupedSampler(Sampler[int]):
    """Indices such that every ``size`` consecutive ones are all with or all without image, and alike long.

    As in LLaVA's training: each modality is shuffled, cut into large pieces, sorted by length inside
    each piece and cut into batches; then the batches are shuffled. What does not fill a batch of its
    modality comes last. The order is a function of seed and epoch alone.
    """

    def __init__(self, sizes: Sequence[tuple[bool, int]], size: int, seed: int) -> None:
        self.sizes = list(sizes)
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        batches: list[list[int]] = []
        rest: list[int] = []
        for modality in (True, False):
            members = [i for i, (has_image, _) in enumerate(self.sizes) if has_image == modality]
            order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            piece = 50 * self.size
            for start in range(0, len(order), piece):
                group = sorted(order[start : start + piece], key=lambda i: -self.sizes[i][1])
                whole = len(group) // self.size * self.size
                batches += [group[i : i + self.size] for i in range(0, whole, self.size)]
                rest += group[whole:]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[i]
        yield from rest
