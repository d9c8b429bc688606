"""One step: what the taps of teacher and student do with the calls that they see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..api import fused_attn_align_loss
from .calls import Call
from .controls import Disturb, compared_columns, disturbance
from .grids import Relation, relate
from .layer import (
    LayerState,
    concatenable,
    concatenate,
    first_rows,
    form_loss,
    materialise,
    own_saving,
)
from .observe import state_of
from .tokens import Inputs, RowChoice, Tokens, choose_rows, read_tokens
from .view import ModelView, reentrant_message
from .visibility import check_mask, same_visibility

if TYPE_CHECKING:
    from .alignment import AttentionAlignment
    from .cache import TeacherCache


class Step:
    """The state of one forward of teacher and student.

    Attributes:
        losses: student layer -> scalar loss, in the order in which the layers ran.
        complete: whether every matched student layer has run.
    """

    def __init__(
        self,
        alignment: AttentionAlignment,
        inputs: Inputs,
        teacher_inputs: Inputs | None,
        samples: Sequence[int | str] | None,
    ) -> None:
        self.owner = alignment
        alignment.student.check_checkpointing(tuple(alignment.matching))
        self.inputs: dict[str, Inputs] = {"student": inputs}
        self.tokens = {"student": read_tokens(alignment.student, inputs)}
        self.losses: dict[int, Tensor] = {}
        self.seen: set[int] = set()  # student layers that ran
        self.teacher_states: dict[int, LayerState] = {}
        self.uses: dict[int, int] = {}  # teacher layer -> student layers that still need it
        self.relation: Relation | None = None  # to a teacher whose tokens are others
        self.samples: list[int] | None = None
        self.disturb: Disturb | None = None
        if alignment.cache is not None:
            self.rows = self._recorded_rows(alignment.cache, inputs, samples)
        else:
            self.rows = choose_rows(
                alignment.rows, self.tokens["student"], inputs, alignment.generator
            )
            self._expect_teacher(inputs if teacher_inputs is None else teacher_inputs)
        self.kind = frozenset(name for name, value in inputs.items() if value is not None)

    def _recorded_rows(
        self, cache: TeacherCache, inputs: Inputs, samples: Sequence[int | str] | None
    ) -> RowChoice:
        if samples is None:
            raise ValueError(
                "samples is None; allowed with a TeacherCache: the number or name of the recorded "
                "sample of each sample of the batch"
            )
        self.samples = cache.numbered(samples)
        cache.check_samples(self.samples, inputs, self.tokens["student"])
        return cache.rows(self.samples, self.tokens["student"])

    def _expect_teacher(self, inputs: Inputs) -> None:
        teacher = self.owner.teacher
        assert teacher is not None
        self.inputs["teacher"] = inputs
        self.tokens["teacher"] = read_tokens(teacher, inputs)
        self.teacher_rows = self.rows
        if not self._same_tokens():
            self._relate_tokens(teacher)
        compared = compared_columns(self.owner.columns, self.tokens["teacher"])
        self.disturb = disturbance(self.owner.target, compared, self.owner.generator)
        for group in self.owner.matching.values():
            for layer in group:
                self.uses[layer] = self.uses.get(layer, 0) + 1

    def _same_tokens(self) -> bool:
        student, teacher = self.tokens["student"], self.tokens["teacher"]
        return student is teacher or all(
            ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours.device))
            for ours, theirs in (
                (student.visual, teacher.visual),
                (student.valid, teacher.valid),
            )
        )

    def _relate_tokens(self, view: ModelView) -> None:
        """Rows and grids of a teacher whose tokens lie elsewhere, if that was asked for."""
        student, teacher = self.tokens["student"], self.tokens["teacher"]
        if self.owner.resample is None:
            ours, theirs = student.visual.sum(-1).tolist(), teacher.visual.sum(-1).tolist()
            what = (
                f"image tokens per sample: student {ours}, teacher {theirs}"
                if ours != theirs
                else "tokens, padding or image tokens of student and teacher lie at other positions"
            )
            raise ValueError(
                f"{what} (batches of {list(student.valid.shape)} and {list(teacher.valid.shape)}); "
                "allowed: the same tokens in both, or resample='area'"
            )
        self.relation = relate(
            (self.owner.student, student, self.inputs["student"]),
            (view, teacher, self.inputs["teacher"]),
            self.rows,
        )
        self.rows, self.teacher_rows = self.relation.rows, self.relation.teacher_rows

    # ------------------------------------------------------------------------- taps

    def see_teacher(self, layer: int, call: Call) -> None:
        """Keep what the student's layers will need of a teacher layer."""
        if layer in self.teacher_states or not self.uses[layer]:
            raise RuntimeError(
                f"teacher layer {layer} ran twice in one step; allowed: one forward of the "
                "teacher, then one of the student"
            )
        assert self.owner.teacher is not None
        with torch.inference_mode(False):  # the teacher may run in it, what is kept may not
            state = self._state(self.owner.teacher, layer, call).detach()
            if call.borrowed or call.key.is_inference():
                state = state.copy()
            if self.disturb:
                state = replace(self.disturb(state), lse=None)
        self.teacher_states[layer] = state

    def see_student(self, layer: int, call: Call) -> Tensor:
        """Form the loss of a student layer; let go of teacher layers that no other needs."""
        if layer in self.seen:
            raise RuntimeError(
                f"student layer {layer} ran twice in one step; allowed: one forward of the "
                "teacher, then one of the student (gradient accumulation: a step for each batch)"
            )
        if call.grad and not torch.is_grad_enabled():
            raise RuntimeError(reentrant_message("student", layer))
        group = self.owner.matching[layer] if self.owner.cache is None else ()
        missing = [t for t in group if t not in self.teacher_states]
        if missing:
            raise RuntimeError(
                f"student layer {layer} ran before teacher layers {missing}; allowed: call the "
                "teacher first in the step, `with torch.no_grad(): teacher(**inputs)`"
            )
        with own_saving():
            state = self._state(self.owner.student, layer, call)
        teachers = [self.teacher_states[t].to(state.q.device) for t in group]
        loss = self._pair_loss(layer, state, teachers)
        self.seen.add(layer)
        for t in group:
            self.uses[t] -= 1
            if not self.uses[t]:
                del self.teacher_states[t]
        return loss

    def take(self, layer: int, loss: Tensor) -> None:
        """Keep the loss of a student layer, as the student's graph has it."""
        self.losses[layer] = loss

    def _state(self, view: ModelView, layer: int, call: Call) -> LayerState:
        tokens: Tokens = self.tokens[view.role]
        rows = self.rows if view is self.owner.student else self.teacher_rows
        state = state_of(view, layer, call, tokens, rows, self.inputs[view.role])
        checked = (view.role, layer, self.kind)
        if self.owner.check_masks and checked not in self.owner._checked:
            check_mask(view, layer, state.visibility, call, self.inputs[view.role])
            self.owner._checked.add(checked)
        return state

    # ------------------------------------------------------------------------- loss

    def _pair_loss(self, layer: int, state: LayerState, teachers: list[LayerState]) -> Tensor:
        arguments: dict[str, Any] = {
            "visual_mask": self._columns("student"),
            "attention_mask": state.visibility.segments >= 0,
            "segment_ids": state.visibility.segments,
            "block_ids": state.visibility.blocks,
            "causal": state.visibility.causal,
            "window": state.visibility.window or None,
            "query_positions": self.rows.positions,
            "row_weight": self.rows.weight,
            "scale_s": state.scale,
            "softcap_s": state.softcap,
            "lse_s": state.lse,
            "spec": self.owner.spec,
            "backend": self.owner.backend,
        }
        arguments = {name: _on(value, state.q.device) for name, value in arguments.items()}
        arguments.update(self._target(layer, state, teachers))
        if not self._joint_softmax:  # what the model's attention normalised with is of no use
            arguments.update(dict.fromkeys(("lse_s", "lse_t")))
        sinks = state.sinks
        if self.owner.spec.normalize == "none":  # scores have no softmax that sinks could join
            sinks = None
            arguments.pop("sink_t", None)
        mix = None if self.owner.mix is None else self.owner.mix[str(layer)]
        return form_loss(partial(_call_core, arguments), state.q, state.k, mix, sinks)

    def _target(self, layer: int, state: LayerState, teachers: list[LayerState]) -> dict[str, Any]:
        """The teacher's side: q and k where one call of the core can express it, else its map.

        The core has one visibility for both sides. Layers of the teacher that see other tokens than
        the student's layer (a sliding window beside full attention), or that differ among themselves,
        give their map, head-free but rows x columns; entries that the student's layer cannot see are
        then not compared.
        """
        if self.owner.cache is not None:
            assert self.samples is not None
            return dict(self.owner.cache.target(self.samples, layer, state.q.device))
        alike = concatenable(teachers) and all(
            same_visibility(state.visibility, teacher.visibility) for teacher in teachers
        )
        if alike and self.relation is None:
            teacher = concatenate(teachers)
            return {
                "q_t": teacher.q,
                "k_t": teacher.k,
                "scale_t": teacher.scale,
                "softcap_t": teacher.softcap,
                "sink_t": teacher.sinks,
                "lse_t": teacher.lse,
            }
        device = state.q.device
        columns, positions = self._columns("teacher"), self.teacher_rows.positions
        spec = self.owner.spec
        maps = [materialise(t, positions.to(device), columns.to(device), spec) for t in teachers]
        target = torch.stack(maps).mean(0) if spec.heads == "mean" else torch.cat(maps, dim=1)
        if self.relation is not None:
            target, positions = self.relation.apply(target), self.rows.positions
        target = first_rows(target, positions.to(device))
        if spec.compare == "pooled":
            raise ValueError(
                "spec.compare is 'pooled' and the teacher's layers see other tokens than the "
                "student's (or have another grid); allowed: 'map' or 'row', or layers that see the same"
            )
        return {"target": target}

    def _columns(self, role: str) -> Tensor:
        """[B, L] bool: the compared columns of a model."""
        if self.relation is not None:
            of_student = role == "student"
            return self.relation.columns if of_student else self.relation.teacher_columns
        return compared_columns(self.owner.columns, self.tokens[role])

    @property
    def _joint_softmax(self) -> bool:
        """Whether the loss normalises as the model's own attention does."""
        return self.owner.spec.sweeps_all_keys and self.owner.spec.temperature == 1

    # -------------------------------------------------------------------------- end

    @property
    def complete(self) -> bool:
        return len(self.losses) == len(self.owner.matching)

    def check_complete(self) -> None:
        """Raises: RuntimeError: matched student layers that did not run."""
        missing = [layer for layer in self.owner.matching if layer not in self.losses]
        if missing:
            raise RuntimeError(
                f"student layers {missing} did not run in the step; allowed: `with "
                "torch.no_grad(): teacher(**inputs)` and then `student(**inputs)` inside `with "
                "alignment.step(inputs)`"
            )

    def release_teacher(self) -> None:
        """Drop what is left of the teacher's q and k."""
        self.teacher_states.clear()


def _call_core(
    arguments: dict[str, Any], q: Tensor, k: Tensor, mix: Tensor | None, sinks: Tensor | None
) -> Tensor:
    return fused_attn_align_loss(q, k, mix=mix, sink_s=sinks, **arguments)


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
