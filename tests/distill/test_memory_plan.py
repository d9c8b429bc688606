"""The memory plan against what torch allocates in a real step, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory import peak_bytes
from fastalign.distill.config import DistillConfig
from fastalign.distill.data.collate import Collator
from fastalign.distill.loading import choose_trained
from fastalign.distill.memory import FakeModels, Shape, StagePlan, plan_stage
from fastalign.distill.memory.render import parse_size
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


def items(tokens: int, labelled: int, words: int) -> list[dict[str, Any]]:
    ids = torch.randint(6, words, (tokens,)).tolist()
    ids[2 : 2 + PATCHES] = [IMAGE] * PATCHES
    labels = [-100] * (tokens - labelled) + ids[-labelled:]
    item = {"input_ids": ids, "labels": labels, "attention_mask": [1] * tokens}
    return [{**item, "pixel_values": torch.randn(1, 3, 32, 32)}] * 4


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
    plan = plan_stage(
        recipe, chosen, FakeModels(recipe), Shape(1, tokens, PATCHES, labelled), on_cpu=True
    )
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
        train_dataset=items(tokens, labelled, words),
        data_collator=Collator(pad_id=0),
    )
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
    "bf16": ({"losses": {"lm": 1, "kd": 1}, "precision": "bf16"}, {"tokens": 1024}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_a_step_allocates(tmp_path: Path, case: str) -> None:
    stage, shape = CASES[case]
    _, planned, measured = compare(tmp_path, stage, **shape)
    print(f"{case}: planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f}")
    # An upper bound that is not tight: three of these cases are 1.2 to 1.45 times too high.
    assert measured <= 1.05 * planned and planned <= 1.5 * measured


def test_alignment_needs_at_most_what_the_plan_says(tmp_path: Path) -> None:
    """The workspace is a cap that small models do not reach: it is left out of the lower bound."""
    losses = {"lm": 1, "kd": 1, "alignment": 1, "alignment_rows": "response"}
    plan, planned, measured = compare(tmp_path, {"losses": losses}, tokens=1024)
    (workspace,) = [line.size for line in plan.lines if line.name == "alignment's workspace"]
    print(f"planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f}")
    assert (planned - workspace) / 1.5 <= measured <= 1.05 * planned


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1.5mib", 3 * 2**19), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    with pytest.raises(ValueError, match="allowed: a number"):
        parse_size(text + "x")
