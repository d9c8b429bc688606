"""The memory of a stage, line by line: bytes, the formula behind them, and when they are alive.

A line is alive in some phases of the step; a phase is the sum of its lines, and the plan the largest
phase. What is kept for the backward and what a layer needs while it runs is not a formula of this file:
it is found by running the decoder on fake tensors (``simulate``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...backends.tiled import WORKSPACE_BYTES
from ...models.matching import Matching, match_layers
from ...models.view import ModelView
from ..loading import part_of
from ..recipe import Recipe
from ..stages import Stage
from .models import FakeModels, runs_teacher
from .simulate import Pass, run_decoder, run_head, without_warnings

PHASES = ("teacher", "student", "losses", "backward", "optimizer")
ALWAYS = PHASES
GIB = 2**30
#: Kept free for what no plan sees: the device's context, libraries' workspaces, fragmentation.
RESERVE_BYTES = 2 * GIB


@dataclass(frozen=True)
class Shape:
    """The largest micro-batch of a stage.

    Attributes:
        batch: samples. tokens, visual, labelled: the most of a sample.
    """

    batch: int
    tokens: int
    visual: int
    labelled: int


@dataclass(frozen=True)
class Line:
    """``size`` bytes, alive in ``phases``; ``formula`` says how they were found."""

    name: str
    size: int
    phases: tuple[str, ...]
    formula: str


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs.

    Attributes:
        stage: its name.
        shape: what it was computed for.
        lines: in the order in which they are printed.
    """

    stage: str
    shape: Shape
    lines: tuple[Line, ...]

    def phase(self, name: str) -> int:
        """Bytes alive at once in a phase."""
        return sum(line.size for line in self.lines if name in line.phases)

    @property
    def total(self) -> int:
        """Bytes of the largest phase."""
        return max(self.phase(name) for name in PHASES)

    def fits(self, memory: int) -> bool:
        """Whether a device of ``memory`` bytes holds it, ``RESERVE_BYTES`` left free."""
        return self.total + RESERVE_BYTES <= memory


def plan_stage(
    recipe: Recipe, stage: Stage, models: FakeModels, shape: Shape, *, on_cpu: bool = False
) -> StagePlan:
    """The plan of one stage on one device.

    Args:
        models: of the recipe.
        shape: of the largest micro-batch.
        on_cpu: the optimiser goes parameter by parameter, as torch's does on a CPU.
    """
    with without_warnings():
        return StagePlan(
            stage.name, shape, tuple(_Planner(recipe, stage, models, shape, on_cpu).lines())
        )


class _Planner:
    def __init__(
        self, recipe: Recipe, stage: Stage, models: FakeModels, shape: Shape, on_cpu: bool
    ) -> None:
        self.recipe, self.stage, self.models, self.shape = recipe, stage, models, shape
        self.on_cpu = on_cpu
        self.student = models.student(stage)
        self.with_teacher = runs_teacher(recipe, stage)
        self.autocast = stage.precision == "bf16"
        self.accumulates = stage.global_batch > stage.micro_batch
        self.views = {"student": ModelView("student", self.student)}
        if models.teacher is not None:
            self.views["teacher"] = ModelView("teacher", models.teacher)
        self.dtypes = {
            "student": getattr(torch, recipe.models.student_dtype),
            "teacher": getattr(torch, recipe.models.teacher_dtype),
        }

    def lines(self) -> list[Line]:
        found = [*self._weights(), *self._optimizer()]
        run = self._run("student", training=True)
        found += self._activations(run)
        if self.with_teacher:
            found += self._teacher_forward()
        if self.stage.losses.alignment:
            found += self._alignment()
        found += [*self._head(), *self._inputs()]
        return [line for line in found if line.size]

    # ----------------------------------------------------------------- weights and optimiser

    def _weights(self) -> list[Line]:
        found = [Line("student's weights", _bytes(self.student), ALWAYS, _sizes(self.student))]
        if not self.with_teacher:
            return found
        bits = self.recipe.models.teacher_bits
        size, how = _bytes(self.models.teacher), _sizes(self.models.teacher)
        if bits is not None:
            size, how = _quantised(self.models.teacher, bits)
        return [*found, Line("teacher's weights", size, ALWAYS, how)]

    def _optimizer(self) -> list[Line]:
        trained = [p for p in self.student.parameters() if p.requires_grad]
        size = sum(p.numel() * p.element_size() for p in trained)
        states, how = optimizer_states(self.stage.optimizer, trained)
        largest = max(p.numel() * p.element_size() for p in trained)
        work = 2 * largest if self.on_cpu or "fused" in self.stage.optimizer else size
        each = "2 x the largest parameter" if work != size else "1 x the trained weights (foreach)"
        return [
            Line(
                "gradients",
                size,
                # One micro-batch a step: they grow as the activations go, so that they count at the end.
                ALWAYS if self.accumulates else ("optimizer",),
                f"trained: {_counted(trained)}",
            ),
            Line("optimizer's states", states, ALWAYS, how),
            Line("optimizer's work", work, ("optimizer",), each),
        ]

    # ------------------------------------------------------------------------- activations

    def _run(self, role: str, training: bool) -> Pass:
        model = self.student if role == "student" else self.models.teacher
        with self.models.running():
            return run_decoder(
                model,
                batch=self.shape.batch,
                tokens=self.shape.tokens,
                dtype=self.dtypes[role],
                autocast=self.autocast,
                training=training,
                checkpointing=training and self.stage.gradient_checkpointing,
            )

    def _activations(self, run: Pass) -> list[Line]:
        layers = self.views["student"].text_config.num_hidden_layers
        places = self.shape.batch * self.shape.tokens
        each = run.kept / layers / places
        how = "checkpointed" if self.stage.gradient_checkpointing else "all of a layer"
        widest = f"{self.shape.batch} x {self.shape.tokens:,} tokens"
        return [
            Line(
                "activations kept",
                run.kept,
                ("student", "losses", "backward"),
                f"{layers} layers x {widest} x {each:,.0f} B, {how} (fake run)",
            ),
            Line(
                "weights in bf16",
                run.forward_end - run.kept,
                ("student", "losses"),
                "autocast's copies of trained weights (fake run)",
            ),
            Line(
                "a layer's forward",
                run.forward_peak - run.forward_end,
                ("student",),
                f"beyond what stays, {widest} (fake run)",
            ),
            Line(
                "a layer's backward",
                run.backward_peak - run.kept,
                ("backward",),
                f"its recomputation and gradients, {widest} (fake run)",
            ),
            *self._projector(),
        ]

    def _projector(self) -> list[Line]:
        """What the projector keeps where it trains, from its linear layers."""
        linears = [
            m
            for name, m in self.student.named_modules()
            if isinstance(m, nn.Linear) and part_of(name + ".weight") in ("projector", "fetched")
        ]
        trains = any(
            p.requires_grad
            for name, p in self.student.named_parameters()
            if part_of(name) == "projector"
        )
        if not trains:
            return []
        width = sum(m.in_features + m.out_features for m in linears)
        places = self.shape.batch * self.shape.visual
        bytes_each = self._item("student")
        return [
            Line(
                "projector's activations",
                places * width * bytes_each,
                ("student", "losses", "backward"),
                f"{places:,} image tokens x {width:,} (its linears, in + out) x {bytes_each} B, estimate",
            )
        ]

    def _teacher_forward(self) -> list[Line]:
        run = self._run("teacher", training=False)
        width = self.views["teacher"].text_config.hidden_size
        size = self.shape.batch * self.shape.tokens * width
        item = 4 if self.dtypes["teacher"] == torch.float32 else 2
        return [
            Line(
                "teacher's forward",
                run.forward_peak,
                ("teacher",),
                "the largest moment of its decoder, no gradients (fake run)",
            ),
            Line(
                "teacher's hidden states",
                size * item,
                ("student", "losses"),
                f"{self.shape.batch} x {self.shape.tokens:,} x {width:,} x {item} B",
            ),
        ]

    # --------------------------------------------------------------------------- alignment

    def _alignment(self) -> list[Line]:
        views = self.views
        found: list[Line] = []
        matching = self._matching()
        rows, what = self._rows()
        batch, tokens = self.shape.batch, self.shape.tokens
        if self.with_teacher:
            layers = {t for group in matching.values() for t in group}
            heads, keys, size = _heads(views["teacher"].text_config)
            item = self._item("teacher")
            each = batch * (heads * rows + keys * tokens) * size * item
            found.append(
                Line(
                    "teacher's q and k",
                    len(layers) * each,
                    ("teacher", "student"),
                    f"{len(layers)} layers x {batch} x ({heads} heads x {rows:,} {what} + {keys} x "
                    f"{tokens:,} keys) x {size} x {item} B",
                )
            )
        heads, keys, size = _heads(views["student"].text_config)
        item = self._item("student")
        each = batch * (heads * rows + keys * tokens) * size * item
        found.append(
            Line(
                "gradients by q and k",
                len(matching) * each,
                ("student", "losses", "backward"),
                f"{len(matching)} layers x {batch} x ({heads} x {rows:,} + {keys} x {tokens:,}) x {size} "
                f"x {item} B",
            )
        )
        # One sample at a time: scores of both sides in float32, and about as much again.
        others = 0
        if self.with_teacher:
            others = _heads(views["teacher"].text_config)[0] * max(map(len, matching.values()))
        elif self.stage.losses.spec().compare != "pooled":
            found.append(
                Line(
                    "a recorded map",
                    batch * rows * self.shape.visual * 4,
                    ("student",),
                    f"of one layer, {batch} x {rows:,} {what} x {self.shape.visual:,} image tokens x 4 B",
                )
            )
        both = 2 * (heads + others) * rows * tokens * 4
        found.append(
            Line(
                "alignment's workspace",
                min(WORKSPACE_BYTES, both),
                ("student",),
                "at most, of one layer"
                if both >= WORKSPACE_BYTES
                else f"2 x ({heads} + {others} heads) x {rows:,} {what} x {tokens:,} keys x 4 B",
            )
        )
        return found

    def _matching(self) -> Matching:
        """Of a teacher that is not there, every layer of the student may have been recorded."""
        students = list(self.views["student"].attentions)
        if "teacher" not in self.views:
            return dict.fromkeys(students, ())
        teachers = list(self.views["teacher"].attentions)
        return match_layers(self.stage.losses.alignment_layers, students, teachers)

    def _rows(self) -> tuple[int, str]:
        """The most query rows of a sample."""
        rule = self.stage.losses.alignment_rows or self.stage.losses.spec().rows
        name, _, count = str(rule).partition(":")
        if count:
            return min(int(count), self.shape.tokens), "sampled rows"
        known = {
            "all": self.shape.tokens,
            "visual": self.shape.visual,
            "text": self.shape.tokens - self.shape.visual,
            "response": self.shape.labelled,
            "given": self.shape.labelled,
            "instruction": self.shape.tokens - self.shape.visual,
            "last": 1,
        }
        return known.get(name, self.shape.tokens), f"rows ({name})"

    # ---------------------------------------------------------------------- head and inputs

    def _head(self) -> list[Line]:
        losses, stage = self.stage.losses, self.stage
        places = self.shape.batch * max(
            self.shape.labelled if losses.lm or losses.kd else 0,
            self.shape.visual if losses.visual_kd else 0,
        )
        if not places:
            return []
        with_kd = self.with_teacher and bool(losses.kd or losses.visual_kd)
        head = self.views["student"].model.get_output_embeddings().weight
        head_t = self.models.teacher.get_output_embeddings().weight if with_kd else head
        with self.models.running():
            peak = run_head(
                tokens=places,
                widths=(head.shape[1], head_t.shape[1] if with_kd else None),
                vocabularies=(head.shape[0], head_t.shape[0] if with_kd else None),
                dtypes=(self.dtypes["student"], self.dtypes["teacher"]),
                weights=(head.dtype, head_t.dtype),
                trained=head.requires_grad,
                labelled=bool(losses.lm),
                fused=stage.fused_head,
                positions=self.shape.batch * self.shape.tokens,
            )
        how = "a few tokens' logits at a time" if stage.fused_head else "all logits"
        text = f"{places:,} positions x {head.shape[0]:,} words, {how}"
        return [Line("output head and KD", peak, ("losses",), text + " (fake run)")]

    def _inputs(self) -> list[Line]:
        """Pixels, the embeddings and the vision tower's forward."""
        found = []
        config = self.views["student"].config
        vision = getattr(config, "vision_config", None)
        places = self.shape.batch * self.shape.tokens
        width = self.views["student"].text_config.hidden_size
        item = self.dtypes["student"].itemsize
        found.append(
            Line(
                "embeddings",
                2 * places * width * item,
                ("student", "losses", "backward"),
                f"2 x {places:,} tokens x {width:,} x {item} B, with and without the image",
            )
        )
        if vision is None or not self.shape.visual:
            return found
        merge = getattr(vision, "spatial_merge_size", 1) or 1
        patches = self.shape.batch * self.shape.visual * merge**2
        pixels = (
            3 * _single(vision.patch_size) ** 2 * _single(getattr(vision, "temporal_patch_size", 1))
        )
        found.append(
            Line("pixels", patches * pixels * 4, ALWAYS, f"{patches:,} patches x {pixels:,} x 4 B")
        )
        width = vision.hidden_size
        inner = getattr(vision, "intermediate_size", None) or 4 * width
        item = self._item("student")
        each = max(8 * width, 2 * width + 3 * inner)
        found.append(
            Line(
                "vision tower's forward",
                patches * each * item,
                ("teacher",),
                f"{patches:,} patches x {each:,} x {item} B, estimate",
            )
        )
        if {"vision", "all"} & set(self.stage.trains):
            depth = vision.num_hidden_layers
            if self.stage.gradient_checkpointing:
                kept, text = depth * width + 8 * width + 4 * inner, "a layer's input"
            else:
                kept, text = depth * (8 * width + 4 * inner), "8 widths + 4 inner widths"
            found.append(
                Line(
                    "vision tower's activations",
                    patches * kept * item,
                    ("student", "losses", "backward"),
                    f"{patches:,} patches x {depth} layers x {text} x {item} B, estimate",
                )
            )
        return found

    def _item(self, role: str) -> int:
        """Bytes of a number that a linear layer gives."""
        return 2 if self.autocast else self.dtypes[role].itemsize


def _bytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _sizes(model: nn.Module) -> str:
    return _counted(model.parameters())


def _counted(parameters: Iterable[Tensor]) -> str:
    """Number of parameters by type."""
    found: dict[torch.dtype, int] = {}
    for p in parameters:
        found[p.dtype] = found.get(p.dtype, 0) + p.numel()
    return " + ".join(
        f"{number:,} x {dtype.itemsize} B" for dtype, number in sorted(found.items(), key=str)
    )


def _quantised(model: Any, bits: int) -> tuple[int, str]:
    """bitsandbytes quantises every Linear but the output head; the rest keeps its type."""
    head = model.get_output_embeddings()
    small = {
        id(m.weight): m.weight
        for m in model.modules()
        if isinstance(m, nn.Linear) and m is not head
    }
    count = sum(w.numel() for w in small.values())
    rest = _bytes(model) - sum(w.numel() * w.element_size() for w in small.values())
    # 4 bits: one float32 scale for 64 weights. 8 bits: one for a row.
    scales = count // 64 * 4 if bits == 4 else sum(w.shape[0] * 4 for w in small.values())
    return count * bits // 8 + scales + rest, (
        f"{count:,} x {bits} bits + {scales:,} B of scales + {rest:,} B unquantised"
    )


def optimizer_states(optimizer: str, trained: list[nn.Parameter]) -> tuple[int, str]:
    """Bytes of an optimiser's states."""
    count = sum(p.numel() for p in trained)
    size = sum(p.numel() * p.element_size() for p in trained)
    if optimizer == "sgd":
        return 0, "none (sgd without momentum)"
    if optimizer.endswith("_8bit") and "adam" in optimizer:
        return 2 * count + count // 256 * 8, f"2 x {count:,} x 1 B + scales ({optimizer})"
    if optimizer == "adafactor":
        rows = sum(sum(p.shape[-2:]) if p.dim() > 1 else p.numel() for p in trained)
        return 4 * rows, f"{rows:,} row and column means x 4 B (adafactor)"
    known = optimizer.startswith("adamw_torch") or optimizer in ("paged_adamw_32bit",)
    text = f"2 x ({_counted(trained)})"
    return 2 * size, text + ("" if known else f" (as AdamW: {optimizer} is not known to the plan)")


def _heads(config: Any) -> tuple[int, int, int]:
    """(heads, key heads, head size)"""
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, keys, size


def _single(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])
