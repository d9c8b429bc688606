"""One step: what the taps of teacher and student do with the calls that they see."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..api import fused_attn_align_loss
from .capture import Call, Tap
from .grids import Grid, corresponding_rows, grids_of, resample
from .layer import (
    LayerState,
    concatenable,
    concatenate,
    first_rows,
    form_loss,
    materialise,
)
from .tokens import Inputs, RowChoice, Tokens, choose_rows, read_tokens
from .view import ModelView, reentrant_message
from .visibility import check_mask, layer_visibility, same_visibility

if TYPE_CHECKING:
    from .alignment import AttentionAlignment


class Step:
    """The state of one forward of teacher and student.

    Attributes:
        losses: student layer -> scalar loss, in the order in which the layers ran.
        complete: whether every matched student layer has run.
    """

    def __init__(
        self, alignment: AttentionAlignment, inputs: Inputs, teacher_inputs: Inputs
    ) -> None:
        self.owner = alignment
        self.inputs = {"student": inputs, "teacher": teacher_inputs}
        student, teacher = alignment.student, alignment.teacher
        self.tokens = {
            "student": read_tokens(student, inputs),
            "teacher": read_tokens(teacher, teacher_inputs),
        }
        student.check_checkpointing(tuple(alignment.matching))
        self.rows: RowChoice = choose_rows(
            alignment.rows, self.tokens["student"], inputs, alignment.generator
        )
        self.teacher_rows = self.rows
        self.grids: tuple[list[list[Grid]], list[list[Grid]]] | None = None  # teacher, student
        if not self._same_tokens():
            self._relate_tokens()
        self.losses: dict[int, Tensor] = {}
        self.teacher_states: dict[int, LayerState] = {}
        self.uses: dict[int, int] = {}  # teacher layer -> student layers that still need it
        for group in alignment.matching.values():
            for layer in group:
                self.uses[layer] = self.uses.get(layer, 0) + 1
        self.kind = frozenset(name for name, value in inputs.items() if value is not None)

    def _same_tokens(self) -> bool:
        student, teacher = self.tokens["student"], self.tokens["teacher"]
        return student is teacher or all(
            ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours.device))
            for ours, theirs in (
                (student.visual, teacher.visual),
                (student.valid, teacher.valid),
            )
        )

    def _relate_tokens(self) -> None:
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
        positions = corresponding_rows(self.rows.positions, student, teacher)
        self.teacher_rows = RowChoice(positions, False, None)
        self.grids = (
            grids_of(self.owner.teacher, teacher, self.inputs["teacher"]),
            grids_of(self.owner.student, student, self.inputs["student"]),
        )

    # ------------------------------------------------------------------------- taps

    def taps(self) -> dict[nn.Module, Tap]:
        """The taps of all matched layers."""
        found: dict[nn.Module, Tap] = {}
        for layer in self.owner.matching:
            found[self.owner.student.attentions[layer]] = partial(self._see_student, layer)
        for layer in self.uses:
            found[self.owner.teacher.attentions[layer]] = partial(self._see_teacher, layer)
        return found

    def _see_teacher(self, layer: int, call: Call) -> None:
        if layer in self.teacher_states or not self.uses[layer]:
            raise RuntimeError(
                f"teacher layer {layer} ran twice in one step; allowed: one forward of the "
                "teacher, then one of the student"
            )
        state = self._state(self.owner.teacher, layer, call)
        self.teacher_states[layer] = state.detach()

    def _see_student(self, layer: int, call: Call) -> None:
        if layer in self.losses:
            raise RuntimeError(
                f"student layer {layer} ran twice in one step; allowed: one forward of the "
                "teacher, then one of the student (gradient accumulation: a step for each batch)"
            )
        if call.grad and not torch.is_grad_enabled():
            raise RuntimeError(reentrant_message("student", layer))
        group = self.owner.matching[layer]
        missing = [t for t in group if t not in self.teacher_states]
        if missing:
            raise RuntimeError(
                f"student layer {layer} ran before teacher layers {missing}; allowed: call the "
                "teacher first in the step, `with torch.no_grad(): teacher(**inputs)`"
            )
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            state = self._state(self.owner.student, layer, call)
        teachers = [self.teacher_states[t].to(state.q.device) for t in group]
        self.losses[layer] = self._pair_loss(layer, state, teachers)
        for t in group:
            self.uses[t] -= 1
            if not self.uses[t]:
                del self.teacher_states[t]

    def _state(self, view: ModelView, layer: int, call: Call) -> LayerState:
        tokens: Tokens = self.tokens[view.role]
        length = tokens.valid.shape[1]
        if call.query.shape[2] != length or call.key.shape[2] != length:
            raise RuntimeError(
                f"{view.role} layer {layer} ran with {call.query.shape[2]} queries and "
                f"{call.key.shape[2]} keys, and the step's batch has length {length}; allowed: "
                "whole sequences without a filled cache (generate outside of the step)"
            )
        visibility = layer_visibility(view, layer, call, tokens, self.inputs[view.role])
        checked = (view.role, layer, self.kind)
        if self.owner.check_masks and checked not in self.owner._checked:
            check_mask(view, layer, visibility, call.mask)
            self.owner._checked.add(checked)
        scale = call.query.shape[-1] ** -0.5 if call.scaling is None else float(call.scaling)
        rows = self.rows if view is self.owner.student else self.teacher_rows
        return LayerState(
            q=rows.slice(call.query),
            k=call.key,
            scale=scale,
            softcap=call.softcap,
            sinks=call.sinks,
            visibility=visibility,
        )

    # ------------------------------------------------------------------------- loss

    def _pair_loss(self, layer: int, state: LayerState, teachers: list[LayerState]) -> Tensor:
        arguments: dict[str, Any] = {
            "visual_mask": self.tokens["student"].visual,
            "attention_mask": state.visibility.segments >= 0,
            "segment_ids": state.visibility.segments,
            "block_ids": state.visibility.blocks,
            "causal": state.visibility.causal,
            "window": state.visibility.window or None,
            "query_positions": self.rows.positions,
            "row_weight": self.rows.weight,
            "scale_s": state.scale,
            "softcap_s": state.softcap,
            "sink_s": state.sinks,
            "spec": self.owner.spec,
            "backend": self.owner.backend,
        }
        arguments = {name: _on(value, state.q.device) for name, value in arguments.items()}
        arguments.update(self._target(state, teachers))
        mix = None if self.owner.mix is None else self.owner.mix[str(layer)]
        return form_loss(partial(_call_core, arguments), state.q, state.k, mix)

    def _target(self, state: LayerState, teachers: list[LayerState]) -> dict[str, Any]:
        """The teacher's side: q and k where one call of the core can express it, else its map.

        The core has one visibility for both sides. Layers of the teacher that see other tokens than
        the student's layer (a sliding window beside full attention), or that differ among themselves,
        give their map, head-free but rows x columns; entries that the student's layer cannot see are
        then not compared.
        """
        alike = concatenable(teachers) and all(
            same_visibility(state.visibility, teacher.visibility) for teacher in teachers
        )
        if alike and self.grids is None:
            teacher = concatenate(teachers)
            return {
                "q_t": teacher.q,
                "k_t": teacher.k,
                "scale_t": teacher.scale,
                "softcap_t": teacher.softcap,
                "sink_t": teacher.sinks,
            }
        device = state.q.device
        columns, positions = self.tokens["teacher"].visual, self.teacher_rows.positions
        spec = self.owner.spec
        maps = [materialise(t, positions.to(device), columns.to(device), spec) for t in teachers]
        target = torch.stack(maps).mean(0) if spec.heads == "mean" else torch.cat(maps, dim=1)
        target = first_rows(target, positions.to(device))
        if self.grids is not None:
            target = resample(target, *self.grids)
        if spec.compare == "pooled":
            raise ValueError(
                "spec.compare is 'pooled' and the teacher's layers see other tokens than the "
                "student's (or have another grid); allowed: 'map' or 'row', or layers that see the same"
            )
        return {"target": target}

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


def _call_core(arguments: dict[str, Any], q: Tensor, k: Tensor, mix: Tensor | None) -> Tensor:
    return fused_attn_align_loss(q, k, mix=mix, **arguments)


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _same(x: Tensor) -> Tensor:
    return x
