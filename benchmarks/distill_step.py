"""What alignment adds to a step of the distillation loop, on a CPU, as the run's own summary says it.

``python -m benchmarks.distill_step`` runs a few steps of ``DistillTrainer`` on the long tiny model of
``benchmarks.alignment_step`` (4 layers, 16 heads of 64, 8,192 tokens of which 15/16 are visual): first with
LM + KD, then with alignment of every layer at the response's rows as well. It prints the summary of each
run, and beside the summary's share the quotient of the two runs' CPU seconds a step, which also holds
what alignment costs in the backward.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch

from benchmarks.alignment_step import batch, build
from fastalign.distill.config import DistillConfig
from fastalign.distill.data.collate import Collator
from fastalign.distill.report import time_table
from fastalign.distill.timing import PARTS
from fastalign.distill.trainer import DistillTrainer

#: Parts of a run that are no part of a step.
OUTSIDE = ("data", "checkpoint", "rest")


def items(count: int, tokens: int, response: int) -> list[dict[str, Any]]:
    """Encoded samples, as a data set gives them."""
    found = []
    for _ in range(count):
        made = batch(tokens, response)
        item: dict[str, Any] = {n: made[n][0].tolist() for n in ("input_ids", "labels")}
        item["attention_mask"] = [1] * tokens
        item["pixel_values"] = made["pixel_values"]
        found.append(item)
    return found


def measure(
    losses: dict[str, Any], tokens: int, response: int, steps: int, more: dict[str, Any]
) -> dict[str, Any]:
    """The summary of ``steps`` optimiser steps after one that is not counted."""
    student, teacher = build(1, tokens), build(2, tokens)
    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "output_dir": folder,
            "losses": losses,
            "per_device_train_batch_size": 1,
            "max_steps": 1,
            "learning_rate": 1e-4,
            "save_strategy": "no",
            "logging_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        data = items(2, tokens, response)
        trainer = DistillTrainer(
            student,
            DistillConfig(**{**arguments, **more}),
            teacher,
            train_dataset=data,
            data_collator=Collator(pad_id=0),
        )
        trainer.train()  # the first step compiles, allocates and checks masks
        trainer.stopwatch.reset()
        trainer.args.max_steps = steps
        trainer.train()
    return trainer.stopwatch.summary()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--response", type=int, default=256, help="labelled tokens")
    parser.add_argument("--steps", type=int, default=2, help="of each run, after a first one")
    parser.add_argument("--rows", default="response", help="query rows of the alignment")
    parser.add_argument("--checkpointing", action="store_true", help="of activations")
    arguments = parser.parse_args()
    more = {"activation_checkpointing": arguments.checkpointing}
    base = {"lm": 1.0, "kd": 1.0}
    aligned = {
        **base,
        "alignment": 1.0,
        "alignment_layers": "all",
        "alignment_rows": arguments.rows,
    }
    seconds = []
    for name, losses in (("LM + KD", base), ("LM + KD + alignment", aligned)):
        torch.manual_seed(0)
        found = measure(losses, arguments.tokens, arguments.response, arguments.steps, more)
        cpu = found["cpu_seconds_by_part"]
        seconds.append(sum(cpu.get(p, 0.0) for p in PARTS if p not in OUTSIDE) / arguments.steps)
        print(
            f"{name}: {arguments.tokens} tokens, {arguments.response} labelled, "
            f"{seconds[-1]:.2f} CPU s a step\n{time_table(found)}",
            flush=True,
        )
    print(f"CPU seconds a step, with alignment over without: {seconds[1] / seconds[0]:.3f}")


if __name__ == "__main__":
    main()
