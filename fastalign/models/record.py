"""Recording a teacher's targets: one forward without gradients, sample by sample, into shards.

A shard appears whole or not at all, and tells what it holds, so that a recording goes on where it was cut
off. The manifest comes last: no manifest, no cache (``cache.TeacherCache``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import AlignSpec, resolve_spec
from .cache import FORMAT, MANIFEST, TeacherCache, file_hash, fingerprint, order_hash, token_hash
from .layer import LayerState, first_rows, materialise, pool_rows
from .matching import Matching
from .observe import observe
from .tokens import IGNORED_LABEL, Inputs, RowChoice, Rows, Tokens, read_tokens
from .view import ModelView

#: What a recording in progress is of; the manifest takes its place.
BEGUN = "recording.json"
#: A shard is written when it holds so much, or so many samples.
SHARD_BYTES = 2**28
#: Positions whose logits are formed at once.
LOGIT_ROWS = 64


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
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    shard_samples: int = 1024,
    generator: torch.Generator | None = None,
    names: Callable[[Inputs], Sequence[str]] | None = None,
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
        logits: keep so many largest log-probabilities at each position that predicts a labelled token,
            and the logarithm of the mass of all others. None: none.
        temperature: divides the logits before their softmax.
        dtype: of what is stored (maps and log-probabilities): float32, float16 or bfloat16.
        shard_samples: samples in a file.
        names: gives the samples of a batch their names, by which ``step(samples=...)`` may ask for them.
            Hashes of text and pictures tell apart what has the same tokens. None: numbers alone.

    Raises:
        ValueError: a directory with files in it, arguments out of range, names that are not one a sample
            or were given before, and what reading a batch raises.
    """
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"path is {str(path)!r}, which holds files; allowed: a new directory")
    recorder = Recorder(
        teacher,
        {int(s): tuple(t) for s, t in sorted(matching.items())},
        resolve_spec(spec),
        rows,
        entries=entries,
        logits=logits,
        temperature=temperature,
        dtype=dtype,
        generator=generator,
    )
    if shard_samples < 1:
        raise ValueError(f"shard_samples is {shard_samples!r}; allowed: at least 1")
    writer = ShardWriter(path, {"teacher": fingerprint(teacher), **recorder.facts()}, shard_samples)
    for batch in batches:
        found = recorder.record(batch)
        called: Sequence[str | None] = [None] * len(found) if names is None else names(batch)
        if len(called) != len(found):
            raise ValueError(
                f"names gives {len(called)} names for {len(found)} samples; allowed: one for each"
            )
        for (tokens, record), name in zip(found, called, strict=True):
            if name in writer.contents:
                raise ValueError(
                    f"names gives {name!r} twice; allowed: another name for each sample"
                )
            writer.add(tokens, record, name)
            if writer.full:
                writer.flush()
    return writer.finish()


@dataclass
class Recorder:
    """What is kept of a teacher's forward. See ``record_teacher`` for the arguments.

    Args:
        vocabulary: only the first so many logits count (of two vocabularies, the shared prefix). None:
            all; afterwards their number.
        head: makes logits [n, V] of n positions' ``output.logits``, where the model's forward left its
            head out. None: they are logits.
    """

    teacher: nn.Module
    matching: Matching
    spec: AlignSpec
    rows: Rows | None = None
    entries: int | None = None
    logits: int | None = None
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    generator: torch.Generator | None = None
    vocabulary: int | None = None
    head: Callable[[Tensor], Tensor] | None = None
    _chosen: Rows = field(init=False, default="all")

    def __post_init__(self) -> None:
        spec = self.spec
        if self.matching and (spec.sink_sigma is not None or spec.heads == "mix"):
            raise ValueError(
                f"spec has sink_sigma={spec.sink_sigma} and heads={spec.heads!r}; allowed in a "
                "cache: sink_sigma=None (the filter needs the teacher's whole map) and heads 'mean' "
                "or 'each'"
            )
        for name in ("entries", "logits"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value!r}; allowed: at least 1")
        if self.rows is None:
            self._chosen = "response" if spec.rows == "given" else spec.rows
        else:
            self._chosen = self.rows
        if self.vocabulary is None:
            head = ModelView("teacher", self.teacher).model.get_output_embeddings()
            self.vocabulary = head.out_features

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "spec": self.spec.to_dict(),
            "matching": {str(s): list(t) for s, t in self.matching.items()},
            "rows": self._chosen if isinstance(self._chosen, str) else "custom",
            "entries": self.entries,
            "logits": self.logits,
            "temperature": self.temperature,
            "vocabulary": self.vocabulary,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def record(self, inputs: Inputs) -> list[tuple[str, dict[str, Tensor]]]:
        """(token hash, tensors on the CPU) of each sample of a batch."""
        maps: dict[int, Tensor] = {}
        seen: dict[str, Any] = {}
        pooled = self.spec.compare == "pooled"

        def see(layer: int, state: LayerState, choice: RowChoice, tokens: Tokens) -> None:
            map = materialise(state, choice.positions, tokens.visual, self.spec)
            if pooled:
                map = pool_rows(map, state, choice.positions, tokens.visual).unsqueeze(2)
            else:
                map = first_rows(map, choice.positions)
            maps[layer], seen["choice"] = map.cpu(), choice

        used = sorted({t for group in self.matching.values() for t in group})
        output = observe(self.teacher, inputs, used, self._chosen, see, self.generator)
        tokens = read_tokens(ModelView("teacher", self.teacher), inputs)
        choice: RowChoice | None = seen.get("choice")
        found = []
        for b, valid in enumerate(tokens.valid):
            first = int(valid.to(torch.int8).argmax())
            record: dict[str, Tensor] = {}
            if choice is not None:
                positions = choice.positions[b][choice.positions[b] >= 0]
                record["rows"] = (positions - first).to(torch.int32)
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

    def _logits(self, output: Tensor, labels: Tensor, first: int) -> dict[str, Tensor]:
        at = (labels != IGNORED_LABEL).nonzero().flatten()
        at = at[at > 0]  # position i is predicted by the logits of i - 1
        blocks = [self._top(output[block - 1]) for block in at.split(LOGIT_ROWS)]
        names = ("logits/log_probs", "logits/index", "logits/rest")
        joined = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        return {
            "logits/positions": (at - first).to(torch.int32),
            **dict(zip(names, joined, strict=True)),
        }

    def _top(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """([n, k] log-probabilities, their tokens, [n] log of the mass of all others, -inf for none)."""
        assert self.logits is not None
        logits = output if self.head is None else self.head(output)
        log_p = (logits[:, : self.vocabulary].float() / self.temperature).log_softmax(-1)
        values, index = log_p.topk(min(self.logits, log_p.shape[-1]), dim=-1)
        rest = log_p.scatter(-1, index, -torch.inf).logsumexp(-1)
        return values.to(self.dtype), index.to(torch.int32), rest


class ShardWriter:
    """Shards of at most ``size`` samples in a folder, which may hold the beginning of this recording.

    Args:
        facts: what is recorded; equal to those of the beginning, if there is one.
        size: samples in a file.

    Attributes:
        hashes: token hashes of the samples that are there. contents: their other names, where given.
        shards: of the manifest. mark: of the last shard, 0 without one.

    Raises:
        ValueError: the beginning of another recording; the message names the first fact that differs.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], size: int) -> None:
        self.path, self.size = path, size
        self.facts = json.loads(json.dumps(dict(facts)))
        self.held: dict[str, Tensor] = {}
        self.hashes: list[str] = []
        self.contents: dict[str, int] = {}
        self.shards: list[dict[str, Any]] = []
        self.mark = self._bytes = 0
        path.mkdir(parents=True, exist_ok=True)
        begun = path / BEGUN
        if begun.is_file():
            check_facts(path, json.loads(begun.read_text()), self.facts)
            self._go_on()
        else:
            _write_whole(begun, json.dumps(self.facts, indent=1).encode())

    def _go_on(self) -> None:
        from safetensors import safe_open

        while (file := self._file(len(self.shards))).is_file():
            with safe_open(file, framework="pt") as shard:
                told = json.loads(shard.metadata()["samples"])
            for tokens, content in told["samples"]:
                self._name(tokens, content)
            self.shards.append(_entry(file, len(told["samples"])))
            self.mark = told["mark"]

    def _file(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.safetensors"

    def _name(self, tokens: str, content: str | None) -> None:
        if content is not None:
            self.contents[content] = len(self.hashes)
        self.hashes.append(tokens)

    def add(self, tokens: str, record: Mapping[str, Tensor], content: str | None = None) -> None:
        """Hold a sample until ``flush``."""
        sample = len(self.hashes)
        self._name(tokens, content)
        self.held.update({f"{sample}/{name}": value for name, value in record.items()})
        self._bytes += sum(value.numel() * value.element_size() for value in record.values())

    @property
    def full(self) -> bool:
        """Whether what is held should be written."""
        return len(self.hashes) - self._written >= self.size or self._bytes >= SHARD_BYTES

    @property
    def _written(self) -> int:
        return sum(shard["samples"] for shard in self.shards)

    def flush(self, mark: int = 0) -> None:
        """Write what is held; ``mark``: where its source goes on behind it."""
        from safetensors.torch import save

        first = self._written
        samples = len(self.hashes) - first
        if not samples:
            return
        names = {number: content for content, number in self.contents.items() if number >= first}
        told = {
            "samples": [[self.hashes[i], names.get(i)] for i in range(first, len(self.hashes))],
            "mark": mark,
        }
        file = self._file(len(self.shards))
        _write_whole(file, save(self.held, metadata={"samples": json.dumps(told)}))
        self.shards.append(_entry(file, samples))
        self.held, self.mark, self._bytes = {}, mark, 0

    def finish(self) -> TeacherCache:
        """Write the rest and the manifest."""
        self.flush(self.mark)
        manifest = {
            "format": FORMAT,
            **self.facts,
            "shards": self.shards,
            "samples": self.hashes,
            "contents": self.contents,
            "order_sha256": order_hash(self.hashes),
        }
        _write_whole(self.path / MANIFEST, json.dumps(manifest, indent=1).encode())
        (self.path / BEGUN).unlink(missing_ok=True)
        return TeacherCache(self.path, verify=False)


def check_facts(path: Path, made: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises: ValueError: a recording of something else; names the first entry that differs."""
    for name, value in json.loads(json.dumps(dict(wanted))).items():
        if made.get(name) != value:
            raise ValueError(
                f"{path} was recorded with {name} {made.get(name)!r}, and {value!r} is asked for; "
                "allowed: the same, or another folder"
            )


def _entry(file: Path, samples: int) -> dict[str, Any]:
    return {
        "file": file.name,
        "samples": samples,
        "bytes": file.stat().st_size,
        "sha256": file_hash(file),
    }


def _write_whole(path: Path, content: bytes) -> None:
    """Flushed and renamed: the file is there in full or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
