"""``AttentionAlignment``: the loss on two models' visual attention, formed while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import AlignSpec, resolve_spec
from .cache import TeacherCache
from .calls import Call
from .controls import check_controls
from .matching import Matching, Rule, match_layers
from .step import Step
from .taps import Tap, tapped
from .tokens import Inputs, Rows
from .view import ModelView


class AttentionAlignment:
    """Aligns a student's attention to the visual tokens with a teacher's.

    ::

        alignment = AttentionAlignment(student, teacher, spec="compodistill")
        with alignment.step(inputs):
            with torch.no_grad():
                teacher(**inputs)
            out = student(**inputs)
        loss = out.loss + weight * alignment.loss()

    Inside the step both models run their usual attention; on the way into it, q and k of the
    matched layers are seen. The teacher's are kept, query rows only, until the student's layer has
    used them; each layer's loss and its gradient with respect to q and k are formed inside the
    student's attention call. Outside a step nothing of it remains in either model. It works under
    non-reentrant gradient checkpointing; a reentrant one is refused.

    Args:
        student, teacher: transformers vision-language models of known families
            (``fastalign.models.FAMILIES``), possibly inside PEFT or DistributedDataParallel.
        spec: what is compared: a recipe's name or an ``AlignSpec``.
            In the teacher's place, a ``TeacherCache`` of its recorded targets.
        layers: which layers: see ``match_layers``. None: ``"compodistill"``, or the cache's own.
        rows: which query rows: see ``tokens.choose_rows``. None: the spec's own, or the cache's.
        backend: see ``fused_attn_align_loss``.
        layer_reduction: ``"mean"`` or ``"sum"`` over the matched pairs. None: the spec's own.
        resample: None: student and teacher must have the same tokens. ``"area"``: their patch
            grids, padding and sequence lengths may differ (``grids``).
        columns: ``"visual"``, or as a control ``"text"``: every valid token that is not visual.
        target: ``"teacher"``, or as a control its map ``"shuffled"`` over the compared columns, or a
            ``"random"`` one (``controls.disturbance``).
        generator: of sampled rows and of controls (a CPU generator).
        timer: makes a context that is entered around the alignment's own work inside the two forwards,
            for measurements.
        check_masks: compare the rebuilt visibility with the mask that each model made, at the first
            step with batches of that kind; a difference is an error.

    Attributes:
        matching: student layer -> teacher layers.
        mix: for ``heads="mix"``, a ``ParameterDict`` of one [H_s, H_t] matrix a student layer,
            initially 1 / H_s; give ``mix.parameters()`` to the optimizer. None otherwise.

    Raises:
        ValueError, TypeError: at construction: an unknown family, layer, spec, or one that does not
            fit the models.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | TeacherCache,
        spec: AlignSpec | str = "compodistill",
        layers: Rule | None = None,
        rows: Rows | None = None,
        backend: str = "auto",
        *,
        layer_reduction: str | None = None,
        resample: str | None = None,
        columns: str = "visual",
        target: str = "teacher",
        generator: torch.Generator | None = None,
        timer: Callable[[], AbstractContextManager[object]] = nullcontext,
        check_masks: bool = True,
    ) -> None:
        self.spec = resolve_spec(spec)
        self.student = ModelView("student", student)
        self.cache = teacher if isinstance(teacher, TeacherCache) else None
        self.teacher: ModelView | None = None
        if isinstance(teacher, TeacherCache):
            self.matching = self._recorded_matching(teacher, layers, rows)
        else:
            self.teacher = ModelView("teacher", teacher)
            if self.student.model is self.teacher.model:
                raise ValueError("teacher is the student itself; allowed: two models")
            self.matching = match_layers(
                "compodistill" if layers is None else layers,
                list(self.student.attentions),
                list(self.teacher.attentions),
            )
        self.rows: Rows = self._default_rows() if rows is None else rows
        self.backend = backend
        reduction = self.spec.layer_reduction if layer_reduction is None else layer_reduction
        if reduction not in ("mean", "sum"):
            raise ValueError(
                f"layer_reduction is {layer_reduction!r}; allowed: 'mean', 'sum' or None (the "
                "spec's)"
            )
        self.layer_reduction = reduction
        if resample not in (None, "area"):
            raise ValueError(f"resample is {resample!r}; allowed: None or 'area'")
        self.resample = resample
        check_controls(columns, target)
        if self.cache is not None and (columns, target) != ("visual", "teacher"):
            raise ValueError(
                f"columns is {columns!r} and target {target!r} with a TeacherCache; allowed: 'visual' "
                "and 'teacher', which are what it recorded"
            )
        if resample is not None and columns != "visual":
            raise ValueError(f"columns is {columns!r} with resample; allowed: 'visual'")
        self.columns, self.target = columns, target
        self.generator = generator
        self.timer = timer
        self.check_masks = check_masks
        self.mix = self._make_mix() if self.spec.heads == "mix" else None
        self._checked: set[Any] = set()
        self._step: Step | None = None
        self._taps = self._make_taps()

    def _make_taps(self) -> dict[nn.Module, Tap]:
        """One tap a matched layer; they outlive the steps and ask for the one that runs."""

        def student(layer: int, call: Call) -> Tensor:
            assert self._step is not None
            with self.timer():
                return self._step.see_student(layer, call)

        def take(layer: int, loss: Tensor) -> None:
            assert self._step is not None
            self._step.take(layer, loss)

        def teacher(layer: int, call: Call) -> None:
            assert self._step is not None
            with self.timer():
                self._step.see_teacher(layer, call)

        taps: dict[nn.Module, Tap] = {
            self.student.attentions[i]: Tap(
                partial(student, i),
                partial(take, i),
                None if self.mix is None else self.mix[str(i)],
            )
            for i in self.matching
        }
        if self.teacher is not None:
            for i in dict.fromkeys(t for group in self.matching.values() for t in group):
                taps[self.teacher.attentions[i]] = Tap(partial(teacher, i))
        return taps

    def _recorded_matching(
        self, cache: TeacherCache, layers: Rule | None, rows: Rows | None
    ) -> Matching:
        if layers is not None or rows is not None:
            raise ValueError(
                "layers or rows is given with a TeacherCache; allowed: None, as both were chosen when "
                "it was recorded"
            )
        # How units are summed up is no matter of the teacher's maps.
        summed: dict[str, Any] = {"reduction": "mean", "layer_reduction": "mean"}
        if replace(self.spec, **summed) != replace(cache.spec, **summed):
            raise ValueError(
                f"spec is {self.spec} and the cache was recorded for {cache.spec}; allowed: the "
                "recorded one"
            )
        for layer in cache.matching:
            if layer not in self.student.attentions:
                raise ValueError(
                    f"the cache holds targets of student layer {layer}; allowed: layers of the "
                    f"student with softmax attention, {list(self.student.attentions)}"
                )
        return cache.matching

    def _default_rows(self) -> str:
        if self.spec.rows == "given":
            return "response"
        return self.spec.rows

    def _make_mix(self) -> nn.ParameterDict:
        heads_s = self.student.text_config.num_attention_heads
        if self.teacher is None:
            raise ValueError("spec.heads is 'mix' with a TeacherCache; allowed: 'mean' or 'each'")
        heads_t = self.teacher.text_config.num_attention_heads
        device = next(self.student.model.parameters()).device
        return nn.ParameterDict(
            {
                str(layer): nn.Parameter(
                    torch.full((heads_s, heads_t * len(group)), 1 / heads_s, device=device)
                )
                for layer, group in self.matching.items()
            }
        )

    @contextmanager
    def step(
        self,
        inputs: Inputs,
        *,
        teacher_inputs: Inputs | None = None,
        samples: Sequence[int | str] | None = None,
    ) -> Iterator[Step]:
        """Run the teacher, then the student, inside; with a ``TeacherCache`` the student alone.

        Args:
            inputs: the batch, as it is given to the student: input_ids, attention_mask, labels
                where rows need them, and whatever else the processor made.
            teacher_inputs: the teacher's batch where it is another one. None: the same.
            samples: with a ``TeacherCache``, the recorded sample of each sample of the batch, by its
                number or, where names were recorded, by its name.

        Raises:
            ValueError: the batches do not fit each other, or lack something.
            RuntimeError: the teacher was forgotten, a matched layer did not run or ran twice, a
                mask that cannot be rebuilt, reentrant checkpointing.
        """
        self._step = None  # the last step's graph goes before this one's begins
        with self.timer():
            step = Step(self, inputs, teacher_inputs, samples)
        self._step = step
        try:
            with ExitStack() as stack:
                for view in (self.student, self.teacher):
                    if view is not None:
                        stack.enter_context(view.capturing())
                stack.enter_context(tapped(self._taps))
                yield step
            step.check_complete()
        except BaseException:
            self._step = None
            raise
        finally:
            step.release_teacher()

    def loss(self) -> Tensor:
        """The loss of the last step over all matched pairs: a scalar with gradients to the student.

        Raises:
            RuntimeError: no step was completed.
        """
        losses = list(self._finished().losses.values())
        total = torch.stack([loss.to(losses[0].device) for loss in losses])
        return total.mean() if self.layer_reduction == "mean" else total.sum()

    def release(self) -> None:
        """Let go of the last step, with its losses and their graph, before the next one begins."""
        self._step = None

    def metrics(self) -> dict[str, float]:
        """``loss``, and for each student layer ``layer_<i>/loss`` and its ``similarity``.

        The similarity is the mean cosine, given where the spec's loss is one minus it.
        """
        losses = self._finished().losses
        found = {"loss": float(self.loss().detach())}
        cosine = self.spec.divergence == "cosine" and self.spec.reduction == "mean"
        for layer, loss in losses.items():
            value = float(loss.detach())
            found[f"layer_{layer}/loss"] = value
            if cosine:
                found[f"layer_{layer}/similarity"] = 1 - value
        return found

    def _finished(self) -> Step:
        if self._step is None or not self._step.complete:
            raise RuntimeError(
                "no step was completed; allowed: after `with alignment.step(inputs): ...`, in "
                "which teacher and student both ran"
            )
        return self._step
