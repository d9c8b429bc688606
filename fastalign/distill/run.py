"""Runs a recipe: its stages in order, each from where the last one ended, resumable anywhere."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..models import TeacherCache
from .checkpoints import last_checkpoint, whole_folder
from .config import DistillConfig
from .data import Collator
from .drawings import StageDrawings
from .loading import (
    choose_trained,
    load_data,
    load_model,
    load_processor,
    load_stream,
    load_student,
    load_teacher,
)
from .plain import RecipeError, to_plain
from .recipe import Recipe, recipe_to_plain, resolve
from .report import model_card, pictures_of, stage_summary, time_table
from .stages import Stage
from .targets import cached_stages, open_cache
from .trainer import DistillTrainer

Say = Callable[[str], None]


def run_recipe(recipe: Recipe, *, resume: bool = False, say: Say = print) -> dict[str, Any]:
    """Run all stages; returns what ``summary.json`` holds.

    The run's folder holds, for each stage, ``<number>-<name>/`` with its checkpoints and, when it is
    done, ``final/``; and at the end ``final/``, the student. A folder is renamed into its place when
    it is whole, so that ``resume`` goes on with the first stage without ``final`` from its last
    checkpoint, whenever the run was cut off.

    Raises:
        RecipeError: the folder holds a run and resume is False, or one of another recipe; a cache that does
            not hold the teacher's targets of this recipe.
    """
    output = resolve(recipe, recipe.output)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    processor = load_processor(recipe)
    caches = {stage.name: open_cache(recipe, stage, processor) for stage in cached_stages(recipe)}
    _claim(recipe, output, resume)
    names = stage_folders(recipe)
    summaries: list[dict[str, Any]] = []
    teacher: Any = None
    for index, stage in enumerate(recipe.stages):
        folder = output / names[index]
        if (folder / "final").is_dir():
            say(f"{names[index]}: done already")
            summaries.append(json.loads((folder / "final" / "stage.json").read_text()))
            continue
        needed = stage.losses.needs_teacher and stage.name not in caches
        if teacher is None and (needed or (index == 0 and recipe.models.taf)):
            teacher = load_teacher(recipe)
        if index == 0:
            student = load_student(recipe, teacher)
        else:
            before = str((output / names[index - 1] / "final").resolve())
            student = load_model(recipe, before, recipe.models.student_dtype)
        if stage.name in caches:
            teacher = caches[stage.name]
        elif recipe.models.cache is not None:  # the adapter is fetched, that was all it was for
            teacher = None
        say(f"{names[index]}: {_describe(stage)}")
        summaries.append(_run_stage(recipe, stage, folder, student, teacher, processor, say))
        say(f"{names[index]}: {_outcome(summaries[-1])}\n{time_table(summaries[-1])}")
    summary = {"stages": summaries}
    if is_main():
        if not (output / "final").is_dir():
            with whole_folder(output / "final") as final:
                _copy_model(output / names[-1] / "final", final)
                _copy_pictures(output, summaries, final)
                (final / "README.md").write_text(model_card(recipe, summaries))
        _write_json(output / "summary.json", summary)
    return summary


def stage_folders(recipe: Recipe) -> list[str]:
    return [f"{i:02d}-{stage.name}" for i, stage in enumerate(recipe.stages, start=1)]


def leave_processes() -> None:
    """Last call of a finished run's process. Of several over gloo it ends each, with exit code 0.

    The interpreter's own end is not safe there: a thread of gloo may still have to let go of a collective's
    tensors, which takes the interpreter's lock, while the destructor of DistributedDataParallel's reducer
    waits for that thread with the lock held (torch 2.13); and a thread that asks a dying interpreter for
    the lock aborts the process. So what Python runs at exit runs here, and no destructor after it.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    torch.distributed.barrier()
    if "gloo" not in torch.distributed.get_backend():
        torch.distributed.destroy_process_group()
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def is_main() -> bool:
    """Whether this process writes: rank 0 of a launch, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def training_arguments(
    recipe: Recipe, stage: Stage, folder: Path, processes: int = 1, **changes: Any
) -> DistillConfig:
    """The Trainer's arguments of a stage."""
    per_step = stage.micro_batch * processes
    if stage.global_batch % per_step:
        raise RecipeError(
            f"stage {stage.name}: global_batch is {stage.global_batch} with {processes} processes of "
            f"micro_batch {stage.micro_batch}; allowed: a multiple of {per_step}"
        )
    data = recipe.data_of(stage)
    # Its name changed during transformers 5.
    checkpointing = (
        "activation_checkpointing"
        if "activation_checkpointing" in DistillConfig.__dataclass_fields__
        else "gradient_checkpointing"
    )
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "losses": to_plain(stage.losses),
        "per_device_train_batch_size": stage.micro_batch,
        "gradient_accumulation_steps": stage.global_batch // per_step,
        "num_train_epochs": stage.epochs,
        "max_steps": -1 if stage.steps is None else stage.steps,
        "learning_rate": stage.learning_rate,
        "weight_decay": stage.weight_decay,
        "warmup_steps": stage.warmup,
        "lr_scheduler_type": stage.schedule,
        "optim": stage.optimizer,
        "max_grad_norm": stage.max_grad_norm,
        "bf16": stage.precision == "bf16",
        "fused_head": stage.fused_head,
        "share_vision": stage.share_vision,
        "group_batches": data.group_batches,
        "dataloader_num_workers": data.workers,
        "save_strategy": "steps",
        "save_steps": stage.save_every,
        "save_total_limit": stage.keep_checkpoints,
        "logging_steps": stage.log_every,
        "logging_strategy": "steps",
        "seed": recipe.seed,
        "use_cpu": recipe.cpu,
        "disable_tqdm": True,
        checkpointing: stage.gradient_checkpointing,
    }
    clash = sorted(set(stage.options) & set(values))
    if clash:
        raise RecipeError(
            f"stage {stage.name}: options has {clash}, which other entries of the stage decide"
        )
    unknown = sorted(set(stage.options) - set(DistillConfig.__dataclass_fields__))
    if unknown:
        raise RecipeError(
            f"stage {stage.name}: options has {unknown}; allowed: arguments of TrainingArguments"
        )
    return DistillConfig(**{**values, **stage.options, **changes})


def make_trainer(
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    student: Any,
    teacher: Any,
    processor: Any,
    dataset: Any = None,
    **changes: Any,
) -> DistillTrainer:
    """The trainer of a stage; ``student`` may come back wrapped by PEFT as ``trainer.model``.

    Args:
        dataset: None: the stage's.
        changes: of its ``training_arguments``.
    """
    torch.manual_seed(recipe.seed)  # LoRA's and projections' initial weights
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = training_arguments(recipe, stage, folder, processes, **changes)
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        raise RecipeError(
            "the processor's tokenizer has no pad token; allowed: one with a pad token"
        )
    return DistillTrainer(
        choose_trained(student, stage),
        arguments,
        teacher if stage.losses.needs_teacher else None,
        train_dataset=load_data(recipe, stage, processor) if dataset is None else dataset,
        data_collator=Collator(tokenizer.pad_token_id, "right"),
    )


def _run_stage(
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    student: Any,
    teacher: Any,
    processor: Any,
    say: Say,
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    recorded = teacher.numbers if isinstance(teacher, TeacherCache) else None
    load = load_stream if recipe.data_of(stage).streaming else load_data
    dataset = load(recipe, stage, processor, recorded)
    trainer = make_trainer(recipe, stage, folder, student, teacher, processor, dataset)
    drawings = StageDrawings(recipe, stage, trainer, teacher)
    drawings.look("student before")
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    summary = stage_summary(stage, trainer)
    trainer.accelerator.wait_for_everyone()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if stage.lora is not None:
        model = model.merge_and_unload()
    if trainer.args.should_save:
        with whole_folder(folder / "final") as final:
            model.save_pretrained(final)
            processor.save_pretrained(final)
            _write_json(final / "stage.json", summary)
        # All that a run is for lies on the disk now: a picture that cannot be drawn is told, not raised.
        summary |= drawings.draw(model, folder)
        _write_json(folder / "final" / "stage.json", summary)
        for note in summary["picture_notes"]:
            say(f"{folder.name}: {note}")
    trainer.accelerator.wait_for_everyone()
    return summary


def _claim(recipe: Recipe, output: Path, resume: bool) -> None:
    """The run's folder belongs to one recipe; one process decides (its failure ends the others)."""
    if is_main() and not claimed(recipe, output, resume=resume):
        output.mkdir(parents=True, exist_ok=True)
        _write_json(output / "recipe.json", _settings(recipe))


def claimed(recipe: Recipe, output: Path, *, resume: bool) -> bool:
    """Whether the folder holds a run of this recipe, to be resumed.

    Raises:
        RecipeError: it holds one and resume is False, or one of another recipe.
    """
    path = output / "recipe.json"
    if not path.exists():
        return False
    if not resume:
        raise RecipeError(
            f"output: {output} holds a run already; allowed: --resume, or another folder"
        )
    if json.loads(path.read_text()) != _settings(recipe):
        raise RecipeError(
            f"output: {output} holds a run of another recipe; allowed: the recipe in {path}"
        )
    return True


def _settings(recipe: Recipe) -> Any:
    """The recipe as its json gives it back."""
    return json.loads(json.dumps(recipe_to_plain(recipe)))


def _write_json(path: Path, values: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(part, path)


def _copy_model(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.name != "stage.json":
            (target / path.name).write_bytes(path.read_bytes())


def _copy_pictures(output: Path, summaries: list[dict[str, Any]], final: Path) -> None:
    """The stages' pictures beside the card that shows them, ``<stage's folder>-<name>.png``."""
    for name in pictures_of(summaries):
        if (output / name).is_file():
            (final / name.replace("/", "-")).write_bytes((output / name).read_bytes())


def _describe(stage: Stage) -> str:
    weights = ", ".join(f"{name} {weight:g}" for name, weight in stage.losses.weights.items())
    how = f"LoRA {stage.lora.rank}" if stage.lora else "full"
    return f"trains {' + '.join(stage.trains)} ({how}); losses {weights}"


def _outcome(summary: dict[str, Any]) -> str:
    last = summary["last_losses"]
    losses = ", ".join(f"{name} {value:.4g}" for name, value in last.items())
    text = f"{summary['steps']} steps in {summary['seconds']:.0f} s; {losses}"
    if summary["skipped"]:
        text += f"; {sum(summary['skipped'].values())} bad samples passed over"
    return text
