"""One step of each stage on two samples, through the trainer, in which nothing is learned or written.

The learning rate is 0 and nothing is saved, so the optimiser runs and the weights stay as they are. Looked
at are every term's value and, term by term, the gradients of the parts that the stage trains.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from ...models import TeacherCache
from ..loading import load_student, load_teacher, part_of
from ..memory import FakeModels, Shape, StagePlan, plan_stage
from ..memory.models import runs_teacher
from ..memory.plan import RESERVE_BYTES
from ..recipe import Recipe, resolve
from ..run import make_trainer
from ..stages import Stage
from .memory import source_of
from .outcome import Part
from .output import existing
from .plans import LAUNCHED, QUIET, device_changes
from .samples import Size, Source


@dataclass
class Seen:
    """What a dry step shows.

    Attributes:
        terms: their values, unweighted.
        norms: part -> norm of its gradients.
        broken: trained weights whose gradients are not finite.
    """

    terms: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Teachers:
    """What each stage learns from.

    Attributes:
        caches: stage -> the teacher's recorded targets, where it trains from them.
    """

    recipe: Recipe
    caches: Mapping[str, TeacherCache]

    def load(self, stages: list[Stage]) -> Any:
        """The teacher itself, if one of these stages runs it or the student reads through its projector."""
        recipe = self.recipe
        if recipe.models.taf or any(runs_teacher(recipe, stage) for stage in stages):
            return load_teacher(recipe)
        return None

    def of(self, stage: Stage, loaded: Any) -> Any:
        """The stage's teacher: its recorded targets, or the one that was loaded."""
        return self.caches.get(stage.name, loaded)


def check_dry_steps(
    teachers: Teachers,
    processor: Any,
    models: FakeModels,
    sources: list[Source],
    plans: dict[str, StagePlan],
    memory: int,
    *,
    elsewhere: bool = False,
) -> Part:
    """A dry step of every stage.

    Args:
        plans: of the stages.
        memory: bytes of this machine's device.
        elsewhere: see ``device_changes``.
    """
    part, recipe = Part("dry step"), teachers.recipe
    chosen: dict[str, list[Size]] = {}
    for stage in recipe.stages:
        reason = _unable(stage, sources)
        if not reason:
            source = source_of(sources, stage)
            assert source is not None
            sizes = choose(recipe, stage, models, source, plans.get(stage.name), memory)
            if sizes:
                chosen[stage.name] = sizes
            else:
                reason = "not even its smallest sample fits this machine, by the memory plan"
        if reason:
            part.notes.append(f"stage {stage.name}: no dry step, as {reason}")
    if not chosen:
        part.left_out = "no stage can take one here (see the notes)"
        return part
    part.facts["stages"] = {}
    with _random_kept():
        changes = device_changes(recipe, elsewhere)
        _run_stages(teachers, processor, sources, chosen, part, changes)
    part.summary = ", ".join(f"{name}: {len(sizes)} samples" for name, sizes in chosen.items())
    return part


def _unable(stage: Stage, sources: list[Source]) -> str:
    if source_of(sources, stage) is None:
        return "it has no good sample"
    launched = [name for name in LAUNCHED if stage.options.get(name)]
    if launched:
        return f"options.{launched[0]} needs a launch of several processes"
    return ""


def choose(
    recipe: Recipe,
    stage: Stage,
    models: FakeModels,
    source: Source,
    plan: StagePlan | None,
    memory: int,
) -> list[Size]:
    """The smallest sample and the longest that fits ``memory``; none if not even the smallest does.

    With an image among them, if the source has any. Where the longest of all does not fit, the one that
    does is found to within 1 % of the samples: each plan takes seconds.

    Args:
        plan: a larger one, if there is; what it fits need not be planned.
    """
    ordered = sorted(source.sizes, key=lambda s: (s.tokens, s.visual, s.index))

    def fits(size: Size) -> bool:
        shape = Shape(min(2, stage.micro_batch), size.tokens, size.visual, size.labelled)
        total = plan_stage(recipe, stage, models, shape, on_cpu=recipe.cpu).total
        return total + RESERVE_BYTES <= memory

    first, last = ordered[0], ordered[-1]
    if not (plan is not None and plan.fits(memory)) and not fits(last):
        if not fits(first):
            return []
        low, high = 0, len(ordered)  # ordered[low] fits, ordered[high] does not
        while high - low > max(1, len(ordered) // 100):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(ordered[middle]) else (low, middle)
        last = ordered[low]
        ordered = ordered[: low + 1]
    if not (first.visual or last.visual):
        last = next((size for size in reversed(ordered) if size.visual), last)
    return [first, last]


def _run_stages(
    teachers: Teachers,
    processor: Any,
    sources: list[Source],
    chosen: dict[str, list[Size]],
    part: Part,
    changes: dict[str, Any],
) -> None:
    recipe = teachers.recipe
    needed = [stage for stage in recipe.stages if stage.name in chosen]
    try:
        loaded = teachers.load(needed)
        student = load_student(recipe, loaded)
    # Readers of weights raise their own (safetensors', bitsandbytes'), and all of it ends a run.
    except Exception as error:
        part.problems.append(f"models: they cannot be loaded: {type(error).__name__}: {error}")
        return
    for number, stage in enumerate(needed):
        entry = f"stages[{recipe.stages.index(stage)}] ({stage.name})"
        source = source_of(sources, stage)
        assert source is not None and source.dataset is not None
        try:
            source.dataset.recorded = source.recorded.get(stage.name)
            items = [source.dataset[size.index] for size in chosen[stage.name]]
            teacher = teachers.of(stage, loaded)
            whole, alone = _stage_steps(recipe, stage, student, teacher, processor, items, changes)
        # Whatever a step raises would end the run.
        except Exception as error:
            part.problems.append(f"{entry}: the dry step fails: {type(error).__name__}: {error}")
            rest = [other.name for other in needed[number + 1 :]]
            if rest:
                part.notes.append(f"stage {', '.join(rest)}: no dry step after the one that failed")
            return
        part.problems += [f"{entry}: {text}" for text in _complaints(stage, whole, alone, items)]
        part.facts["stages"][stage.name] = {
            "tokens": [size.tokens for size in chosen[stage.name]],
            "visual": [size.visual for size in chosen[stage.name]],
            "terms": whole.terms,
            "gradients": {"all": whole.norms, **{name: seen.norms for name, seen in alone.items()}},
        }


def _stage_steps(
    recipe: Recipe,
    stage: Stage,
    student: Any,
    teacher: Any,
    processor: Any,
    items: list[Any],
    changes: dict[str, Any],
) -> tuple[Seen, dict[str, Seen]]:
    """(the whole objective, each of several terms alone)."""
    whole = dry_step(recipe, stage, student, teacher, processor, items, **changes)
    weights = stage.losses.weights
    if len(weights) < 2:
        return whole, {}
    alone = {}
    for name in weights:
        without: dict[str, Any] = {other: 0.0 for other in weights if other != name}
        only = replace(stage, losses=replace(stage.losses, **without))
        alone[name] = dry_step(recipe, only, student, teacher, processor, items, **changes)
    return whole, alone


def dry_step(
    recipe: Recipe,
    stage: Stage,
    student: Any,
    teacher: Any,
    processor: Any,
    items: list[Any],
    **changes: Any,
) -> Seen:
    """One optimiser step of a stage at learning rate 0; ``student`` is afterwards what it was before.

    Args:
        items: two encoded samples.
        changes: of the Trainer's arguments.
    """
    batch = min(len(items), stage.micro_batch)
    accumulated = stage.global_batch > stage.micro_batch
    if accumulated:
        batch = 1
    trainer = make_trainer(
        recipe,
        stage,
        existing(resolve(recipe, recipe.output)),  # the Trainer makes its folder: one that is there
        student,
        teacher,
        processor,
        items,
        **{**QUIET, **changes},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=len(items) if accumulated else 1,
        max_steps=1 if accumulated else len(items) // batch,
        learning_rate=0.0,
        max_grad_norm=0.0,  # clipping would hide what is not finite
        group_batches=False,
        dataloader_num_workers=0,
        logging_steps=1,
    )
    seen = Seen()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Watch(seen, trainer.objective.extra))
    try:
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        for name in stage.losses.weights:
            values = [entry.get(f"loss/{name}", 0.0) for entry in entries]
            seen.terms[name] = math.fsum(values) / len(values) if values else math.nan
    finally:
        _put_back(trainer, stage)
    return seen


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Looks at the gradients before the optimiser does."""

    def __init__(self, seen: Seen, extra: nn.Module) -> None:
        self.seen, self.extra = seen, extra

    def on_pre_optimizer_step(self, *arguments: Any, model: Any = None, **others: Any) -> None:
        named = [(part_of(name), name, p) for name, p in model.named_parameters()]
        named += [("losses' own weights", name, p) for name, p in self.extra.named_parameters()]
        for part, name, parameter in named:
            if not parameter.requires_grad:
                continue
            norm = 0.0
            if parameter.grad is not None:
                norm = float(torch.linalg.vector_norm(parameter.grad.detach(), dtype=torch.float32))
            if not math.isfinite(norm):
                self.seen.broken.append(name)
                continue
            self.seen.norms[part] = math.hypot(self.seen.norms.get(part, 0.0), norm)


def _put_back(trainer: Any, stage: Stage) -> None:
    """The student without what the trainer put around and into it."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if stage.lora is not None:
        model = model.unload()
    if stage.gradient_checkpointing:
        for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
            if hasattr(model, name):
                getattr(model, name)()
                break
    model.zero_grad(set_to_none=True)
    trainer.optimizer = None
    gc.collect()


def _complaints(
    stage: Stage, whole: Seen, alone: dict[str, Seen], items: list[Any]
) -> Iterator[str]:
    for name, value in whole.terms.items():
        if not math.isfinite(value):
            yield f"the loss {name} of the dry step is {value}; allowed: a finite one"
    if whole.broken:
        yield (
            f"the gradients of {len(whole.broken)} weights are not finite in the dry step, the first is "
            f"{whole.broken[0]}"
        )
        return
    with_image = any("pixel_values" in item for item in items)
    for place, norm in whole.norms.items():
        if not norm and (with_image or place not in ("projector", "vision")):
            yield f"the dry step gives no gradient to the {place}, which the stage trains"
    for name, seen in alone.items():
        if seen.broken or not any(seen.norms.values()):
            yield f"the loss {name} alone gives no usable gradient to anything that the stage trains"


@contextmanager
def _random_kept() -> Iterator[None]:
    """All generators go on as if nothing had been: the Trainer sets them."""
    before, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 (it sets this one)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numbers)  # noqa: NPY002
