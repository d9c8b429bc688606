"""``fastalign analyze``: models and data from files, batch by batch, to a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .analysis.batches import NOT_INPUTS, answered, move
from .analysis.measure import Measurement
from .analysis.mixing import Mix, mixed_forward
from .analysis.overlays import example
from .analysis.pictures import Example
from .analysis.report import write_report
from .distill.data import Collator
from .distill.data.conversation import Encoder
from .distill.data.dataset import ConversationDataset
from .distill.data.records import read_records
from .distill.data.show import samples_to_show

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is compared; see ``fastalign analyze --help``."""

    teacher: str
    students: Mapping[str, str]
    data: Path
    samples: int = 256
    batch_size: int = 16
    layers: str = "uniform"
    template: str | None = None
    examples: int = 6
    bins: int = 5
    grid: bool = True
    mixes: tuple[Mix, ...] = ()
    device: str = "cpu"


def analyse(plan: Plan, out: Path, say: Say = print) -> list[Path]:
    """Run the plan and write the report; returns the files.

    Raises:
        OSError, ValueError: models or data that cannot be read or do not fit each other.
        SampleError: a sample that cannot be used.
    """
    device = torch.device(plan.device)
    models = {
        name: load(folder, device)
        for name, folder in {"teacher": plan.teacher, **plan.students}.items()
    }
    data, collate = load_data(plan)
    students = {name: model for name, model in models.items() if name != "teacher"}
    measurement = Measurement(models["teacher"], students, plan.layers, grid=plan.grid)
    right: dict[str, dict[str, list[bool]]] = {name: {} for name in students}
    count = len(data)
    for start in range(0, count, plan.batch_size):
        items = [data.load(i) for i in range(start, min(start + plan.batch_size, count))]
        batch = move(collate(items), device)
        measurement.add(batch)
        inputs = {k: v for k, v in batch.items() if k not in NOT_INPUTS}
        for name, model in students.items():
            for mix in plan.mixes:
                logits = mixed_forward(model, models["teacher"], inputs, mix).logits
                found = right[name].setdefault(f"{mix.weight:g}", [])
                found.extend(answered(logits, batch["labels"]).tolist())
        say(f"{measurement.samples} of {count} samples")
    summary = measurement.summary(plan.bins)
    if plan.mixes:
        summary["mixing"] = {
            name: {weight: sum(hits) / len(hits) for weight, hits in by_weight.items()}
            for name, by_weight in right.items()
        }
    summary["plan"] = {
        "teacher": plan.teacher,
        "students": dict(plan.students),
        "data": str(plan.data),
        "layers": plan.layers,
        "mix_kind": plan.mixes[0].kind if plan.mixes else None,
    }
    return write_report(out, summary, _examples(plan, models, data, collate, say))


def load(folder: str, device: torch.device) -> nn.Module:
    """A vision-language model from a folder or the hub, float32, in evaluation mode."""
    from transformers import AutoModelForImageTextToText

    from .distill import taf  # noqa: F401  (makes AutoModel know students with a fetched adapter)

    model: nn.Module = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False).to(device)


def load_data(plan: Plan) -> tuple[ConversationDataset, Collator]:
    """The data set through the first student's processor."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(next(iter(plan.students.values())))
    source, raw = read_records(plan.data)
    data = ConversationDataset(
        raw,
        source,
        Encoder(processor, plan.template),
        plan.data if plan.data.is_dir() else plan.data.parent,
        on_error="raise",
        limit=plan.samples,
    )
    return data, Collator(processor.tokenizer.pad_token_id)


def _examples(
    plan: Plan,
    models: Mapping[str, nn.Module],
    data: ConversationDataset,
    collate: Collator,
    say: Say,
) -> list[Example]:
    found: list[Example] = []
    for shown in samples_to_show(data, plan.examples):
        batch = collate([shown.item])
        try:
            found.append(example(models, batch, shown.image, shown.question, plan.layers))
        except ValueError as error:
            say(f"no example pictures: {error}")
            break
    return found
