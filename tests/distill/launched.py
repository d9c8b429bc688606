"""One optimiser step on eight samples, in as many processes as there are; run by test_launch.

``accelerate launch ... -m tests.distill.launched ddp|fsdp float32|float64 FILE``: FILE gets the gradients
and the logged losses. accelerate knows FSDP on accelerators only; for ``fsdp`` it is told that two CPU
processes are one (gloo beneath), and everything above, transformers' and ours, is what runs on GPUs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from fastalign.distill.config import DistillConfig
from fastalign.distill.data.collate import Collator
from fastalign.distill.run import leave_processes
from fastalign.distill.trainer import DistillTrainer
from tests.distill import worlds

LOSSES = {"lm": 0.7, "kd": 1.3, "visual_kd": 0.2, "alignment": 2.0, "relation": 0.4}


class Gradients(TrainerCallback):
    """Whole gradients just before the optimiser uses them, also where they are sharded."""

    found: dict[str, torch.Tensor]

    def on_pre_optimizer_step(self, *arguments: Any, model: Any = None, **keywords: Any) -> None:
        self.found = {}
        self.sharded = 0
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            if hasattr(gradient, "full_tensor"):
                self.sharded += 1
                gradient = gradient.full_tensor()
            self.found[name.removeprefix("module.")] = gradient.clone()


def step(
    dtype: torch.dtype, processes: int, folder: Path, **changes: Any
) -> tuple[dict[str, Any], Any, Any]:
    """(gradients, logs, trainer) of one step of eight samples; the trainer's files go to ``folder``."""
    student, teacher = (model.to(dtype) for model in worlds.pair())
    items = worlds.items()
    for item in items:
        if "pixel_values" in item:
            item["pixel_values"] = item["pixel_values"].to(dtype)
    gradients = Gradients()
    trainer = DistillTrainer(
        student,
        DistillConfig(
            output_dir=str(folder),
            per_device_train_batch_size=8 // processes,
            max_steps=1,
            max_grad_norm=0.0,
            optim="sgd",
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            losses={**LOSSES, "alignment_rows": "all"},
            disable_tqdm=True,
            **changes,
        ),
        teacher,
        train_dataset=items,
        data_collator=Collator(pad_id=0),
        callbacks=[gradients],
    )
    trainer.train()
    return gradients.found, trainer.state.log_history[0], trainer


def treat_cpu_as_accelerator() -> None:
    from accelerate.state import DistributedType, PartialState

    def backend(self: Any, *arguments: Any, **keywords: Any) -> tuple[str, Any]:
        return "gloo", DistributedType.MULTI_GPU

    def device(self: Any) -> None:
        self.device = torch.device("cpu")

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = backend
    PartialState.set_device = device


def main(kind: str, dtype: str, path: str) -> None:
    torch.set_num_threads(1)
    changes: dict[str, Any] = {}
    if kind == "fsdp":
        treat_cpu_as_accelerator()
        wrap = ["LlamaDecoderLayer", "CLIPEncoderLayer"]
        changes = {
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": wrap},
            "fused_head": False,
        }
    gradients, logs, trainer = step(getattr(torch, dtype), 2, Path(path + ".run"), **changes)
    assert trainer.accelerator.num_processes == 2
    assert trainer.is_fsdp_enabled == (kind == "fsdp")
    sharded = next(
        c for c in trainer.callback_handler.callbacks if isinstance(c, Gradients)
    ).sharded
    assert (sharded > 0) == (kind == "fsdp")
    if trainer.is_world_process_zero():
        losses = {n: torch.tensor(v) for n, v in logs.items() if n.startswith("loss")}
        save_file({**gradients, **losses}, Path(path))
    leave_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
