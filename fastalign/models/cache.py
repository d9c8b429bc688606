"""The teacher's targets, recorded once: training then needs no teacher in memory.

A directory of safetensors shards and a ``manifest.json`` that says what they are: which teacher (hashes
of its configuration and of its weights), which objective, which layers and rows, the samples in their
order with a hash of the tokens of each, and a checksum of each shard. Whatever does not fit what it is
used for is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import AlignSpec, resolve_spec
from .layer import LayerState, first_rows, materialise, pool_rows
from .matching import Matching
from .observe import observe
from .tokens import Inputs, RowChoice, Rows, Tokens
from .view import ModelView

FORMAT = 1
MANIFEST = "manifest.json"


def record_teacher(
    path: str | Path,
    teacher: nn.Module,
    batches: Iterable[Inputs],
    *,
    matching: Mapping[int, Sequence[int]],
    spec: AlignSpec | str = "compodistill",
    rows: Rows | None = None,
    entries: int | None = None,
    logits: int | None = None,
    dtype: torch.dtype = torch.float32,
    shard_samples: int = 1024,
    generator: torch.Generator | None = None,
) -> TeacherCache:
    """Run the teacher over ``batches`` and store its targets, sample by sample.

    Args:
        path: a directory that does not exist yet, or is empty.
        batches: the processor's batches, in the order in which samples are numbered from 0.
        matching: student layer -> teacher layers (``match_layers`` makes one); the mean of their maps
            is stored.
        spec: what the maps will be compared by; heads="mean" or "each". With compare="pooled", one
            vector a layer is stored, else one a row.
        rows: see ``choose_rows``; None: the spec's own. Sampled rows are drawn here, once.
        entries: keep only so many largest entries of each row (or pooled vector). None: all.
        logits: keep so many largest logits of each labelled position, and the log-sum-exp of all.
        dtype: of the stored maps: float32, float16 or bfloat16.
        shard_samples: samples in a file.

    Raises:
        ValueError: a directory with files in it, arguments out of range, and what reading a batch raises.
    """
    path, spec = Path(path), resolve_spec(spec)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"path is {str(path)!r}, which holds files; allowed: a new directory")
    if spec.sink_sigma is not None or spec.heads == "mix":
        raise ValueError(
            f"spec has sink_sigma={spec.sink_sigma} and heads={spec.heads!r}; allowed in a cache: "
            "sink_sigma=None (the filter needs the teacher's whole map) and heads 'mean' or 'each'"
        )
    for name, value in (("entries", entries), ("logits", logits), ("shard_samples", shard_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value!r}; allowed: at least 1")
    if rows is None:
        rows = "response" if spec.rows == "given" else spec.rows
    path.mkdir(parents=True, exist_ok=True)
    writer = _Writer(path, shard_samples)
    groups: Matching = {int(s): tuple(t) for s, t in sorted(matching.items())}
    recorder = _Recorder(teacher, groups, spec, rows, entries, logits, dtype, generator)
    for batch in batches:
        for tokens, record in recorder.record(batch):
            writer.add(tokens, record)
    writer.finish(
        {
            "teacher": fingerprint(teacher),
            "spec": spec.to_dict(),
            "matching": {str(s): list(t) for s, t in groups.items()},
            "rows": rows if isinstance(rows, str) else "custom",
            "entries": entries,
            "logits": logits,
        }
    )
    return TeacherCache(path)


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


@dataclass
class _Recorder:
    teacher: nn.Module
    matching: Matching
    spec: AlignSpec
    rows: Rows
    entries: int | None
    logits: int | None
    dtype: torch.dtype
    generator: torch.Generator | None

    def record(self, inputs: Inputs) -> list[tuple[str, dict[str, Tensor]]]:
        """(token hash, tensors) of each sample of a batch."""
        maps: dict[int, Tensor] = {}
        seen: dict[str, Any] = {}
        pooled = self.spec.compare == "pooled"

        def see(layer: int, state: LayerState, choice: RowChoice, tokens: Tokens) -> None:
            map = materialise(state, choice.positions, tokens.visual, self.spec)
            if pooled:
                map = pool_rows(map, state, choice.positions, tokens.visual).unsqueeze(2)
            else:
                map = first_rows(map, choice.positions)
            maps[layer], seen["choice"], seen["tokens"] = map.cpu(), choice, tokens

        used = sorted({t for group in self.matching.values() for t in group})
        output = observe(self.teacher, inputs, used, self.rows, see, self.generator)
        choice, tokens = seen["choice"], seen["tokens"]
        found = []
        for b, valid in enumerate(tokens.valid):
            first = int(valid.to(torch.int8).argmax())
            positions = choice.positions[b][choice.positions[b] >= 0]
            record = {"rows": (positions - first).to(torch.int32)}
            if choice.weight is not None:
                record["weight"] = choice.weight[b, :1].clone()
            count = 1 if pooled else len(positions)
            columns = int(tokens.visual[b].sum())
            for student, group in self.matching.items():
                mean = torch.stack([maps[t][b, :, :count, :columns] for t in group]).mean(0)
                record.update(self._stored(f"layer_{student}", mean))
            if self.logits is not None:
                record.update(self._logits(output.logits[b], inputs["labels"][b], first))
            ids = inputs["input_ids"][b][valid]
            found.append((token_hash(ids), {k: v.cpu().contiguous() for k, v in record.items()}))
        return found

    def _stored(self, name: str, map: Tensor) -> dict[str, Tensor]:
        if self.entries is None or self.entries >= map.shape[-1]:
            return {f"{name}/values": map.to(self.dtype)}
        values, index = map.topk(self.entries, dim=-1)
        return {f"{name}/values": values.to(self.dtype), f"{name}/index": index.to(torch.int32)}

    def _logits(self, logits: Tensor, labels: Tensor, first: int) -> dict[str, Tensor]:
        assert self.logits is not None
        at = (labels != -100).nonzero().flatten()
        at = at[at > 0]  # position i is predicted by the logits of i - 1
        chosen = logits[at - 1].float()
        values, index = chosen.topk(min(self.logits, chosen.shape[-1]), dim=-1)
        return {
            "logits/positions": (at - first).to(torch.int32),
            "logits/values": values,
            "logits/index": index.to(torch.int32),
            "logits/logsumexp": chosen.logsumexp(-1),
        }


class _Writer:
    """Shards of ``size`` samples, and the manifest at the end: no manifest, no cache."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.held: dict[str, Tensor] = {}
        self.hashes: list[str] = []
        self.shards: list[dict[str, Any]] = []

    def add(self, tokens: str, record: Mapping[str, Tensor]) -> None:
        sample = len(self.hashes)
        self.hashes.append(tokens)
        self.held.update({f"{sample}/{name}": value for name, value in record.items()})
        if len(self.hashes) % self.size == 0:
            self._flush()

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if not self.held:
            return
        file = self.path / f"shard-{len(self.shards):05d}.safetensors"
        save_file(self.held, file)
        first = sum(shard["samples"] for shard in self.shards)
        self.shards.append(
            {"file": file.name, "samples": len(self.hashes) - first, "sha256": _file_hash(file)}
        )
        self.held = {}

    def finish(self, facts: dict[str, Any]) -> None:
        self._flush()
        manifest = {
            "format": FORMAT,
            **facts,
            "shards": self.shards,
            "samples": self.hashes,
            "order_sha256": _order_hash(self.hashes),
        }
        (self.path / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _order_hash(hashes: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _file_hash(path: Path) -> str:
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
        verify: read every shard and compare its checksum.

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
        if _order_hash(self.hashes) != self.manifest["order_sha256"]:
            raise ValueError("the manifest's samples do not have its order_sha256: it was edited")
        if teacher is not None:
            self._check_teacher(teacher)
        if verify:
            self._check_shards()
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

    def _check_shards(self) -> None:
        for shard in self.manifest["shards"]:
            file = self.path / shard["file"]
            if not file.is_file() or _file_hash(file) != shard["sha256"]:
                raise ValueError(
                    f"{file.name} is missing or does not have the checksum of the manifest; allowed: "
                    "the files that record_teacher wrote"
                )

    @cached_property
    def _files(self) -> dict[str, Any]:
        from safetensors import safe_open

        return {
            shard["file"]: safe_open(self.path / shard["file"], framework="pt")
            for shard in self.manifest["shards"]
        }

    def read(self, sample: int, name: str) -> Tensor | None:
        """One tensor of one sample, or None where it was not recorded."""
        number = sum(start <= sample for start in self._starts) - 1
        file = self._files[self.manifest["shards"][number]["file"]]
        key = f"{sample}/{name}"
        found: Tensor | None = file.get_tensor(key) if key in file.keys() else None  # noqa: SIM118
        return found

    # ---------------------------------------------------------------- for a step

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

    def top_logits(self, sample: int) -> dict[str, Tensor]:
        """One sample's recorded logits, for a distillation loss over them.

        Returns:
            positions [N] of the labelled tokens, counted from the sample's first token; values and
            index [N, k] of the largest logits that predict them; logsumexp [N] over the vocabulary.

        Raises:
            ValueError: none were recorded.
        """
        names = ("positions", "values", "index", "logsumexp")
        found = {name: self.read(sample, f"logits/{name}") for name in names}
        if any(value is None for value in found.values()):
            raise ValueError("the cache holds no logits; allowed: record_teacher(..., logits=k)")
        return {name: value for name, value in found.items() if value is not None}


def _padded(maps: Sequence[Tensor], shape: Sequence[int], value: float) -> Tensor:
    """[B, *shape] of maps [G, N, C] that are no larger."""
    out = maps[0].new_full((len(maps), *shape), value)
    for line, map in zip(out, maps, strict=True):
        line[: map.shape[0], : map.shape[1], : map.shape[2]] = map
    return out
