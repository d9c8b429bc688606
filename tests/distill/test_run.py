"""Recipes: read, run, killed, resumed; what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from fastalign.commands import build_app
from fastalign.distill.plain import RecipeError
from fastalign.distill.recipe import load_recipe, recipe_from_plain, recipe_to_plain
from fastalign.distill.run import run_recipe
from fastalign.distill.stages import PRESETS
from fastalign.evals.shapes.models import build_student, build_teacher
from fastalign.evals.shapes.tokenizer import build_processor

from . import worlds


def world(folder: Path, **changes: Any) -> dict[str, Any]:
    """Data, untrained models and a recipe of three short stages with the adapter fetch."""
    worlds.write_llava(folder)
    for name, model in (("student", build_student(layers=2)), ("teacher", build_teacher(layers=2))):
        model.save_pretrained(folder / name)
        build_processor().save_pretrained(folder / name)
    recipe = {
        "models": {"teacher": "teacher", "student": "student", "taf": "linear"},
        "output": "run",
        "cpu": True,
        "threads": 1,
        "data": {"path": "data.json", "template": "bare"},
        "defaults": {
            "global_batch": 4,
            "micro_batch": 2,
            "steps": 4,
            "save_every": 1,
            "log_every": 1,
        },
        "stages": [
            "dpt",
            {"preset": "dft", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
            {"preset": "sft", "lora": None},
        ],
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return recipe


@pytest.mark.filterwarnings("ignore::FutureWarning:peft.*")  # peft asks for a renamed attribute
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_three_stages_with_the_adapter_fetch(tmp_path: Path) -> None:
    world(tmp_path)
    records = json.loads((tmp_path / "data.json").read_text())
    records[4]["image"] = "missing.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    summary = run_recipe(load_recipe(tmp_path / "recipe.yaml"), say=lambda _: None)
    assert [s["steps"] for s in summary["stages"]] == [4, 4, 4]
    for stage in summary["stages"]:
        assert any("missing.png" in reason for reason in stage["skipped"])
    run = tmp_path / "run"
    teacher = load(tmp_path / "teacher")
    start = load(tmp_path / "student")
    states = [load(p / "final") for p in sorted(run.glob("0*"))]
    projector = "model.multi_modal_projector."
    for state in states:
        for name in ("linear_1.weight", "linear_2.weight"):
            assert torch.equal(state[f"{projector}fetched.{name}"], teacher[projector + name])
    decoder = "model.language_model.layers.0.self_attn.q_proj.weight"
    adapter = projector + "adapter.weight"
    assert torch.equal(states[0][decoder], start[decoder])  # DPT trains the adapter alone
    assert not torch.equal(states[1][decoder], states[0][decoder])
    for before, after in itertools.pairwise(states):
        assert not torch.equal(before[adapter], after[adapter])
    assert torch.equal(load(run / "final")[adapter], states[2][adapter])
    assert "llava_taf" in (run / "final" / "README.md").read_text()


def load(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForImageTextToText.from_pretrained(
        folder
    ).state_dict()
    return state


def test_recipes_survive_yaml(tmp_path: Path) -> None:
    recipe = recipe_from_plain(world(tmp_path), tmp_path)
    again = recipe_from_plain(yaml.safe_load(yaml.safe_dump(recipe_to_plain(recipe))), tmp_path)
    assert again == recipe
    assert recipe.stages[1].losses == PRESETS["dft"].losses


def test_the_papers_values_are_the_defaults() -> None:
    dpt, dft, sft = PRESETS.values()
    assert [s.global_batch for s in (dpt, dft, sft)] == [256, 128, 192]
    assert dpt.losses.weights == {"lm": 1, "kd": 1}
    assert dft.losses.weights == {"lm": 1, "kd": 1, "alignment": 1}
    assert sft.losses.weights == {"lm": 1}
    assert dft.lora is not None and (dft.lora.rank, dft.lora.alpha) == (128, 256)
    assert all((s.learning_rate, s.warmup, s.epochs) == (2e-4, 0.03, 1) for s in (dpt, dft, sft))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": []}, "has an entry 'stage'; allowed: models"),
        ({"stages": []}, "at least one stage"),
        ({"stages": ["dtp"]}, r"stages\[0\].preset is 'dtp'; allowed: dpt, dft, sft"),
        (
            {"stages": [{"preset": "dpt", "losses": {"ml": 1}}]},
            r"stages\[0\].losses has an entry 'ml'",
        ),
        (
            {"stages": [{"preset": "dpt", "learning_rate": "x"}]},
            "learning_rate is 'x'; allowed: a number",
        ),
        ({"stages": [{"preset": "dpt", "micro_batch": 3}]}, "micro_batch 3; allowed: a multiple"),
        ({"stages": ["dpt", "dpt"]}, "two stages are called 'dpt'"),
        ({"data": None}, "has no data and the recipe has none"),
        ({"models": {"teacher": "t"}}, "lacks 'student'"),
    ],
)
def test_wrong_recipes_are_usage_errors(tmp_path: Path, change: Any, message: str) -> None:
    world(tmp_path, **change)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "recipe.yaml")
    result = CliRunner().invoke(build_app(), ["distill", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 2


def test_init_writes_a_recipe_that_reads(tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    arguments = ["init", "--student", "s", "--teacher", "t", "--taf", "--out", str(out)]
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 0, result.output
    recipe = load_recipe(out)
    assert (recipe.models.student, recipe.models.taf) == ("s", "linear")
    assert [s.losses for s in recipe.stages] == [s.losses for s in PRESETS.values()]
    assert CliRunner().invoke(build_app(), arguments).exit_code == 2
