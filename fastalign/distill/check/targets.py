"""What was recorded of the teacher, where a recipe trains from it."""

from __future__ import annotations

from typing import Any

from ...models import TeacherCache
from ..plain import RecipeError
from ..recipe import Recipe
from ..targets import cached_stages, open_cache
from .outcome import Part


def check_targets(recipe: Recipe, processor: Any) -> tuple[Part, dict[str, TeacherCache]]:
    """(the part, stage -> recorded targets): finished, and of this teacher, processor and objective."""
    part = Part("recorded targets")
    found: dict[str, TeacherCache] = {}
    if processor is None:
        part.left_out = "the processor is not known"
        return part, found
    for stage in cached_stages(recipe):
        try:
            found[stage.name] = open_cache(recipe, stage, processor)
        except RecipeError as error:
            part.problems += [text for text in error.problems if text not in part.problems]
    part.facts["samples"] = {name: len(cache.numbers) for name, cache in found.items()}
    part.summary = ", ".join(f"{name}: {len(cache.numbers):,}" for name, cache in found.items())
    return part, found
