"""The memory plan against what torch allocates in a real step, on a CPU."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory import peak_bytes
from fastalign.distill.config import DistillConfig
from fastalign.distill.data.collate import Collator
from fastalign.distill.loading import choose_trained
from fastalign.distill.memory import FakeModels, Shape, StagePlan, plan_stage
from fastalign.distill.memory.render import container_limit, parse_size
from fastalign.distill.recipe import Recipe, recipe_from_plain
from fastalign.distill.run import training_arguments
from fastalign.distill.trainer import DistillTrainer

IMAGE, PATCHES, WORDS = 5, 64, 512


def config(width: int, layers: int, words: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )


def items(tokens: int, labelled: int, words: int, shorter: int) -> list[dict[str, Any]]:
    """Four samples; one is by so much shorter, so that batches of two are padded."""
    found = []
    for length in (tokens, tokens, tokens, tokens - shorter):
        ids = torch.randint(6, words, (length,)).tolist()
        ids[2 : 2 + PATCHES] = [IMAGE] * PATCHES
        labels = [-100] * (length - labelled) + ids[-labelled:]
        item = {"input_ids": ids, "labels": labels, "attention_mask": [1] * length}
        found.append({**item, "pixel_values": torch.randn(1, 3, 32, 32)})
    return found


def compare(
    folder: Path, stage: dict[str, Any], *, tokens: int, labelled: int = 64, words: int = WORDS
) -> tuple[StagePlan, float, int]:
    """(plan, the plan's peak beyond both models' weights, the measured one)."""
    from transformers import LlavaForConditionalGeneration

    configs = {"student": config(128, 4, words), "teacher": config(256, 4, words)}
    for name, made in configs.items():
        made.save_pretrained(folder / name)
    plain = {
        "models": {"student": "student", "teacher": "teacher"},
        "output": "run",
        "cpu": True,
        "data": {"path": "x", "group_batches": False},
        "stages": [
            {"preset": "dft", "lora": None, "micro_batch": 1, "global_batch": 1, "steps": 2} | stage
        ],
    }
    recipe: Recipe = recipe_from_plain(plain, folder)
    chosen = recipe.stages[0]
    shape = Shape(chosen.micro_batch, tokens, PATCHES, labelled)
    plan = plan_stage(recipe, chosen, FakeModels(recipe), shape, on_cpu=True)
    torch.manual_seed(0)
    student = LlavaForConditionalGeneration(configs["student"])
    teacher = LlavaForConditionalGeneration(configs["teacher"]).eval()
    arguments: DistillConfig = training_arguments(
        recipe, chosen, folder / "run", max_steps=2, save_strategy="no"
    )
    trainer = DistillTrainer(
        choose_trained(student, chosen),
        arguments,
        teacher if chosen.losses.needs_teacher else None,
        train_dataset=items(tokens, labelled, words, 8 * (chosen.micro_batch - 1)),
        data_collator=Collator(pad_id=0),
    )
    gc.collect()  # what an earlier measurement left would be released in this one, and count as less
    measured = peak_bytes(trainer.train)
    weights = sum(
        line.size for line in plan.lines if "weights" in line.name and "bf16" not in line.name
    )
    return plan, plan.total - weights, measured


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "activations": ({"losses": {"lm": 1, "kd": 1}}, {"tokens": 1024}),
    "checkpointed": (
        {"losses": {"lm": 1, "kd": 1}, "gradient_checkpointing": True},
        {"tokens": 1536},
    ),
    "accumulated": (
        {"losses": {"lm": 1}, "global_batch": 2, "gradient_checkpointing": True},
        {"tokens": 256},
    ),
    "large vocabulary": (
        {"losses": {"lm": 1, "kd": 1}},
        {"tokens": 256, "labelled": 192, "words": 30000},
    ),
    "all logits": (
        {"losses": {"lm": 1, "kd": 1}, "fused_head": False},
        {"tokens": 256, "labelled": 192, "words": 30000},
    ),
    "batch": (
        {"losses": {"lm": 1, "kd": 1}, "micro_batch": 2, "global_batch": 2},
        {"tokens": 512},
    ),
    "bf16": ({"losses": {"lm": 1, "kd": 1}, "precision": "bf16"}, {"tokens": 1024}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_a_step_allocates(tmp_path: Path, case: str) -> None:
    stage, shape = CASES[case]
    _, planned, measured = compare(tmp_path, stage, **shape)
    print(f"{case}: planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f}")
    assert measured <= 1.02 * planned and planned <= 1.1 * measured


@pytest.mark.parametrize("checkpointing", [False, True])
def test_alignment_needs_what_the_plan_says(tmp_path: Path, checkpointing: bool) -> None:
    losses = {"lm": 1, "kd": 1, "alignment": 1, "alignment_rows": "response"}
    stage = {"losses": losses, "gradient_checkpointing": checkpointing}
    _, planned, measured = compare(tmp_path, stage, tokens=1024)
    print(f"planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f}")
    assert measured <= 1.02 * planned and planned <= 1.15 * measured


def test_a_container_has_less_than_the_machine(tmp_path: Path) -> None:
    assert container_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert container_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert container_limit(tmp_path) == 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1.5mib", 3 * 2**19), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    with pytest.raises(ValueError, match="allowed: a number"):
        parse_size(text + "x")
