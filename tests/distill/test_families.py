"""Qwen2.5-VL and LLaVA-OneVision pairs through the three stages; bfloat16; gradient checkpointing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from fastalign.distill import run as run_module
from fastalign.distill.loading import part_of
from fastalign.distill.recipe import load_recipe
from fastalign.distill.run import run_recipe

from . import worlds
from .families import FAMILIES, write_pair

STAGES: list[dict[str, Any]] = [
    {"preset": "dpt"},
    {"preset": "dft", "lora": {"rank": 4, "alpha": 8}},
    {"preset": "sft", "lora": None},
]


def run(folder: Path, family: str, stages: list[dict[str, Any]], **defaults: Any) -> dict[str, Any]:
    worlds.write_llava(folder)
    resize(folder)
    processor = write_pair(family, folder)
    steps = {"global_batch": 4, "micro_batch": 2, "steps": 2, "log_every": 1, "learning_rate": 1e-2}
    recipe = {
        "models": {"teacher": "teacher", "student": "student"},
        "output": "run",
        "cpu": True,
        "threads": 1,
        "data": {"path": "data.json", "max_length": 256},
        "defaults": {**steps, **defaults},
        "stages": stages,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return go(folder, processor)


def go(folder: Path, processor: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "load_processor", lambda recipe: processor)
        return run_recipe(load_recipe(folder / "recipe.yaml"), say=lambda _: None)


def resize(folder: Path) -> None:
    """Pictures of different shape: other grids, other numbers of tiles."""
    from PIL import Image

    for number, size in ((0, (32, 32)), (1, (48, 16)), (3, (16, 32))):
        Image.open(folder / f"{number}.png").resize(size).save(folder / f"{number}.png")


@pytest.mark.filterwarnings("ignore::FutureWarning:peft.*")  # peft asks for a renamed attribute
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_three_stages(family: str, tmp_path: Path) -> None:
    summary = run(tmp_path, family, STAGES)
    losses = [set(s["last_losses"]) for s in summary["stages"]]
    assert losses == [
        {"loss", "loss/lm", "loss/kd"},
        {"loss", "loss/lm", "loss/kd", "loss/alignment"},
        {"loss", "loss/lm"},
    ]
    assert all(not s["skipped"] and s["steps"] == 2 for s in summary["stages"])
    assert 0 < summary["stages"][1]["last_losses"]["loss/alignment"] < 2
    folders = ["student", "run/01-dpt/final", "run/02-dft/final", "run/03-sft/final", "run/final"]
    states = [
        AutoModelForImageTextToText.from_pretrained(tmp_path / folder).state_dict()
        for folder in folders
    ]
    for stage, parts in enumerate(({"projector"}, {"projector", "language_model"}), start=1):
        moved = {
            part_of(name)
            for name, weight in states[stage].items()
            if not torch.equal(weight, states[stage - 1][name])
        }
        assert moved == parts
    assert all(torch.equal(states[4][name], weight) for name, weight in states[3].items())
    student = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/final")
    assert (tmp_path / "run/final/tokenizer.json").exists()
    processor = write_pair(family, tmp_path / "again")
    assert type(student).__module__.startswith("transformers.")
    from PIL import Image

    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where?"}]}
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=Image.open(tmp_path / "1.png"), text=text, return_tensors="pt")
    tokens = student.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_follows_float32(tmp_path: Path, how: str) -> None:
    """precision: bf16 (autocast over float32 weights), and bfloat16 weights: losses within its rounding."""
    terms = {"lm": 1, "kd": 1, "alignment": 1, "hidden": 1, "relation": 1, "visual_kd": 1}
    stage = {"preset": "dft", "lora": None, "losses": terms, "learning_rate": 1e-3}
    results = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        changes: dict[str, Any] = {"precision": precision if how == "autocast" else "fp32"}
        if how == "weights" and precision == "bf16":
            results[precision] = run_with_bfloat16_weights(folder, stage)
            continue
        results[precision] = run(folder, "qwen2_5_vl", [stage], **changes)
    exact, rounded = (results[p]["stages"][0]["last_losses"] for p in ("fp32", "bf16"))
    assert exact.keys() == rounded.keys() == {"loss", *(f"loss/{name}" for name in terms)}
    for name, value in exact.items():
        assert rounded[name] == pytest.approx(value, rel=0.05, abs=0.005), name
    assert rounded["loss"] != exact["loss"]
    dtype = "bfloat16" if how == "weights" else "float32"
    config = json.loads((tmp_path / "bf16" / "run" / "final" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype


def run_with_bfloat16_weights(folder: Path, stage: dict[str, Any]) -> dict[str, Any]:
    run(folder, "qwen2_5_vl", [{**stage, "steps": 1}])
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["models"] |= {"student_dtype": "bfloat16", "teacher_dtype": "bfloat16"}
    recipe["output"] = "rounded"
    recipe["stages"] = [stage]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    summary = go(folder, write_pair("qwen2_5_vl", folder))
    (folder / "run").rename(folder / "first")
    (folder / "rounded").rename(folder / "run")
    return summary


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, family: str) -> None:
    stage = {"preset": "dft", "lora": None, "learning_rate": 1e-3}
    runs = [
        run(tmp_path / str(on), family, [stage], gradient_checkpointing=on) for on in (False, True)
    ]
    plain, checkpointed = (r["stages"][0]["last_losses"] for r in runs)
    for name, value in plain.items():
        assert checkpointed[name] == pytest.approx(value, rel=1e-5), name
