"""Print the memory plan of a recipe: ``python -m fastalign.distill.memory recipe.yaml --visual-tokens N``.

Needs the two models' config.json and nothing else. Exit code 0: every stage fits; 1: one does not;
2: a wrong recipe or command line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from ..plain import RecipeError
from ..recipe import load_recipe
from .models import FakeModels
from .plan import Shape, plan_stage
from .render import found_memory, parse_size, plan_table


def main() -> int:
    parser = argparse.ArgumentParser(description="The memory plan of a recipe, stage by stage.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--visual-tokens", type=int, required=True, help="the most of a sample")
    parser.add_argument("--device-memory", help="as 80GiB; default: the device of this machine")
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(arguments.recipe)
        memory, device = found_memory(recipe.cpu)
        if arguments.device_memory:
            memory, device = parse_size(arguments.device_memory), "as given"
        models = FakeModels(recipe)
    except (RecipeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    fits = True
    for stage in recipe.stages:
        tokens, visual = recipe.data_of(stage).max_length, arguments.visual_tokens
        if not 0 <= visual < tokens:
            print(
                f"--visual-tokens is {visual}; allowed: 0 to {tokens - 1} (max_length is {tokens})",
                file=sys.stderr,
            )
            return 2
        # Every token that is not of the image is taken to be labelled.
        shape = Shape(stage.micro_batch, tokens, visual, tokens - visual)
        plan = plan_stage(recipe, stage, models, shape, on_cpu=recipe.cpu)
        Console().print(plan_table(plan, memory, device))
        fits = fits and plan.fits(memory)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
