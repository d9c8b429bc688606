"""What each stage would do: its arguments, what trains, its losses, its matched layers.

The stage's objective is built for models without storage, by the code that builds it for the run, so that
whatever it refuses is refused here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...models import TeacherCache
from ..heads import tapped_head
from ..loading import part_of
from ..memory.models import FakeModels
from ..memory.plan import optimizer_states
from ..memory.simulate import without_warnings
from ..objective import Objective
from ..plain import RecipeError
from ..recipe import Recipe
from ..run import training_arguments
from ..stages import Stage
from .outcome import Part

#: Options of a stage that only a launch of several processes can have.
LAUNCHED = ("fsdp", "fsdp_config", "deepspeed")
#: What a check must not do, whatever a recipe's options say.
QUIET: dict[str, Any] = {
    "report_to": "none",
    "push_to_hub": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
}


@dataclass(frozen=True)
class StageFacts:
    """What is known of a stage from the configurations.

    Attributes:
        trained: part -> number of trained weights.
        checkpoint, final: bytes of a checkpoint of the stage, and of the student that it ends with.
        matching: student layer -> teacher layers.
    """

    trained: dict[str, int]
    checkpoint: int
    final: int
    matching: dict[int, tuple[int, ...]]


def check_stages(
    recipe: Recipe,
    models: FakeModels,
    caches: Mapping[str, TeacherCache] | None = None,
    *,
    elsewhere: bool = False,
) -> tuple[Part, dict[str, StageFacts]]:
    """(the part, stage -> facts); a stage with a problem has none.

    Args:
        caches: stage -> the teacher's recorded targets; None: the teacher itself runs.
        elsewhere: see ``device_changes``.
    """
    part = Part("stages")
    found: dict[str, StageFacts] = {}
    for index, stage in enumerate(recipe.stages):
        entry = f"stages[{index}] ({stage.name})"
        try:
            check_arguments(recipe, stage, elsewhere=elsewhere)
            with without_warnings():
                teacher = models.teacher if caches is None else caches.get(stage.name)
                if stage.losses.needs_teacher and teacher is None:
                    continue  # its recorded targets have problems of their own
                found[stage.name] = _facts(stage, models, teacher)
        except RecipeError as error:
            part.problems += [f"{entry}: {problem}" for problem in error.problems]
        # TypeError: transformers' and peft's own of wrong arguments; ImportError: an optimiser's library.
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            part.problems.append(f"{entry}: {error}")
    part.facts["stages"] = {
        name: {
            "trained": facts.trained,
            "checkpoint_bytes": facts.checkpoint,
            "matched_layers": {str(s): list(t) for s, t in facts.matching.items()},
        }
        for name, facts in found.items()
    }
    part.summary = "; ".join(
        f"{name}: {sum(facts.trained.values()):,} trained" for name, facts in found.items()
    )
    return part, found


def device_changes(recipe: Recipe, elsewhere: bool) -> dict[str, Any]:
    """Arguments that let a stage run here, where it is meant for a device that this machine lacks.

    Args:
        elsewhere: the run will be on another device.
    """
    lacks = torch.accelerator.current_accelerator(check_available=True) is None
    return {"use_cpu": True} if elsewhere and lacks else {}


def check_arguments(recipe: Recipe, stage: Stage, *, elsewhere: bool = False) -> None:
    """The Trainer's arguments can be made (but for those that need a launch).

    Raises:
        RecipeError, ValueError, TypeError: they cannot.
    """
    options = {
        name: value for name, value in stage.options.items() if name not in {*LAUNCHED, *QUIET}
    }
    if stage.options.get("fsdp") and stage.fused_head:
        raise RecipeError(
            "fused_head is True and options.fsdp is given; allowed: fused_head: false"
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    changes = {**QUIET, **device_changes(recipe, elsewhere)}
    training_arguments(recipe, replace(stage, options=options), Path(), processes, **changes)


def _facts(stage: Stage, models: FakeModels, teacher: Any) -> StageFacts:
    student = models.student(stage)
    losses = stage.losses
    with models.running():
        objective = Objective(
            student,
            teacher if losses.needs_teacher else None,
            losses,
            fused_head=stage.fused_head,
            share_vision="never",  # weights would be compared
            whole_step=stage.global_batch == stage.micro_batch,
        )
        for view in (objective.student, objective.teacher):
            if view is not None:
                with tapped_head(view.role, view.model, headless=stage.fused_head):
                    pass
    trained: dict[str, int] = {}
    parameters = []
    final = 0
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            trained[part_of(name)] = trained.get(part_of(name), 0) + parameter.numel()
            parameters.append(parameter)
        if not any(copied in name for copied in ("lora_", ".modules_to_save.")):
            final += parameter.numel() * parameter.element_size()
    # PEFT's checkpoints hold what it trains, the others all weights.
    adapter = sum(p.numel() * p.element_size() for p in parameters)
    weights = final if stage.lora is None else adapter
    states, _ = optimizer_states(stage.optimizer, parameters)
    matching: Mapping[int, tuple[int, ...]] = (
        objective.alignment.matching if objective.alignment is not None else {}
    )
    return StageFacts(trained, weights + states, final, dict(matching))


def checkpoints_at_once(stage: Stage, samples: int | None) -> int:
    """The most checkpoints of a stage on the disk at one time, the one being written included.

    Args:
        samples: of the stage's data; None: not known.
    """
    most = stage.keep_checkpoints + 1
    steps = stage.steps
    if steps is None and samples is not None:
        steps = math.ceil(samples * stage.epochs / stage.global_batch)
    if steps is None:
        return most
    # One at every `save_every` and one at the end.
    return min(most, max(1, math.ceil(steps / stage.save_every)))
