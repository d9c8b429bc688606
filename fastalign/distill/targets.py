"""The teacher's targets of a stage as files: recorded once, so that training needs no teacher in memory.

For each sample: the likeliest tokens at the positions before labelled ones with the mass of the rest (logit
distillation), and the mean map of each matched layer's teacher layers (alignment). Samples are found by
their content, so that order, shuffling and passed-over samples are as they would be with the teacher.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import TeacherCache, match_layers
from ..models.cache import MANIFEST, file_hash, fingerprint
from ..models.record import Recorder, ShardWriter, check_facts
from ..models.tokens import choose_rows, read_tokens
from ..models.view import ModelView
from .data import Collator, ConversationDataset, SampleError
from .data.content import content_digest
from .heads import check_headless, tapped_head
from .loading import load_config_model, place_of
from .losses import predicting
from .objective import NOT_INPUTS
from .plain import RecipeError
from .recipe import Cache, Recipe, resolve
from .stages import Stage

SHARD_SAMPLES = 1024
#: How many samples are encoded to estimate the size.
SIZED_SAMPLES = 32

Progress = Callable[[int, int], None]


def cached_stages(recipe: Recipe) -> list[Stage]:
    """The stages whose teacher is recorded: all that need one, where the recipe has a cache."""
    if recipe.models.cache is None:
        return []
    return [stage for stage in recipe.stages if stage.losses.needs_teacher]


def cache_folder(recipe: Recipe, stage: Stage) -> Path:
    """Each stage has a folder of its own: losses, data and lengths differ."""
    return resolve(recipe, _cache(recipe).path) / stage.name


def open_cache(recipe: Recipe, stage: Stage, processor: Any) -> TeacherCache:
    """The stage's recorded targets.

    Raises:
        RecipeError: there are none, or they are of another teacher, processor, length, objective, ...
    """
    folder = cache_folder(recipe, stage)
    if not (folder / MANIFEST).is_file():
        raise RecipeError(
            f"models.cache: {folder} holds no finished recording of stage {stage.name}; allowed: run "
            "`fastalign cache` with this recipe first"
        )
    try:
        cache = TeacherCache(folder, verify=False)
        check_facts(folder, cache.manifest, settings(recipe, stage, processor))
    except ValueError as error:
        raise RecipeError(f"models.cache: {error}") from None
    return cache


def settings(recipe: Recipe, stage: Stage, processor: Any) -> dict[str, Any]:
    """All that a stage's targets depend on beside the samples, under the recipe's own names.

    Without the teacher's files at hand (a cache that was brought here) their digest is left out.
    """
    cache, losses, data = _cache(recipe), stage.losses, recipe.data_of(stage)
    view = ModelView("student", load_config_model(recipe, recipe.models.student))
    found: dict[str, Any] = {
        "teacher_dtype": recipe.models.teacher_dtype,
        "teacher_bits": recipe.models.teacher_bits,
        "precision": stage.precision,
        "processor": _processor_digest(processor),
        "template": data.template,
        "max_length": data.max_length,
        "cache_dtype": cache.dtype,
    }
    if losses.kd:
        found |= {
            "top_k": cache.top_k,
            "kd_temperature": losses.kd_temperature,
            "student_vocabulary": _vocabulary(view),
        }
    if losses.alignment:
        rule = losses.alignment_layers
        spec = losses.spec().to_dict()
        found |= {
            "student_layers": list(view.attentions),
            "alignment_layers": rule
            if isinstance(rule, str)
            else {str(layer): group for layer, group in rule.items()},
            "alignment_rows": losses.alignment_rows,
            # How units are summed up is no matter of the teacher's maps.
            "alignment_spec": {k: v for k, v in spec.items() if "reduction" not in k},
            "entries": cache.entries,
        }
        if ":" in (losses.alignment_rows or ""):
            found["seed"] = recipe.seed
    files = _teacher_digest(recipe)
    if files is not None:
        found["teacher_files"] = files
    return found


# ------------------------------------------------------------------------------- the size


@dataclass(frozen=True)
class Size:
    """What a recording will take, estimated from a few samples spread over the data.

    Attributes:
        samples: of the data set. maps, logits: mean bytes of a sample. free: bytes on the disk.
    """

    samples: int
    maps: float
    logits: float
    free: int

    @property
    def total(self) -> float:
        return self.samples * (self.maps + self.logits)

    def __str__(self) -> str:
        return (
            f"{self.samples:,} samples of about {_shown(self.maps + self.logits)} (maps "
            f"{_shown(self.maps)}, logits {_shown(self.logits)}): {_shown(self.total)}; "
            f"{_shown(self.free)} free"
        )


def estimate(recipe: Recipe, stage: Stage, data: ConversationDataset, collate: Collator) -> Size:
    """The size of a stage's recording: rows x columns and tokens of ``SIZED_SAMPLES`` samples.

    Raises:
        SourceError, SampleError: data without one usable sample.
    """
    cache, losses = _cache(recipe), stage.losses
    student = load_config_model(recipe, recipe.models.student)
    teacher = load_config_model(recipe, recipe.models.teacher)
    view, other = ModelView("student", student), ModelView("teacher", teacher)
    width = 4 if cache.dtype == "float32" else 2
    maps, logits = [], []
    count = min(SIZED_SAMPLES, len(data))
    for number in range(count):
        batch = collate([data[number * len(data) // count]])
        if losses.kd:
            top = min(cache.top_k, _vocabulary(view), _vocabulary(other))
            logits.append(int(predicting(batch["labels"]).sum()) * (top * (width + 4) + 8))
        if losses.alignment:
            tokens, spec = read_tokens(view, batch), losses.spec()
            rule = losses.alignment_rows or ("response" if spec.rows == "given" else spec.rows)
            rows = int((choose_rows(rule, tokens, batch).positions >= 0).sum())
            columns = int(tokens.visual.sum())
            entry = width
            if cache.entries is not None and cache.entries < columns:
                columns, entry = cache.entries, width + 4
            heads = 1 if spec.heads == "mean" else other.text_config.num_attention_heads
            lines = 1 if spec.compare == "pooled" else rows
            layers = len(_matching(losses.alignment_layers, view, other))
            maps.append(layers * heads * lines * columns * entry + 4 * rows)
    folder = cache_folder(recipe, stage)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return Size(len(data), _mean(maps), _mean(logits), free)


# ------------------------------------------------------------------------------- recording


def record_targets(
    recipe: Recipe,
    stage: Stage,
    processor: Any,
    teacher: nn.Module,
    data: ConversationDataset,
    progress: Progress = lambda done, all: None,
) -> tuple[TeacherCache, int]:
    """Record a stage's targets, or go on with it: (the cache, samples passed over this time).

    The teacher runs as it would in training: its type, the stage's precision, ``micro_batch`` samples.

    Args:
        teacher: on the device that it is to run on.
        progress: told (samples done, samples of the data) after each batch.

    Raises:
        ValueError: the folder holds (the beginning of) another recording.
        SampleError: a bad sample, where the data's on_error is "raise".
    """
    cache, losses = _cache(recipe), stage.losses
    student = load_config_model(recipe, recipe.models.student)
    view, other = ModelView("student", student), ModelView("teacher", teacher)
    recorder = Recorder(
        teacher,
        _matching(losses.alignment_layers, view, other) if losses.alignment else {},
        losses.spec(),
        losses.alignment_rows,
        entries=cache.entries,
        logits=cache.top_k if losses.kd else None,
        temperature=losses.kd_temperature,
        dtype=getattr(torch, cache.dtype),
        generator=torch.Generator(),
        vocabulary=min(_vocabulary(view), _vocabulary(other)),
    )
    facts = {
        "teacher": fingerprint(teacher),
        **recorder.facts(),
        **settings(recipe, stage, processor),
    }
    writer = ShardWriter(cache_folder(recipe, stage), facts, SHARD_SAMPLES)
    collate = Collator(processor.tokenizer.pad_token_id)
    device = next(teacher.parameters()).device
    passed_over = shard = 0
    for start in range(writer.mark, len(data), stage.micro_batch):
        if start == writer.mark or shard != len(writer.shards):  # so that a shard can be made again
            shard = len(writer.shards)
            assert recorder.generator is not None
            recorder.generator.manual_seed(recipe.seed + shard)
        end = min(start + stage.micro_batch, len(data))
        items: dict[str, dict[str, Any]] = {}
        for index in range(start, end):
            try:
                item = data.load(index)
            except SampleError:
                if data.on_error == "raise":
                    raise
                passed_over += 1
                continue
            name = content_digest(item)
            if name not in writer.contents:
                items[name] = item
        if items:
            batch = {
                k: v.to(device) if isinstance(v, Tensor) else v
                for k, v in collate(list(items.values())).items()
            }
            for name, (tokens, record) in zip(
                items, _record(recorder, other, batch, stage), strict=True
            ):
                writer.add(tokens, record, name)
        if writer.full:
            writer.flush(mark=end)
        progress(end, len(data))
    return writer.finish(), passed_over


def _record(
    recorder: Recorder, teacher: ModelView, batch: dict[str, Any], stage: Stage
) -> list[tuple[str, dict[str, Tensor]]]:
    """One batch; with ``fused_head`` logits exist at labelled positions alone, a few at a time."""
    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    device = next(teacher.model.parameters()).device
    with ExitStack() as stack:
        bf16 = stage.precision == "bf16"
        stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16))
        if stage.fused_head:
            tap = stack.enter_context(tapped_head("teacher", teacher.model, headless=True))

            def check(module: nn.Module, arguments: Any, output: Any) -> None:
                check_headless(tap, output.logits)

            handle = teacher.model.register_forward_hook(check)
            stack.callback(handle.remove)
            recorder.head = lambda hidden: hidden @ tap.weight.detach().to(hidden.dtype).T
        return recorder.record({**inputs, "labels": batch["labels"], "use_cache": False})


# ------------------------------------------------------------------------------- parts


def _cache(recipe: Recipe) -> Cache:
    assert recipe.models.cache is not None
    return recipe.models.cache


def _matching(rule: Any, student: ModelView, teacher: ModelView) -> dict[int, tuple[int, ...]]:
    return match_layers(rule, list(student.attentions), list(teacher.attentions))


def _vocabulary(view: ModelView) -> int:
    """Rows of the output head."""
    return int(view.model.get_output_embeddings().out_features)


def _teacher_digest(recipe: Recipe) -> str | None:
    """sha256 over config.json and every safetensors file of the teacher; None: it is not on this disk."""
    return _digest_of(place_of(recipe, recipe.models.teacher))


@lru_cache(maxsize=4)  # every stage asks, and a large teacher takes a while
def _digest_of(place: str) -> str | None:
    folder = Path(place)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(place, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            return None
    return _files_digest([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def _processor_digest(processor: Any) -> str:
    """sha256 over the files that it saves, but for whether it was loaded offline, which they say, too."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        config = Path(folder) / "tokenizer_config.json"
        if config.is_file():
            values = json.loads(config.read_text())
            values.pop("local_files_only", None)
            config.write_text(json.dumps(values, sort_keys=True))
        return _files_digest(sorted(p for p in Path(folder).rglob("*") if p.is_file()))


def _files_digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_hash(file)}\n".encode())
    return digest.hexdigest()


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _shown(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
