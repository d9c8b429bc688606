"""``DistillTrainer``: transformers' Trainer with a teacher, and checkpoints that are never half."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..models import TeacherCache
from .checkpoints import STAGING, SaveError, last_checkpoint, put_in_place, retire
from .config import DistillConfig
from .objective import Objective
from .timing import Stopwatch

EXTRA = "distill_extra.safetensors"


class DistillTrainer(Trainer):  # type: ignore[misc]
    """Distils ``teacher`` into ``model``.

    What differs from the Trainer: the loss (``Objective``), normalised over the whole optimiser step
    and over all processes; every term in the logs as ``loss/<term>`` (their weighted sum is ``loss``);
    the teacher, frozen, in eval mode and under no_grad; checkpoints that are written beside their place
    and renamed when whole.

    Args:
        model: the student, a transformers vision-language model or a PEFT model of one.
        args: a ``DistillConfig``.
        teacher: a transformers vision-language model, or its recorded targets (samples then have a
            ``recorded`` number, see ``ConversationDataset``); None where no term needs it.
        others: the Trainer's.

    Attributes:
        skipped: reasons of skipped samples and how often each came.
    """

    #: The objective divides by the counts of the whole step: the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: DistillConfig,
        teacher: nn.Module | TeacherCache | None = None,
        **others: Any,
    ) -> None:
        super().__init__(model=model, args=args, **others)
        self.loss_is_scaled_for_ga = True
        losses = args.terms()
        self.teacher = teacher
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)
            placed = getattr(teacher, "hf_device_map", None) or getattr(
                teacher, "quantization_method", None
            )
            if not placed:
                teacher.to(args.device)
        processes = self.accelerator.num_processes
        if self.is_fsdp_enabled and args.fused_head:
            raise ValueError(
                "fused_head is True under FSDP, where the head's weight is sharded outside of its "
                "forward; allowed: fused_head=False"
            )
        self.stopwatch = Stopwatch(args.device)
        self.objective = Objective(
            model,
            teacher,
            losses,
            fused_head=args.fused_head,
            share_vision=args.share_vision,
            whole_step=processes == 1 and args.gradient_accumulation_steps == 1,
            stopwatch=self.stopwatch,
        )
        self.objective.extra.to(args.device)
        if processes > 1 and len(self.objective.extra):
            raise ValueError(
                f"losses learn {sorted(self.objective.extra)} beside the student, which several "
                "processes do not keep in step; allowed: one process"
            )
        self.add_callback(_ZeroExtra(self.objective.extra))
        self.add_callback(_Times(self.stopwatch))
        self.skipped: Counter[str] = Counter()
        self._term_sums: dict[str, Tensor] = {}
        self._staging = False

    # ------------------------------------------------------------------------- loss

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> dict[str, float]:
        """The counts of the whole optimiser step; called once before its first batch."""
        counts = dict.fromkeys(self.objective.weights, 0.0)
        for batch in batch_samples:
            for reason in batch.pop("skipped_samples", ()):
                self.skipped[reason] += 1
            for name, number in self.objective.count(batch).items():
                counts[name] += number
        if self.accelerator.num_processes > 1 and counts:
            numbers = torch.tensor(list(counts.values()), dtype=torch.float32, device=device)
            numbers = self.accelerator.reduce(numbers, reduction="sum")
            counts = dict(zip(counts, numbers.tolist(), strict=True))
        return counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This batch's share of the step's loss, times the processes that will average it."""
        counts = num_items_in_batch
        if counts is None:
            counts = self._get_num_items_in_batch([inputs], self.args.device)
        total, terms = self.objective(model, inputs, counts)
        if model.training:
            for name, value in terms.items():
                before = self._term_sums.get(name)
                self._term_sums[name] = value if before is None else before + value
        total = total * self.accelerator.num_processes
        return (total, {}) if return_outputs else total

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        self.stopwatch.batch(arguments[1])
        with self.stopwatch.part("backward"):  # what is left of it when the forward's parts are out
            loss: Tensor = super().training_step(*arguments, **keywords)
        self.stopwatch.switch("optimizer")
        return loss

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        with self.stopwatch.part("data"):
            return super().get_batch_samples(*arguments, **keywords)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss alone: logits of a whole vocabulary are not gathered."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach() / self.accelerator.num_processes, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds ``loss/<term>``, the mean over the steps since the last log."""
        if "loss" in logs and self._term_sums:
            steps = max(1, self.state.global_step - self._last_logged)
            self._last_logged = self.state.global_step
            for name, value in self._term_sums.items():
                whole = self.accelerator.reduce(value.clone(), reduction="sum")
                logs[f"loss/{name}"] = float(whole) / steps
            self._term_sums.clear()
        super().log(logs, start_time)

    _last_logged = 0

    def train(self, resume_from_checkpoint: Any = None, **keywords: Any) -> Any:
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            folder = Path(resume_from_checkpoint)
            self._last_logged = int(folder.name.rpartition("-")[2])
            if len(self.objective.extra):
                from safetensors.torch import load_file

                self.objective.extra.load_state_dict(load_file(folder / EXTRA))
            resume_from_checkpoint = str(folder)
        self.stopwatch.start()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)
        finally:
            self.stopwatch.stop()

    def create_optimizer(self, model: Any = None) -> Any:
        optimizer = super().create_optimizer(model)
        extra = list(self.objective.extra.parameters())
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if extra and id(extra[0]) not in known:
            self.optimizer.add_param_group({"params": extra, "weight_decay": 0.0})
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.data_seed or self.args.seed
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        size *= self.accelerator.num_processes
        from .data.stream import ConversationStream, StreamSampler

        if isinstance(dataset, ConversationStream):
            if self.args.group_batches:
                raise ValueError(
                    "group_batches is True with a stream; allowed: False (alike samples are found in the "
                    "whole of the data)"
                )
            return StreamSampler(dataset, self.args.max_steps * size, seed)
        if not self.args.group_batches:
            return super()._get_train_sampler(train_dataset)
        from .data.sampler import GroupedSampler

        return GroupedSampler(dataset.sizes(), size, seed)

    # ------------------------------------------------------------------- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        run = Path(super()._get_output_dir(trial))
        return str(run / STAGING) if self._staging else str(run)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.stopwatch.part("checkpoint"):
            self._save_whole(model, trial)

    def _save_whole(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging = run / STAGING / name
        if self.args.should_save and staging.parent.exists():
            shutil.rmtree(staging.parent)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            if len(self.objective.extra) and self.args.should_save:
                from safetensors.torch import save_file

                save_file(self.objective.extra.state_dict(), staging / EXTRA)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                put_in_place(staging, run / name)
        except Exception as error:
            # Whatever the writer raises (OSError, safetensors' own): the last whole one is what counts.
            if self.args.should_save:
                shutil.rmtree(staging.parent, ignore_errors=True)
            whole = last_checkpoint(run)
            raise SaveError(
                f"{run / name} could not be written: {error}; the last whole checkpoint is {whole}"
            ) from error
        finally:
            self._staging = False
        limit = self.args.save_total_limit
        if self.args.should_save and limit:
            best = self.state.best_model_checkpoint
            retire(run, limit, [] if best is None else [run / Path(best).name])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The Trainer loads the file's names as they are, without strictness; save_pretrained renames some.

        (A LLaVA saved as ``language_model.model.*`` would go on with its initial weights, warned of only
        in the log.) from_pretrained renames back, and the copy is strict.
        """
        target = self.model if model is None else model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or hasattr(target, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        dtype = next(target.parameters()).dtype
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=dtype)
        target.load_state_dict(saved.state_dict(), strict=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle that nothing here reads; the recipe says the same in plain text.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)


class _Times(TrainerCallback):  # type: ignore[misc]
    """Tells the stopwatch where an optimiser step ends."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch

    def on_optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        self.stopwatch.steps += 1
        self.stopwatch.switch("rest")


class _ZeroExtra(TrainerCallback):  # type: ignore[misc]
    """The Trainer zeroes the model's gradients only."""

    def __init__(self, extra: nn.ModuleDict) -> None:
        self.extra = extra

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        self.extra.zero_grad()
