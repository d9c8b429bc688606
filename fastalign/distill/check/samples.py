"""Every sample of every stage, as training would load it: what is bad, how long they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...models import TeacherCache
from ...models.tokens import read_tokens
from ..data import ConversationDataset, SampleError, TemplateError
from ..data.content import content_digest
from ..data.records import SourceError
from ..loading import load_data, load_stream
from ..losses import IGNORE_INDEX
from ..memory.models import FakeModels, runs_teacher
from ..recipe import Recipe
from ..stages import Data, Stage
from .features import ImageTokens
from .outcome import Part

#: Called with a source's name and number of samples; gives what is called after each.
Progress = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True)
class Size:
    """A good sample: its number, tokens as they are trained on, those of its images, labelled ones."""

    index: int
    tokens: int
    visual: int
    labelled: int


@dataclass
class Source:
    """What was found in one source of data.

    Attributes:
        stages: that read it.
        length, looked_at: samples there, and of these looked at.
        bad: (file and sample, reason).
        sizes: of the good samples.
        text_only, truncated: how many of the good ones.
        wrong: what is wrong with all of it (no such file, a template that does not fit).
        recorded: stage -> contents of samples whose targets were recorded, where it trains from them.
    """

    name: str
    data: Data
    stages: list[str]
    length: int = 0
    looked_at: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    text_only: int = 0
    truncated: int = 0
    wrong: str = ""
    recorded: dict[str, Mapping[str, int]] = field(default_factory=dict)
    dataset: ConversationDataset | None = None

    def figures(self) -> dict[str, Any]:
        """Plain values: counts and quantiles."""
        images = [s.visual for s in self.sizes if s.visual]
        return {
            "source": self.name,
            "stages": self.stages,
            "samples": self.length,
            "looked_at": self.looked_at,
            "bad": len(self.bad),
            "text_only": self.text_only,
            "truncated": self.truncated,
            "text_tokens": quantiles([s.tokens - s.visual for s in self.sizes]),
            "visual_tokens": quantiles(images),
            "labelled_tokens": quantiles([s.labelled for s in self.sizes]),
            "tokens": quantiles([s.tokens for s in self.sizes]),
        }


def quantiles(values: list[int]) -> dict[str, int]:
    """Median, 95 % and maximum, each a value that occurs; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    at = {"median": 0.5, "p95": 0.95, "max": 1.0}
    return {
        name: ordered[max(0, -int(-share * len(ordered) // 1) - 1)] for name, share in at.items()
    }


def check_samples(
    recipe: Recipe,
    processor: Any,
    models: FakeModels,
    caches: Mapping[str, TeacherCache] | None = None,
    *,
    samples: int | None = None,
    progress: Progress | None = None,
) -> tuple[Part, list[Source]]:
    """Load every sample (or the first ``samples``) of every stage's data, each source once.

    The part's problems have what holds for a whole source, and each bad sample with its reason.

    Args:
        caches: stage -> the teacher's recorded targets, where it trains from them.
    """
    part = Part("data")
    found: list[Source] = []
    for stage in recipe.stages:
        data, cache = recipe.data_of(stage), (caches or {}).get(stage.name)
        same = next((s for s in found if s.data == data), None)
        if same is not None:
            same.stages.append(stage.name)
        else:
            same = Source(data.path, data, [stage.name])
            found.append(same)
            _read(recipe, stage, processor, same, samples)
        if cache is not None:
            same.recorded[stage.name] = cache.numbers
    for source in found:
        if source.dataset is not None:
            _Reader(recipe, source, models, progress).go(samples)
    for source in found:
        entry = f"data of {', '.join(source.stages)}"
        if source.wrong:
            part.problems.append(f"{entry}: {source.wrong}")
        elif not source.sizes:
            part.problems.append(
                f"{entry}: {source.name} has no good sample; allowed: at least one"
            )
        _compare_losses(recipe, source, entry, part)
        part.problems += [f"{where}: {reason}" for where, reason in source.bad]
        if samples is not None and source.data.streaming and not source.wrong:
            part.notes.append(
                f"{entry}: only its first {source.looked_at:,} samples were looked at"
            )
        elif source.looked_at < source.length and not source.wrong:
            part.notes.append(
                f"{entry}: only {source.looked_at:,} of {source.length:,} samples were looked at"
            )
        if source.truncated:
            part.notes.append(
                f"{entry}: {source.truncated:,} samples are cut to max_length {source.data.max_length}"
            )
    part.facts["sources"] = [source.figures() for source in found]
    part.facts["bad_samples"] = [
        {"sample": where, "reason": reason} for source in found for where, reason in source.bad
    ]
    part.summary = ", ".join(
        f"{sum(values):,} {what}"
        for what, values in (
            ("samples", [s.looked_at for s in found]),
            ("bad", [len(s.bad) for s in found]),
            ("text-only", [s.text_only for s in found]),
            ("truncated", [s.truncated for s in found]),
        )
    )
    return part, found


def _read(
    recipe: Recipe, stage: Stage, processor: Any, source: Source, samples: int | None
) -> None:
    """The source itself, through the functions that training opens it with."""
    try:
        if source.data.streaming and samples is not None:  # the file may be larger than memory
            stream = load_stream(recipe, stage, processor)
            dataset = stream.beginning(min(samples, stream.limit or samples))
        else:
            dataset = load_data(recipe, stage, processor)
        source.name, source.length = dataset.source, len(dataset)
    except (SourceError, TemplateError, OSError, ValueError) as error:
        source.wrong = str(error)
        return
    source.dataset = dataset
    if not source.length:
        source.wrong = f"{source.name} has no samples; allowed: at least one"
    elif not dataset.image_root.is_dir():
        source.wrong = f"image_root is {str(dataset.image_root)!r}, which is no folder"


def _compare_losses(recipe: Recipe, source: Source, entry: str, part: Part) -> None:
    """Terms and parts that need images, where there are none."""
    if not source.sizes or source.text_only < len(source.sizes):
        return
    for stage in recipe.stages:
        if stage.name not in source.stages:
            continue
        needing = [n for n in ("alignment", "visual_kd", "relation") if getattr(stage.losses, n)]
        needing += [p for p in ("projector", "vision") if p in stage.trains]
        if needing:
            part.problems.append(
                f"{entry}: no sample that was looked at has an image, and {', '.join(needing)} of stage "
                f"{stage.name} can learn nothing without; allowed: samples with images"
            )


@dataclass(frozen=True)
class _Loaded:
    """What a worker gives back: no pixels, only their shapes."""

    index: int
    whole: int
    lists: dict[str, list[int]]
    shapes: dict[str, tuple[int, ...]]
    small: dict[str, Any]
    content: str | None


@dataclass(frozen=True)
class _Bad:
    where: str
    reason: str
    fatal: bool = False


class _Loads(Dataset[Any]):
    """The samples by number, or why they are bad; indexed in a worker."""

    def __init__(self, dataset: ConversationDataset, count: int, contents: bool) -> None:
        self.dataset, self.count, self.contents = dataset, count, contents

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> _Loaded | _Bad:
        try:
            record = self.dataset.record(index)
            whole = self.dataset.encoder.whole(record, self.dataset.images(record))
            item = self.dataset.encoder.cut(whole, record.where)
        except SampleError as error:
            return _Bad(error.where, error.reason)
        except TemplateError as error:
            return _Bad(f"{self.dataset.source}, sample {index}", str(error), fatal=True)
        # The processor is the library's: what it raises of odd pictures or texts would end the run.
        except Exception as error:
            where = f"{self.dataset.source}, sample {index}"
            return _Bad(where, f"the processor fails: {type(error).__name__}: {error}")
        tensors = {name: value for name, value in item.items() if isinstance(value, Tensor)}
        return _Loaded(
            index,
            len(whole["input_ids"]),
            {name: value for name, value in item.items() if isinstance(value, list)},
            {name: tuple(t.shape) for name, t in tensors.items() if t.is_floating_point()},
            {name: t.numpy() for name, t in tensors.items() if not t.is_floating_point()},
            content_digest(item) if self.contents else None,
        )


class _Reader:
    """Goes through one source."""

    def __init__(
        self, recipe: Recipe, source: Source, models: FakeModels, progress: Progress | None
    ) -> None:
        self.source = source
        self.progress = progress
        reading = [stage for stage in recipe.stages if stage.name in source.stages]
        teacher = any(runs_teacher(recipe, stage) for stage in reading)
        self.image_tokens = ImageTokens(models, teacher)
        self.views = self.image_tokens.views
        self.rows = {
            role: int(view.model.get_input_embeddings().weight.shape[0])
            for role, view in self.views.items()
        }
        self.positions = {
            role: getattr(view.text_config, "max_position_embeddings", None)
            for role, view in self.views.items()
        }

    def go(self, samples: int | None) -> None:
        source = self.source
        if source.wrong:
            return
        count = source.length if samples is None else min(samples, source.length)
        advance = self.progress(source.name, count) if self.progress else lambda: None
        for found in self._loaded(count):
            source.looked_at += 1
            advance()
            if isinstance(found, _Bad):
                if found.fatal:
                    source.wrong = f"{found.where}: {found.reason}"
                    return
                source.bad.append((found.where, found.reason))
                continue
            reason = self._look(found)
            if reason:
                source.bad.append((f"{source.name}, sample {found.index}", reason))

    def _loaded(self, count: int) -> Iterator[_Loaded | _Bad]:
        assert self.source.dataset is not None
        loads = _Loads(self.source.dataset, count, bool(self.source.recorded))
        workers = min(self.source.data.workers, count)
        yield from DataLoader(loads, batch_size=None, num_workers=workers, collate_fn=_same)

    def _look(self, loaded: _Loaded) -> str:
        """Count the sample in, or say what is wrong with it."""
        inputs: dict[str, Any] = {n: torch.tensor([ids]) for n, ids in loaded.lists.items()}
        inputs |= {n: torch.empty(shape, device="meta") for n, shape in loaded.shapes.items()}
        inputs |= {n: torch.as_tensor(value) for n, value in loaded.small.items()}
        ids = inputs["input_ids"]
        try:
            tokens = {role: read_tokens(view, inputs) for role, view in self.views.items()}
            made = {role: self.image_tokens(role, tokens[role], inputs) for role in self.views}
        except ValueError as error:
            return str(error)
        counts = {role: int(t.visual.sum()) for role, t in tokens.items()}
        if len(set(counts.values())) > 1:
            return (
                f"has {counts['student']} image tokens for the student and {counts['teacher']} for the "
                "teacher; allowed: the same, as both models get one batch (resample='area' is an option "
                "of AttentionAlignment in a loop of one's own, not of a recipe)"
            )
        for role, number in made.items():
            if number is not None and number != counts[role]:
                return (
                    f"has {counts[role]} image tokens and the {role} makes {number} of its images; "
                    "allowed: equal numbers, as both models get the student's batch"
                )
        length = ids.shape[1]
        for role in self.views:
            if int(ids.max()) >= self.rows[role]:
                return f"has token {int(ids.max())}, and the {role} knows {self.rows[role]:,}"
            most = self.positions[role]
            if most is not None and length > most:
                return (
                    f"has {length} tokens and the {role} at most {most} positions; allowed: a smaller "
                    "max_length, a shorter sample"
                )
        for stage, contents in self.source.recorded.items():
            if loaded.content not in contents:
                return (
                    f"is not among the recorded targets of stage {stage} (its text, image, template or "
                    "length is another); allowed: the data that were recorded"
                )
        labels = inputs["labels"]
        size = Size(
            loaded.index, length, counts["student"], int((labels[:, 1:] != IGNORE_INDEX).sum())
        )
        self.source.sizes.append(size)
        self.source.text_only += not size.visual
        self.source.truncated += loaded.whole > length
        return ""


def _same(value: Any) -> Any:
    """A loader's items as they are."""
    return value
