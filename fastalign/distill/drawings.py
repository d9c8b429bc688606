"""The pictures of a stage: loss curves, and where teacher and student look before and after it.

Nothing here may cost a run: what goes wrong becomes a note in the summary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .data.show import TRIES, Shown, samples_to_show
from .data.stream import ConversationStream
from .recipe import Recipe
from .report import write_curves
from .stages import Stage

if TYPE_CHECKING:
    from ..analysis.pictures import Example
    from ..models.matching import Rule
    from .trainer import DistillTrainer


class StageDrawings:
    """Looks at a few samples when a stage begins, draws when it has ended and its weights are saved.

    The teacher is shown where it is in memory: loaded for this stage's losses, or for an earlier stage of
    the same process. Of the student before the stage its looks are kept, not its weights. Only the main
    process looks, so models that several processes hold in pieces are not drawn.
    """

    def __init__(self, recipe: Recipe, stage: Stage, trainer: DistillTrainer, teacher: Any) -> None:
        self.trainer = trainer
        self.teacher: nn.Module | None = teacher if isinstance(teacher, nn.Module) else None
        self.layers = aligned_layers(recipe, stage)
        self.count = recipe.pictures
        self.samples: list[Shown] = []
        self.examples: list[Example] = []
        self.notes: list[str] = []
        self._begun = False

    def look(self, title: str, student: nn.Module | None = None) -> None:
        """Add a look of the student (None: the trainer's) to each sample's row, if it can be had."""
        self._try("attention pictures", lambda: self._look(title, student))

    def draw(self, student: nn.Module, folder: Path) -> dict[str, Any]:
        """Write the pictures: ``pictures`` (paths in the run's folder) and ``picture_notes``."""
        written: list[str] = []

        def curves() -> None:
            name = "curves.png"
            if write_curves(self.trainer.state.log_history, folder / name):
                written.append(f"{folder.name}/{name}")

        def overlays() -> None:
            if not self.examples:
                return
            self._look("student after", student)
            from ..analysis.pictures import attention_figure, save_figure

            name = "attention.png"
            caption = f"{folder.name}: attention to the image while answering"
            save_figure(attention_figure(self.examples, caption=caption), folder / name)
            written.append(f"{folder.name}/{name}")

        if not self.trainer.args.should_save:
            return {}
        if importlib.util.find_spec("matplotlib") is None:
            self.notes.append("no pictures: matplotlib is not installed")
        else:
            self._try("loss curves", curves)
            self._try("attention pictures", overlays)
        return {"pictures": written, "picture_notes": self.notes}

    # ------------------------------------------------------------------------------ parts

    def _try(self, what: str, draw: Callable[[], None]) -> None:
        try:
            draw()
        # Whatever a model, a data set or a drawing library raises is not worth a training run.
        except Exception as error:
            self.notes.append(f"no {what}: {type(error).__name__}: {error}")

    def _look(self, title: str, student: nn.Module | None) -> None:
        if not self._wanted():
            return
        from ..analysis.overlays import example

        trainer = self.trainer
        model: Any = trainer.model if student is None else student
        models = {title: model}
        if self.teacher is not None:
            models["teacher"] = self.teacher
        training = model.training
        model.eval()
        try:
            # Bits of the run must not depend on whether somebody looked.
            with torch.random.fork_rng(), trainer.compute_loss_context_manager():
                found = [
                    example(
                        models, trainer.data_collator([s.item]), s.image, s.question, self.layers
                    )
                    for s in self.samples
                ]
        finally:
            model.train(training)
        if self.examples:
            found = [
                replace(old, looks=[*old.looks, new.looks[-1]])
                for old, new in zip(self.examples, found, strict=True)
            ]
        self.examples = found

    def _wanted(self) -> bool:
        """Whether there is something to look at; the samples are chosen the first time."""
        if not (self.count and self.trainer.args.should_save):
            return False
        if not self._begun:
            self._begun = True
            if importlib.util.find_spec("matplotlib") is None:
                return False
            if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
                self.notes.append("no attention pictures: the student's weights are sharded")
                return False
            data = self.trainer.train_dataset
            if isinstance(data, ConversationStream):
                data = data.beginning(TRIES * self.count)
            self.samples = samples_to_show(data, self.count)
            if not self.samples:
                self.notes.append("no attention pictures: no sample of the data has one image")
        return bool(self.samples)


def aligned_layers(recipe: Recipe, stage: Stage) -> Rule:
    """The rule of the stage's alignment; without one, of the recipe's first stage that has one."""
    aligning = [s for s in (stage, *recipe.stages) if s.losses.alignment]
    rule: Any = (aligning[0] if aligning else stage).losses.alignment_layers
    return rule  # type: ignore[no-any-return]
