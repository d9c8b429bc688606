"""All parts of a recipe's check, in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...models import TeacherCache
from ..memory import StagePlan
from ..memory.models import FakeModels, runs_teacher
from ..memory.render import found_memory
from ..plain import RecipeError
from ..recipe import Recipe, load_recipe
from .checkpoints import check_checkpoints, compare_tokenizers, offline, read_processor
from .dry import Teachers, check_dry_steps
from .memory import check_memory
from .outcome import Outcome, Part
from .output import check_output
from .plans import check_stages
from .samples import Progress, Source, check_samples
from .targets import check_targets


@dataclass(frozen=True)
class Options:
    """How a recipe is checked.

    Attributes:
        samples: only the first so many of each source; None: all.
        device_memory: bytes of the other device that the run will have; None: it will run here.
        visual_tokens: plan the memory for so many image tokens; None: for the longest samples.
        dry_step: also take a step of every stage.
        progress: told of every sample.
    """

    samples: int | None = None
    device_memory: int | None = None
    visual_tokens: int | None = None
    dry_step: bool = True
    progress: Progress | None = None


def check_recipe(path: Path, options: Options | None = None) -> Outcome:
    """Everything that can be known of a recipe before it runs. Nothing is written or downloaded."""
    outcome = Outcome(str(path))
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        outcome.parts.append(Part("recipe", problems=list(error.problems)))
        return outcome
    names = ", ".join(stage.name for stage in recipe.stages)
    outcome.parts.append(Part("recipe", summary=f"{len(recipe.stages)} stages: {names}"))
    threads = torch.get_num_threads()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    try:
        with offline():
            _check(recipe, options or Options(), outcome)
    finally:
        torch.set_num_threads(threads)
    return outcome


def _check(recipe: Recipe, options: Options, outcome: Outcome) -> None:
    checkpoints = check_checkpoints(recipe)
    outcome.parts.append(checkpoints)
    tokens = Part("tokenizers")
    processor = read_processor(recipe, tokens)
    outcome.parts.append(tokens)
    models = _models(recipe, checkpoints)
    if models is None:
        for name in ("stages", "data", "output", "memory", "dry step"):
            outcome.parts.append(Part(name, left_out="the models are not known"))
        return
    if processor is not None and any(runs_teacher(recipe, stage) for stage in recipe.stages):
        sizes = {
            role: int(model.get_input_embeddings().weight.shape[0])
            for role, model in (("student", models.plain_student()), ("teacher", models.teacher))
        }
        compare_tokenizers(recipe, processor, sizes, tokens)
    caches: dict[str, TeacherCache] | None = None
    if recipe.models.cache is not None:
        targets, caches = check_targets(recipe, processor)
        outcome.parts.append(targets)
    elsewhere = options.device_memory is not None
    stages, facts = check_stages(recipe, models, caches, elsewhere=elsewhere)
    outcome.parts.append(stages)
    sources: list[Source] = []
    if processor is None:
        outcome.parts.append(Part("data", left_out="the processor is not known"))
    else:
        data, sources = check_samples(
            recipe, processor, models, caches, samples=options.samples, progress=options.progress
        )
        outcome.parts.append(data)
    counts = {name: source.length for source in sources for name in source.stages if source.length}
    outcome.parts.append(check_output(recipe, facts, counts))
    if len(facts) < len(recipe.stages):
        for name in ("memory", "dry step"):
            outcome.parts.append(Part(name, left_out="a stage has problems"))
        return
    here, device = found_memory(recipe.cpu)
    asked = options.device_memory
    memory, plans = check_memory(
        recipe,
        models,
        sources,
        here if asked is None else asked,
        device if asked is None else "as given",
        options.visual_tokens,
    )
    outcome.parts.append(memory)
    outcome.plans += plans.values()
    teachers = Teachers(recipe, caches or {})
    outcome.parts.append(_dry(options, outcome, processor, models, sources, plans, here, teachers))


def _models(recipe: Recipe, part: Part) -> FakeModels | None:
    """Both models without storage, or None and a problem."""
    try:
        return FakeModels(recipe)
    except RecipeError as error:
        part.problems += [text for text in error.problems if text not in part.problems]
    # Configurations that contradict themselves raise nearly anything when the model is built.
    except Exception as error:
        part.problems.append(
            f"models: they cannot be built from their configurations: {type(error).__name__}: {error}"
        )
    return None


def _dry(
    options: Options,
    outcome: Outcome,
    processor: Any,
    models: FakeModels,
    sources: list[Source],
    plans: dict[str, StagePlan],
    memory: int,
    teachers: Teachers,
) -> Part:
    for part in outcome.parts:
        if part.problems and part.name in ("checkpoints", "tokenizers", "recorded targets"):
            return Part("dry step", left_out=f"the {part.name} have problems")
    if not options.dry_step:
        return Part("dry step", left_out="as asked for")
    elsewhere = options.device_memory is not None
    return check_dry_steps(teachers, processor, models, sources, plans, memory, elsewhere=elsewhere)
