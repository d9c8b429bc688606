"""Does each stage fit the device, at the longest sample that was found?"""

from __future__ import annotations

from ..memory import FakeModels, Shape, StagePlan, plan_stage
from ..memory.plan import RESERVE_BYTES
from ..recipe import Recipe
from ..stages import Stage
from .outcome import Part, size_text
from .samples import Size, Source


def source_of(sources: list[Source], stage: Stage) -> Source | None:
    """The stage's source, if it has good samples."""
    return next((s for s in sources if stage.name in s.stages and s.sizes), None)


def largest(sizes: list[Size], batch: int) -> Shape:
    """A batch of which every sample has the most tokens, image tokens and labels of any."""
    return Shape(
        batch,
        max(s.tokens for s in sizes),
        max(s.visual for s in sizes),
        max(s.labelled for s in sizes),
    )


def check_memory(
    recipe: Recipe,
    models: FakeModels,
    sources: list[Source],
    memory: int,
    device: str,
    visual: int | None = None,
) -> tuple[Part, dict[str, StagePlan]]:
    """(the part, stage -> plan); a stage without a good sample has none.

    Args:
        memory, device: bytes and name of the device that the run will have.
        visual: plan for samples of ``max_length`` tokens, so many of them of images and all others
            labelled; None: for the longest ones of ``sources``.
    """
    part = Part("memory")
    plans: dict[str, StagePlan] = {}
    for index, stage in enumerate(recipe.stages):
        source, most = source_of(sources, stage), recipe.data_of(stage).max_length
        if visual is not None:
            if visual >= most:
                part.problems.append(
                    f"stages[{index}] ({stage.name}): data.max_length is {most}, which {visual} image "
                    "tokens do not fit; allowed: more"
                )
                continue
            shape = Shape(stage.micro_batch, most, visual, most - visual)
        elif source is None:
            part.notes.append(
                f"stages[{index}] ({stage.name}): no memory plan, as no good sample is known; "
                "--visual-tokens plans without"
            )
            continue
        else:
            shape = largest(source.sizes, stage.micro_batch)
        plan = plan_stage(recipe, stage, models, shape, on_cpu=recipe.cpu)
        plans[stage.name] = plan
        if not plan.fits(memory):
            part.problems.append(
                f"stages[{index}] ({stage.name}): {size_text(plan.total)} and "
                f"{size_text(RESERVE_BYTES)} left free do not fit {size_text(memory)} ({device}); allowed: "
                "a smaller micro_batch or max_length, gradient_checkpointing, lora, bf16"
            )
    part.facts["device"] = {"name": device, "bytes": memory, "left_free_bytes": RESERVE_BYTES}
    part.facts["stages"] = {
        name: {
            "batch": plan.shape.batch,
            "tokens": plan.shape.tokens,
            "visual": plan.shape.visual,
            "labelled": plan.shape.labelled,
            "bytes": plan.total,
            "fits": plan.fits(memory),
            "lines": {line.name: line.size for line in plan.lines},
        }
        for name, plan in plans.items()
    }
    if not plans:
        part.left_out = "no stage has a good sample"
    else:
        top = max(plans.values(), key=lambda plan: plan.total)
        part.summary = (
            f"at most {size_text(top.total)} ({top.stage}) and {size_text(RESERVE_BYTES)} left free, "
            f"of {size_text(memory)} ({device})"
        )
    return part, plans
