"""All loss terms of a batch, normalised over the whole optimiser step.

Every term is a sum over units divided by the number of units: labelled tokens, image tokens, samples
with an image, compared attention units. With gradient accumulation or several processes the number
is that of the *whole* step, so that 8 samples at once, 4 x 2 and 8 x 1 are the same objective.
``count`` gives a batch's numbers, and the trainer adds them up before the first batch runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..maths import unit_count
from ..models import AttentionAlignment, TeacherCache
from ..models.cache import AnswerLogits
from ..models.controls import compared_columns
from ..models.tokens import Tokens, choose_rows, has_images, read_tokens
from ..models.view import ModelView
from .features import hidden_sum, relation_loss
from .fused import Recorded, fused_linear_losses
from .heads import HeadTap, check_headless, tapped_head
from .losses import kd_sum, lm_sum, predicted, predicting, recorded_kd_sum, wide
from .terms import RECORDED_TERMS, Losses
from .timing import Stopwatch
from .vision import same_tower, shared_tower

Batch = Mapping[str, Any]
#: Entries of a batch that are for the trainer and not for the models.
NOT_INPUTS = ("labels", "skipped_samples", "recorded")


class Objective:
    """The weighted sum of a stage's terms for one student and its teacher.

    Args:
        student, teacher: transformers models; the teacher may be None where no term needs it, or its
            recorded targets: batches then have ``recorded``, the number of each sample in them.
        losses: what is summed.
        fused_head: see ``fused_linear_losses``; False forms all logits.
        share_vision: "auto": the tower is run once if it is the same and frozen; "never".
        whole_step: the batch is all there is of an optimiser step, so that the alignment's own
            reduction can be used as it is.
        stopwatch: told which part of the step runs.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | TeacherCache | None,
        losses: Losses,
        *,
        fused_head: bool = True,
        share_vision: str = "auto",
        whole_step: bool = False,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        if teacher is None and losses.needs_teacher:
            needing = [name for name in losses.weights if name != "lm"]
            raise ValueError(
                f"teacher is None and the terms {needing} need one; allowed: a teacher"
            )
        if share_vision not in ("auto", "never"):
            raise ValueError(f"share_vision is {share_vision!r}; allowed: 'auto', 'never'")
        self.losses = losses
        self.weights = losses.weights
        self.fused_head = fused_head
        self.student = ModelView("student", student)
        self.cache = teacher if isinstance(teacher, TeacherCache) else None
        self.teacher = (
            ModelView("teacher", teacher)
            if isinstance(teacher, nn.Module) and losses.needs_teacher
            else None
        )
        if self.cache is not None:
            check_cache(self.cache, losses, self.student)
        self.shares_vision = (
            self.teacher is not None
            and share_vision == "auto"
            and same_tower(self.student.model, self.teacher.model)
        )
        self.whole_step = whole_step
        self.stopwatch = stopwatch or Stopwatch(torch.device("cpu"))
        self.alignment = self._make_alignment() if losses.alignment else None
        self.extra = nn.ModuleDict()
        if losses.hidden:
            assert self.teacher is not None
            widths = [v.text_config.hidden_size for v in (self.student, self.teacher)]
            if widths[0] != widths[1]:
                head = self.student.model.get_output_embeddings().weight
                dtype = torch.promote_types(head.dtype, torch.float32)
                self.extra["projection"] = nn.Linear(*widths, device=head.device, dtype=dtype)  # type: ignore[misc]
        if self.alignment is not None and self.alignment.mix is not None:
            self.extra["mix"] = self.alignment.mix
        self._checked = False

    # ------------------------------------------------------------------- alignment

    def _make_alignment(self) -> AttentionAlignment:
        spec = self.losses.spec()
        if not self.whole_step:
            if spec.reduction == "element_mean":
                raise ValueError(
                    "alignment_spec.reduction is 'element_mean' with gradient accumulation or several "
                    "processes; allowed: 'mean' or 'sum'"
                )
            types = getattr(self.student.text_config, "layer_types", None) or ["full_attention"]
            if spec.compare == "row" and set(types) != {"full_attention"}:
                raise ValueError(
                    "alignment_spec.compare is 'row' with gradient accumulation or several processes "
                    f"on a student with {sorted(set(types))}: the number of rows that see a visual "
                    "token differs by layer; allowed: compare 'map', or one batch a step"
                )
        chosen = spec if self.whole_step else replace(spec, reduction="sum")
        layers: Any = self.losses.alignment_layers
        rows = self.losses.alignment_rows
        teacher: nn.Module | TeacherCache
        if self.cache is not None:  # layers and rows were chosen when it was recorded
            teacher, layers, rows = self.cache, None, None
        else:
            assert self.teacher is not None
            teacher = self.teacher.model
        return AttentionAlignment(
            self.student.model,
            teacher,
            spec=chosen,
            layers=layers,
            rows=rows,
            columns=self.losses.alignment_columns,
            target=self.losses.alignment_target,
            timer=lambda: self.stopwatch.part("alignment"),
        )

    def _alignment_units(self, tokens: Tokens, batch: Batch) -> float:
        """How many units a matched pair compares, from the tokens alone: 0 where there is none."""
        alignment = self.alignment
        spec = self.losses.spec()
        if alignment is None or self.whole_step or spec.reduction == "sum":
            return 0.0
        rule = alignment.rows if self.cache is None else self.cache.manifest["rows"]
        if isinstance(rule, str):
            rule = rule.partition(":")[0]  # a sample's weights add up to the number of all rows
        positions = choose_rows(rule, tokens, batch).positions
        columns = compared_columns(alignment.columns, tokens)
        seen = (columns.cumsum(-1) > 0) if spec.causal else columns.any(-1, True)
        used = positions >= 0
        seen = seen.expand_as(tokens.valid).gather(1, positions.clamp(min=0)) & used
        groups = 1
        if spec.heads == "each":
            groups = self.student.text_config.num_attention_heads
        elif spec.heads == "mix":
            assert self.teacher is not None
            windows = {len(group) for group in alignment.matching.values()}
            groups = self.teacher.text_config.num_attention_heads * max(windows)
        if not seen.any():  # the loss divides by 1 there, the step's count must not grow
            return 0.0
        return float(unit_count(spec, used.double(), seen.double(), groups))

    # ----------------------------------------------------------------------- counts

    def count(self, batch: Batch) -> dict[str, float]:
        """The number of units of each term in a batch (0 where a term needs none)."""
        tokens = read_tokens(self.student, batch)
        labelled = float(predicting(batch["labels"]).sum())
        numbers = {
            "lm": labelled,
            "kd": labelled,
            "visual_kd": float(tokens.visual.sum()),
            "hidden": float(tokens.valid.sum()),
            "relation": float(tokens.visual.any(-1).sum()),
            "alignment": self._alignment_units(tokens, batch) if self.alignment else 0.0,
        }
        return {name: numbers[name] for name in self.weights}

    def _divisor(self, name: str, counts: Mapping[str, float]) -> float:
        if name == "alignment" and (self.whole_step or self.losses.spec().reduction == "sum"):
            return 1.0
        return max(1.0, counts[name])

    # ---------------------------------------------------------------------- the step

    def __call__(
        self, run: Callable[..., Any], batch: Batch, counts: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(total with gradient, the terms without): this batch's share of the step's loss.

        Args:
            run: the student's forward, as the trainer has wrapped it.
            batch: input_ids, attention_mask, labels and all else that the processor gave.
            counts: of the whole step.
        """
        inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
        images = has_images(inputs)
        with ExitStack() as stack:
            enter = stack.enter_context
            if self.alignment is not None:
                enter(
                    self.alignment.step(
                        {**inputs, "labels": batch["labels"]}, samples=batch.get("recorded")
                    )
                )
            if self.shares_vision and images:
                assert self.teacher is not None
                enter(shared_tower(self.student.model, self.teacher.model))
            taps: dict[str, HeadTap] = {}
            logits: dict[str, Tensor] = {}
            for view in (self.teacher, self.student):
                if view is None:
                    continue
                tap = enter(tapped_head(view.role, view.model, headless=self.fused_head))
                with self.stopwatch.part(view.role):
                    if view is self.student:
                        out = run(**inputs, use_cache=False)
                    else:
                        with torch.no_grad():
                            out = view.model(**inputs, use_cache=False)
                if self.fused_head and not self._checked:
                    check_headless(tap, out.logits)
                taps[view.role], logits[view.role] = tap, out.logits
            self._checked = True
        with self.stopwatch.part("losses"):
            total, terms = self._terms(batch, taps, logits, counts)
        # Parameters that a batch without images (or without answers) does not reach still take part:
        # DistributedDataParallel waits for every gradient.
        total = total + 0.0 * taps["student"].hidden.sum().to(total.dtype)
        if not images:
            for name, parameter in self.student.model.named_parameters():
                if parameter.requires_grad and ("projector" in name or "vis" in name):
                    total = total + 0.0 * parameter.sum().to(total.dtype)
        return total, terms

    def _terms(
        self,
        batch: Batch,
        taps: dict[str, HeadTap],
        logits: dict[str, Tensor],
        counts: Mapping[str, float],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scaled = {
            name: weight / self._divisor(name, counts) for name, weight in self.weights.items()
        }
        parts: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        tokens = read_tokens(self.student, batch)
        if "lm" in scaled or "kd" in scaled:
            rows, targets = predicting(batch["labels"]), predicted(batch["labels"])
            part, lm, kd = self._logit_terms(
                batch, taps, logits, rows, targets, scaled.get("lm", 0.0), scaled.get("kd", 0.0)
            )
            parts.append(part)
            sums |= {n: v for n, v in (("lm", lm), ("kd", kd)) if n in scaled}
        if "visual_kd" in scaled:
            part, _, kd = self._logit_terms(
                batch, taps, logits, tokens.visual, None, 0.0, scaled["visual_kd"]
            )
            parts.append(part)
            sums["visual_kd"] = kd
        if "hidden" in scaled or "relation" in scaled:
            states = {role: tap.hidden for role, tap in taps.items()}
        if "hidden" in scaled:
            ours = states["student"][tokens.valid]
            if "projection" in self.extra:
                ours = self.extra["projection"](wide(ours))
            theirs = states["teacher"][tokens.valid].to(ours.device)
            sums["hidden"] = hidden_sum(ours, theirs, self.losses.hidden_distance)
            parts.append(scaled["hidden"] * sums["hidden"])
        if "relation" in scaled:
            found = [
                relation_loss(states["student"][i][mask], states["teacher"][i][mask])
                for i, mask in enumerate(tokens.visual)
                if mask.any()
            ]
            if found:
                sums["relation"] = torch.stack(found).sum()
                parts.append(scaled["relation"] * sums["relation"])
        if self.alignment is not None:
            sums["alignment"] = self.alignment.loss()
            parts.append(scaled["alignment"] * sums["alignment"])
        zero = taps["student"].hidden.new_zeros((), dtype=torch.float32)
        terms = {
            name: sums.get(name, zero).detach() / self._divisor(name, counts)
            for name in self.weights
        }
        total = zero
        for part in parts:
            total = total + part.to(zero.device)
        return total, terms

    def _recorded(self, batch: Batch, rows: Tensor) -> Recorded:
        """What the teacher predicted at the marked positions [B, L]."""
        assert self.cache is not None
        samples = batch.get("recorded")
        if samples is None:
            raise ValueError(
                "the batch lacks 'recorded'; allowed with a TeacherCache: the number of each sample in it"
            )
        found = self.cache.answer_logits(samples, rows.sum(-1).tolist())
        answers = AnswerLogits(*(tensor.to(rows.device) for tensor in found))
        return Recorded(answers, int(self.cache.manifest["vocabulary"]))

    def _logit_terms(
        self,
        batch: Batch,
        taps: dict[str, HeadTap],
        logits: dict[str, Tensor],
        rows: Tensor,
        targets: Tensor | None,
        lm_weight: float,
        kd_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(weighted sum, LM sum, KD sum) at the marked positions [B, L]."""
        options: Any = {
            "divergence": self.losses.kd_divergence,
            "temperature": self.losses.kd_temperature,
        }
        if not lm_weight:
            targets = None
        with_teacher = bool(kd_weight) and self.cache is None
        recorded = self._recorded(batch, rows) if kd_weight and self.cache is not None else None
        if self.fused_head:
            student = taps["student"]
            theirs = taps["teacher"] if with_teacher else None
            device = student.hidden.device
            found = fused_linear_losses(
                student.hidden[rows],
                student.weight,
                targets,
                None if theirs is None else theirs.hidden[rows.to(theirs.hidden.device)].to(device),
                None if theirs is None else theirs.weight.to(device),
                lm_weight=lm_weight,
                kd_weight=kd_weight,
                recorded=recorded,
                **options,
            )
            return found.total, found.lm, found.kd
        ours = logits["student"][rows]
        zero = ours.new_zeros((), dtype=torch.float32)
        lm = zero if targets is None else lm_sum(ours, targets)
        kd = zero
        if with_teacher:
            theirs_logits = logits["teacher"][rows.to(logits["teacher"].device)].to(ours.device)
            kd = kd_sum(ours, theirs_logits, **options)
        if recorded is not None:
            vocabulary = recorded.vocabulary
            kd = recorded_kd_sum(ours, recorded.answers, vocabulary=vocabulary, **options)
        return lm_weight * lm + kd_weight * kd, lm, kd


def check_cache(cache: TeacherCache, losses: Losses, student: ModelView) -> None:
    """Raises: ValueError: recorded targets that do not serve these losses and this student."""
    if losses.live_terms:
        raise ValueError(
            f"teacher is a TeacherCache and losses has {losses.live_terms}; allowed with it: "
            f"{', '.join(RECORDED_TERMS)}"
        )
    made = cache.manifest
    if losses.kd and made["temperature"] != losses.kd_temperature:
        raise ValueError(
            f"losses.kd_temperature is {losses.kd_temperature} and the cache was recorded at "
            f"{made['temperature']}; allowed: the same"
        )
    vocabulary = student.model.get_output_embeddings().weight.shape[0]
    if losses.kd and made["vocabulary"] > vocabulary:
        raise ValueError(
            f"the cache's vocabulary has {made['vocabulary']} tokens and the student's {vocabulary}; "
            "allowed: one that was recorded for this student"
        )
    if losses.alignment and losses.alignment_rows not in (None, made["rows"]):
        raise ValueError(
            f"losses.alignment_rows is {losses.alignment_rows!r} and the cache was recorded with "
            f"{made['rows']!r}; allowed: the same"
        )
