"""The teacher's targets, recorded once: training then needs no teacher in memory.

A directory of safetensors shards and a ``manifest.json`` that says what they are: which teacher (hashes
of its configuration and of its weights), which objective, which layers and rows, the samples in their
order with a hash of the tokens of each, and a checksum of each shard. Whatever does not fit what it is
used for is refused. ``record`` writes it.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..spec import AlignSpec
from .matching import Matching
from .tokens import Inputs, RowChoice, Tokens
from .view import ModelView

FORMAT = 2
MANIFEST = "manifest.json"


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Names a model by hashes of its configuration and of its weights (every byte of them)."""
    view = ModelView("teacher", model)
    weights = hashlib.sha256()
    for name, value in sorted(view.model.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    config = json.dumps(view.config.to_dict(), sort_keys=True, default=str)
    return {
        "model_type": view.config.model_type,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "weights_sha256": weights.hexdigest(),
    }


def token_hash(ids: Tensor) -> str:
    """sha256 of a sample's valid token ids."""
    return hashlib.sha256(ids.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()


def order_hash(hashes: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TeacherCache:
    """Recorded targets, opened for training: give it to ``AttentionAlignment`` in the teacher's place.

    ::

        cache = TeacherCache("targets")
        alignment = AttentionAlignment(student, cache, spec="compodistill")
        with alignment.step(inputs, samples=[12, 40]):     # which recorded samples the batch holds
            out = student(**inputs)

    Args:
        path: the directory.
        teacher: refuse the cache unless this very model made it. None: not asked.
        verify: read every shard and compare its checksum; else its size alone.

    Raises:
        ValueError: no or another manifest, a damaged or missing shard, another teacher.
    """

    def __init__(
        self, path: str | Path, *, teacher: nn.Module | None = None, verify: bool = True
    ) -> None:
        self.path = Path(path)
        file = self.path / MANIFEST
        if not file.is_file():
            raise ValueError(
                f"path is {str(self.path)!r}, which has no {MANIFEST}; allowed: a directory that "
                "record_teacher completed"
            )
        self.manifest: dict[str, Any] = json.loads(file.read_text())
        if self.manifest.get("format") != FORMAT:
            raise ValueError(
                f"the cache has format {self.manifest.get('format')!r}; allowed: {FORMAT}"
            )
        self.spec = AlignSpec(**self.manifest["spec"])
        self.matching: Matching = {int(s): tuple(t) for s, t in self.manifest["matching"].items()}
        self.hashes: list[str] = self.manifest["samples"]
        if order_hash(self.hashes) != self.manifest["order_sha256"]:
            raise ValueError("the manifest's samples do not have its order_sha256: it was edited")
        if teacher is not None:
            self._check_teacher(teacher)
        self._check_shards(verify)
        self._starts: list[int] = []
        start = 0
        for shard in self.manifest["shards"]:
            self._starts.append(start)
            start += shard["samples"]

    def __len__(self) -> int:
        return len(self.hashes)

    def _check_teacher(self, teacher: nn.Module) -> None:
        found, made = fingerprint(teacher), self.manifest["teacher"]
        for name, value in found.items():
            if value != made[name]:
                raise ValueError(
                    f"the cache was recorded from a teacher with {name} {made[name]} and the given "
                    f"one has {value}; allowed: the same teacher"
                )

    def _check_shards(self, verify: bool) -> None:
        for shard in self.manifest["shards"]:
            file = self.path / shard["file"]
            whole = file.is_file() and file.stat().st_size == shard["bytes"]
            if not whole or (verify and file_hash(file) != shard["sha256"]):
                raise ValueError(
                    f"{file.name} is missing or does not have the checksum of the manifest; allowed: "
                    "the files that record_teacher wrote"
                )

    @property
    def numbers(self) -> dict[str, int]:
        """Sample numbers by the names of their contents; empty where none were given."""
        found: dict[str, int] = self.manifest["contents"]
        return found

    @cached_property
    def _files(self) -> list[tuple[Any, frozenset[str]]]:
        """Each shard with the names in it."""
        from safetensors import safe_open

        files = [safe_open(self.path / s["file"], framework="pt") for s in self.manifest["shards"]]
        return [(file, frozenset(file.keys())) for file in files]

    def read(self, sample: int, name: str) -> Tensor | None:
        """One tensor of one sample, or None where it was not recorded."""
        file, names = self._files[bisect.bisect_right(self._starts, sample) - 1]
        key = f"{sample}/{name}"
        found: Tensor | None = file.get_tensor(key) if key in names else None
        return found

    # ---------------------------------------------------------------- for a step

    def numbered(self, samples: Sequence[int | str]) -> list[int]:
        """Samples by number, of which some may be given by name.

        Raises:
            ValueError: a name that was not recorded.
        """
        for sample in samples:
            if isinstance(sample, str) and sample not in self.numbers:
                raise ValueError(
                    f"samples holds {sample!r}; allowed: numbers, or names that were recorded "
                    f"({len(self.numbers)} were)"
                )
        return [self.numbers[x] if isinstance(x, str) else x for x in samples]

    def check_samples(self, samples: Sequence[int], inputs: Inputs, tokens: Tokens) -> None:
        """Raises: ValueError: samples that are not recorded, or were recorded of other tokens."""
        if len(samples) != len(tokens.valid):
            raise ValueError(
                f"samples has {len(samples)} entries and the batch {len(tokens.valid)} samples; "
                "allowed: one number for each"
            )
        for b, sample in enumerate(samples):
            if not 0 <= sample < len(self):
                raise ValueError(f"samples holds {sample}; allowed: 0 to {len(self) - 1}")
            found = token_hash(inputs["input_ids"][b][tokens.valid[b]])
            if found != self.hashes[sample]:
                raise ValueError(
                    f"sample {sample} was recorded of other tokens than the batch's sample {b} has; "
                    "allowed: the same data, numbered in the order in which it was recorded"
                )

    def rows(self, samples: Sequence[int], tokens: Tokens) -> RowChoice:
        """The recorded rows of these samples, where they lie in this batch."""
        found, weights = [], []
        for b, sample in enumerate(samples):
            rows, weight = self.read(sample, "rows"), self.read(sample, "weight")
            assert rows is not None
            found.append(rows.long() + int(tokens.valid[b].to(torch.int8).argmax()))
            weights.append(weight)
        positions = torch.full((len(found), max(1, *map(len, found))), -1)
        for line, rows in zip(positions, found, strict=True):
            line[: len(rows)] = rows
        known = [w for w in weights if w is not None]
        weight = None
        if known:
            weight = torch.stack(known).expand(tokens.valid.shape).to(tokens.valid.device)
        return RowChoice(positions.to(tokens.valid.device), False, weight)

    def target(self, samples: Sequence[int], layer: int, device: torch.device) -> dict[str, Tensor]:
        """``target`` (and ``target_index``) of ``fused_attn_align_loss`` for one student layer."""
        values = [self.read(sample, f"layer_{layer}/values") for sample in samples]
        index = [self.read(sample, f"layer_{layer}/index") for sample in samples]
        maps = [v.float() for v in values if v is not None]
        if any(i is not None for i in index):  # dense samples beside sparse ones get an index too
            index = [
                torch.arange(m.shape[-1]).expand(m.shape) if i is None else i
                for i, m in zip(index, maps, strict=True)
            ]
        shape = [max(m.shape[d] for m in maps) for d in range(3)]
        target = _padded(maps, shape, 0.0)
        found = {"target": target}
        if index[0] is not None:
            found["target_index"] = _padded([i.long() for i in index if i is not None], shape, -1)
        if self.spec.compare == "pooled":
            found = {name: value.squeeze(2) for name, value in found.items()}
        return {name: value.to(device) for name, value in found.items()}

    def answer_logits(self, samples: Sequence[int], counts: Sequence[int]) -> AnswerLogits:
        """What the teacher predicted at the positions before labelled tokens, sample after sample.

        Args:
            counts: how many such positions each sample has in the batch.

        Raises:
            ValueError: none were recorded, or of a sample at another number of positions.
        """
        parts = []
        for sample, count in zip(samples, counts, strict=True):
            names = ("index", "log_probs", "rest")
            found = [self.read(sample, f"logits/{name}") for name in names]
            index, log_probs, rest = found
            if index is None or log_probs is None or rest is None:
                raise ValueError(
                    "the cache holds no logits; allowed: one that was recorded with logits"
                )
            if len(index) != count:
                raise ValueError(
                    f"sample {sample} was recorded at {len(index)} positions before labelled tokens "
                    f"and the batch has {count}; allowed: the same labels"
                )
            parts.append(AnswerLogits(index.long(), log_probs.float(), rest))
        return AnswerLogits(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class AnswerLogits(NamedTuple):
    """A teacher's next-token distributions at n positions: their k likeliest tokens and the rest.

    Attributes:
        tokens: [n, k] int64. log_probs: [n, k] float32 of them. rest: [n] float32, the logarithm
            of the mass of all other tokens, -inf where there are none.
    """

    tokens: Tensor
    log_probs: Tensor
    rest: Tensor


def _padded(maps: Sequence[Tensor], shape: Sequence[int], value: float) -> Tensor:
    """[B, *shape] of maps [G, N, C] that are no larger."""
    out = maps[0].new_full((len(maps), *shape), value)
    for line, map in zip(out, maps, strict=True):
        line[: map.shape[0], : map.shape[1], : map.shape[2]] = map
    return out
