"""Can the run write where it wants to, and is there room for what it writes?"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ..plain import RecipeError
from ..recipe import Recipe, resolve
from ..run import claimed
from .outcome import Part, size_text
from .plans import StageFacts, checkpoints_at_once


def check_output(recipe: Recipe, facts: dict[str, StageFacts], samples: dict[str, int]) -> Part:
    """The run's folder: another run in it, permissions, room on the disk.

    Args:
        facts: of the stages, as far as they are known.
        samples: stage -> number of samples, as far as they are known.
    """
    part = Part("output")
    output = resolve(recipe, recipe.output)
    try:
        if claimed(recipe, output, resume=True):
            part.notes.append(
                f"output: {output} holds a run of this recipe: --resume goes on with it"
            )
    except RecipeError as error:
        part.problems += error.problems
    except (OSError, json.JSONDecodeError) as error:
        part.problems.append(f"output: {output / 'recipe.json'} cannot be read: {error}")
    there = existing(output)
    if not there.is_dir():
        part.problems.append(f"output: {there} is no folder; allowed: a folder, or none yet")
        return part
    if not os.access(there, os.W_OK | os.X_OK):
        part.problems.append(f"output: {there} cannot be written to; allowed: a folder that can")
    free = shutil.disk_usage(there).free
    needed = room_needed(recipe, facts, samples)
    part.facts |= {"folder": str(output), "free_bytes": free}
    if needed is None:
        part.summary = f"{size_text(free)} free; what is needed is not known"
        return part
    part.facts["needed_bytes"] = needed
    part.summary = f"{size_text(needed)} needed at most, {size_text(free)} free"
    if needed > free:
        part.problems.append(
            f"output: the run needs {size_text(needed)} on the disk of {there}, {size_text(free)} are "
            "free; allowed: more room, fewer keep_checkpoints, a larger save_every"
        )
    return part


def room_needed(
    recipe: Recipe, facts: dict[str, StageFacts], samples: dict[str, int]
) -> int | None:
    """The most bytes on the disk at one time; None where a stage is not known.

    Stages keep their checkpoints when they are done, and each leaves its student; the last one is copied.
    While a checkpoint is written, the oldest is still there.
    """
    if any(stage.name not in facts for stage in recipe.stages):
        return None
    total = most = 0
    for stage in recipe.stages:
        fact = facts[stage.name]
        count = checkpoints_at_once(stage, samples.get(stage.name))
        most = max(most, total + count * fact.checkpoint)
        total += min(count, stage.keep_checkpoints) * fact.checkpoint + fact.final
        most = max(most, total)
    return max(most, total + facts[recipe.stages[-1].name].final)


def existing(path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
