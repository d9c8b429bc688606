# mypy: disable-error-code="attr-defined,valid-type"
# (the class attribute Settings hides the type of that name; renaming it would be other code for records)
"""The shapes world as a task for ``fastalign ablate``: one student, one condition, one seed.

The student, its data, optimisers and schedule are the demo's; what is summed is a recipe's ``losses``.
Data order and initial weights are functions of the seed alone, so that runs of one seed differ only in
what their conditions name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from examples.shapes.demo import load_teacher
from examples.shapes.student import StudentSettings, draw_inputs, optimizers, rate
from fastalign.distill.objective import Objective
from fastalign.distill.terms import Losses
from fastalign.evals.shapes.dataset import EvaluationSet, evaluation_set
from fastalign.evals.shapes.models import build_student
from fastalign.evals.shapes.scoring import evaluate
from fastalign.evals.shapes.subsets import Pair, pair_set, score_pairs
from fastalign.evals.shapes.world import Split


@dataclass(frozen=True)
class Settings:
    """Of one run.

    Attributes:
        steps, batch_size, questions, length, lr: of the training, see ``StudentSettings``.
        losses: as in a recipe of ``fastalign distill``.
        taf: the teacher's adapter fetch, as in a recipe; None: a projector of the student's own.
        frozen_attention: the student's q, k, v and o projections stay as they were drawn.
        layers: of the student's decoder (the teacher has 4).
        split: of the scenes that the final scores are taken on. Those along the way are always of
            the validation scenes.
        curve_per_type, per_type, pairs: questions a type along the way and in the end, minimal pairs a
            subset in the end.
    """

    steps: int = 700
    batch_size: int = 32
    questions: int = 10
    length: int = 140
    lr: float = 4e-3
    losses: Losses = field(default_factory=Losses)
    taf: Literal["linear", "mlp"] | None = None
    frozen_attention: bool = False
    layers: int = 4
    split: Literal["test", "validation"] = "test"
    curve_per_type: int = 100
    per_type: int = 400
    pairs: int = 400

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "questions", "layers", "curve_per_type", "per_type"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: at least 1")


class ShapesTask:
    """See ``fastalign.ablation.task.Task``."""

    Settings: ClassVar[type] = Settings
    SOURCES: ClassVar[tuple[str, ...]] = (
        "fastalign.evals.shapes",
        "fastalign.maths",
        "examples.shapes.ablation",
        "examples.shapes.student",
        "examples.shapes.muon",
    )

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings, self.seed, self.steps = settings, seed, settings.steps
        self.teacher = _teacher()
        self.student = self._make_student()
        self.student.train()
        self.data = StudentSettings(
            seed=seed,
            steps=settings.steps,
            batch_size=settings.batch_size,
            questions=settings.questions,
            length=settings.length,
            lr=settings.lr,
        )
        needed = settings.losses.needs_teacher
        self.objective = Objective(
            self.student, self.teacher if needed else None, settings.losses, whole_step=True
        )
        self.optimizers = optimizers(self.student, settings.lr)
        self.rates = [maker.param_groups[0]["lr"] for maker in self.optimizers]
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        learned = list(self.objective.extra.parameters())
        if learned:
            raise ValueError(
                "losses learn something beside the student; allowed: terms that do not"
            )

    def _make_student(self) -> Any:
        student = build_student(self.seed, self.teacher, layers=self.settings.layers)
        if self.settings.taf:
            from fastalign.distill.taf import fetch_adapter

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                student = fetch_adapter(student, self.teacher, adapter=self.settings.taf)
        if self.settings.frozen_attention:
            for layer in student.model.language_model.layers:
                layer.self_attn.requires_grad_(False)
        return student

    def step(self, number: int) -> dict[str, float]:
        for maker, full in zip(self.optimizers, self.rates, strict=True):
            maker.param_groups[0]["lr"] = full * rate(number, self.steps)
        alignment = self.objective.alignment
        if alignment is not None:  # what a control draws is a function of seed and step, too
            alignment.generator = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        batch = draw_inputs(self.data, number)
        loss, terms = self.objective(self.student, batch, self.objective.count(batch))
        for maker in self.optimizers:
            maker.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        for maker in self.optimizers:
            maker.step()
        return {name: float(value) for name, value in terms.items()}

    def score(self, *, final: bool) -> dict[str, float]:
        """Accuracy by type and ``composition``; in the end also of the minimal pairs.

        ``pairs`` is the unweighted mean of the subsets' ``choice`` (chance 1/2), ``pairs_both`` that of
        both questions right.
        """
        settings = self.settings
        split: Split = settings.split if final else "validation"
        data = _questions(split, settings.per_type if final else settings.curve_per_type)
        report = evaluate(self.student, data, twins=False)
        scores = {name: score.accuracy for name, score in report.types.items()}
        scores["composition"] = report.composition
        if final:
            found = score_pairs(self.student, _pairs(split, settings.pairs))
            for name, pair in found.items():
                scores[name], scores[f"{name}_both"] = pair.choice, pair.both
            scores["pairs"] = sum(p.choice for p in found.values()) / len(found)
            scores["pairs_both"] = sum(p.both for p in found.values()) / len(found)
        return scores

    def state(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "optimizers": [maker.state_dict() for maker in self.optimizers],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        for maker, saved in zip(self.optimizers, state["optimizers"], strict=True):
            maker.load_state_dict(saved)

    def weights(self) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = self.student.state_dict()
        return found


@cache
def _teacher() -> Any:
    teacher = load_teacher()
    teacher.requires_grad_(False)
    return teacher


@lru_cache(maxsize=4)
def _questions(split: Split, per_type: int) -> EvaluationSet:
    return evaluation_set(split, per_type)


@lru_cache(maxsize=2)
def _pairs(split: Split, count: int) -> list[Pair]:
    return pair_set(split, count)
