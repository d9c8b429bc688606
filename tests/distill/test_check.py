"""``fastalign check``: problems of every class are named, a good recipe passes, nothing is written."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fastalign.commands import build_app
from fastalign.distill.check import Options, Outcome, check_recipe, checkpoints, dry, output
from fastalign.distill.check.checkpoints import check_checkpoints, compare_tokenizers
from fastalign.distill.check.dry import choose, dry_step
from fastalign.distill.check.outcome import Part
from fastalign.distill.check.output import room_needed
from fastalign.distill.check.plans import check_stages, checkpoints_at_once
from fastalign.distill.check.samples import Size, Source, quantiles
from fastalign.distill.data import SampleError
from fastalign.distill.loading import load_data, load_processor, load_student, load_teacher
from fastalign.distill.memory import FakeModels
from fastalign.distill.recipe import Recipe, load_recipe
from fastalign.distill.run import run_recipe
from fastalign.distill.stages import Data, Stage

from . import worlds
from .families import FAMILIES, write_pair
from .test_families import resize
from .test_run import world as make_world

SFT = [{"preset": "sft", "lora": None}]
KD = [{"preset": "dpt"}]
#: transformers' and peft's own, of names that changed
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A folder with a good recipe of three stages, its data and its models."""
    return Path(shutil.copytree(made, tmp_path / "world"))


def rewrite(folder: Path, **changes: Any) -> Path:
    """The recipe with other entries; ``None`` takes one out."""
    path = folder / "recipe.yaml"
    values = {**yaml.safe_load(path.read_text()), **changes}
    values = {name: value for name, value in values.items() if value is not None}
    path.write_text(yaml.safe_dump(values))
    return path


def read(folder: Path, **changes: Any) -> Recipe:
    return load_recipe(rewrite(folder, **changes))


def check(path: Path, **options: Any) -> Outcome:
    return check_recipe(path, Options(**{"dry_step": False, **options}))


def problems(outcome: Outcome) -> str:
    return "\n".join(problem for part in outcome.parts for problem in part.problems)


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(build_app(), ["check", *map(str, arguments)])


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder with its time of change and content."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in [folder, *folder.rglob("*")]
    }


# ------------------------------------------------------------------------------- all is well


def test_a_good_recipe_passes_and_nothing_is_written(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    before = tree(world)
    result = command("recipe.yaml", "--json")
    assert result.exit_code == 0, result.output
    assert tree(world) == before
    found = json.loads(result.stdout)
    assert found["ok"] and {part["verdict"] for part in found["parts"]} == {"ok"}
    parts = {part["name"]: part for part in found["parts"]}
    assert parts["stages"]["stages"]["dft"]["matched_layers"] == {"1": [1]}
    (source,) = parts["data"]["sources"]
    assert (source["samples"], source["text_only"], source["truncated"]) == (6, 1, 0)
    assert source["visual_tokens"] == {"median": 36, "p95": 36, "max": 36}
    assert parts["memory"]["stages"]["dft"]["visual"] == 36
    terms = {name: set(stage["terms"]) for name, stage in parts["dry step"]["stages"].items()}
    assert terms == {"dpt": {"lm", "kd"}, "dft": {"lm", "kd", "alignment"}, "sft": {"lm"}}
    alone = parts["dry step"]["stages"]["dft"]["gradients"]["alignment"]
    assert alone["projector"] > 0 and alone["language_model"] > 0


@pytest.mark.parametrize(
    "more",
    [
        {"lora": {"rank": 4, "alpha": 8}, "precision": "bf16", "gradient_checkpointing": True},
        {"lora": None, "global_batch": 2},
    ],
)
def test_a_dry_step_leaves_the_student_as_it_was(world: Path, more: dict[str, Any]) -> None:
    recipe = read(world, stages=[{"preset": "dft", **more}])
    processor, teacher = load_processor(recipe), load_teacher(recipe)
    student = load_student(recipe, teacher)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    dataset = load_data(recipe, recipe.stages[0], processor)
    items = [dataset.load(2), dataset.load(0)]
    names = (recipe, recipe.stages[0], student, teacher, processor, items)
    seen = dry_step(*names)
    after = student.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert set(seen.terms) == {"lm", "kd", "alignment"} and not seen.broken
    assert dry_step(*names).terms == seen.terms  # nor is anything left around it
    assert not any(getattr(m, "gradient_checkpointing", False) for m in student.modules())


# ---------------------------------------------------------------------------------- recipes


def test_every_wrong_entry_is_named(world: Path) -> None:
    path = rewrite(
        world,
        models={"teacher": "teacher", "student": 3},
        data={"path": "data.json", "max_length": "long", "colour": 1},
        stages=["dtp", {"preset": "dpt", "losses": {"ml": 1}}],
        defaults={"micro_batch": "two"},
        extra=1,
    )
    outcome = check(path)
    for text in (
        "recipe has an entry 'extra'",
        "models.student is 3; allowed: a text",
        "data.max_length is 'long'",
        "data has an entry 'colour'",
        "defaults.micro_batch is 'two'",
        "stages[0].preset is 'dtp'",
        "stages[1].losses has an entry 'ml'",
    ):
        assert text in problems(outcome)
    assert len(outcome.parts[0].problems) == 7
    assert command(path).exit_code == 1


def test_wrong_usage(world: Path) -> None:
    recipe = world / "recipe.yaml"
    (world / "broken.yaml").write_text("a: [")
    for arguments, message in (
        ((world / "absent.yaml",), "cannot be read as YAML"),
        ((world / "broken.yaml",), "cannot be read as YAML"),
        ((recipe, "--device-memory", "much"), "--device-memory is"),
        ((recipe, "--samples", 0), "--samples"),
        ((recipe, "--report", world / "absent" / "found.json"), "a file in a folder that is there"),
    ):
        result = command(*arguments)
        assert result.exit_code == 2 and message in result.output


def test_stages_are_built_as_for_the_run(world: Path) -> None:
    everywhere = {"lm": 1, "alignment": 1, "alignment_layers": "last:3"}
    recipe = read(
        world,
        stages=[
            {"preset": "dft", "lora": None, "losses": everywhere},
            {"preset": "sft", "options": {"colour": "red"}},
            {"preset": "sft", "name": "clash", "options": {"seed": 3}},
            {"preset": "sft", "name": "odd", "optimizer": "best"},
            {"preset": "dpt", "name": "good"},
        ],
    )
    part, facts = check_stages(recipe, FakeModels(recipe))
    assert list(facts) == ["good"]
    dft, sft, clash, odd = part.problems
    assert dft.startswith("stages[0] (dft)") and "a count from 1 to 2" in dft
    assert "options has ['colour']" in sft
    assert "options has ['seed'], which other entries of the stage decide" in clash
    assert odd.startswith("stages[3] (odd)") and "best" in odd


def test_what_needs_a_launch_is_said(world: Path) -> None:
    sharded = {"preset": "sft", "lora": None, "options": {"fsdp": True}}
    outcome = check(rewrite(world, stages=[sharded]), dry_step=True)
    assert "fused_head is True and options.fsdp" in "".join(outcome.part("stages").problems)
    outcome = check(rewrite(world, stages=[{**sharded, "fused_head": False}]), dry_step=True)
    assert outcome.ok and outcome.part("dry step").verdict == "left out"
    assert "options.fsdp needs a launch" in outcome.part("dry step").notes[0]


# ------------------------------------------------------------------------------ checkpoints


def _no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def _pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _cut_off(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _shard_missing(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": names}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _no_config(model: Path) -> None:
    (model / "config.json").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_no_weights, "holds no model.safetensors; allowed"),
        (_pickle, "holds no model.safetensors (it has pytorch_model.bin, a pickle)"),
        (_cut_off, "is no whole safetensors file"),
        (_shard_missing, "lacks model-00002-of-00002.safetensors and 0 more of the 2 files"),
        (_no_config, "configuration cannot be read"),
    ],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_checkpoints(world: Path, harm: Any, message: str, role: str) -> None:
    harm(world / role)
    part = check_checkpoints(load_recipe(world / "recipe.yaml"))
    (problem,) = part.problems
    assert problem.startswith(f"models.{role}") and message in problem


def test_what_is_not_here_is_not_fetched(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    path = rewrite(world, models={"teacher": "teacher", "student": "nobody/nothing"})
    outcome = check(path)
    (problem,) = outcome.part("checkpoints").problems
    assert "models.student is 'nobody/nothing', whose configuration" in problem
    assert outcome.part("data").left_out and outcome.part("dry step").left_out


def test_tokens_must_mean_the_same(world: Path) -> None:
    recipe = load_recipe(world / "recipe.yaml")
    processor = load_processor(recipe)
    longer = load_processor(recipe).tokenizer
    longer.add_tokens(["<further>"])
    longer.save_pretrained(world / "teacher")
    part = Part("tokenizers")
    compare_tokenizers(recipe, processor, {"student": 381, "teacher": 400}, part)
    assert not part.problems and part.summary.startswith("prefix-shared")

    path = world / "teacher" / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    names = [name for name, number in vocabulary.items() if number in (200, 201)]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    path.write_text(json.dumps(values))
    part = Part("tokenizers")
    compare_tokenizers(recipe, processor, {"student": 381, "teacher": 400}, part)
    (problem,) = part.problems
    assert "2 of the 381 tokens" in problem and "the first is 200" in problem


# ----------------------------------------------------------------------------------- output


def test_the_folder_and_the_disk(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read(world, stages=SFT)
    facts = check_stages(recipe, FakeModels(recipe))[1]
    good = output.check_output(recipe, facts, {"sft": 6})
    assert not good.problems and 0 < good.facts["needed_bytes"] < good.facts["free_bytes"]

    usage = shutil.disk_usage(world)._replace(free=good.facts["needed_bytes"] - 1)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    assert "on the disk of" in output.check_output(recipe, facts, {"sft": 6}).problems[0]

    run = world / "run"
    run.mkdir()
    (run / "recipe.json").write_text("{}")
    assert "a run of another recipe" in output.check_output(recipe, facts, {}).problems[0]
    shutil.rmtree(run)
    run.write_text("in the way")
    assert "is no folder" in output.check_output(recipe, facts, {}).problems[0]
    monkeypatch.setattr(output.os, "access", lambda path, how: False)
    run.unlink()
    assert "cannot be written to" in output.check_output(recipe, facts, {}).problems[0]


def test_the_room_needed_is_what_a_run_takes(world: Path) -> None:
    lora = {"rank": 64, "alpha": 8}
    stages = [{"preset": "sft", "lora": None}, {"preset": "sft", "name": "lora", "lora": lora}]
    recipe = read(world, stages=stages)
    facts = check_stages(recipe, FakeModels(recipe))[1]
    needed = room_needed(recipe, facts, {"sft": 6, "lora": 6})
    run_recipe(recipe, say=lambda _: None)
    taken = sum(p.stat().st_size for p in (world / "run").rglob("*") if p.is_file())
    assert needed is not None
    print(f"{needed / 2**20:.2f} MiB needed, {taken / 2**20:.2f} taken in the end")
    # Less: tokenizers, pictures, generators' states. More: the checkpoint that is written beside others.
    most = max(fact.checkpoint for fact in facts.values())
    assert taken - 2**20 <= needed <= taken + most


def test_no_more_checkpoints_than_there_are_steps() -> None:
    stage = Stage(name="s", trains=("all",), global_batch=4, keep_checkpoints=2, save_every=10)
    assert checkpoints_at_once(stage, None) == 3
    assert checkpoints_at_once(stage, 4) == 1
    assert checkpoints_at_once(stage, 4 * 11) == 2
    assert checkpoints_at_once(stage, 4 * 1000) == 3


# ------------------------------------------------------------------------------------- data


def spoil(folder: Path) -> dict[int, str]:
    """A data file with one sample of every kind of harm; number -> a part of the reason."""
    good = json.loads((folder / "data.json").read_text())
    (folder.parent / "outside.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "text.png").write_text("no picture")
    turns = good[0]["conversations"]
    two = [{**turns[0], "value": "<image><image>\nwhere?"}, turns[1]]
    talk = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "two"}] * 30
    harmed: list[tuple[Any, str]] = [
        ({**good[0], "image": "absent.png"}, "is not a file in"),
        ({**good[0], "image": "../outside.png"}, "lies outside the image root"),
        ({**good[0], "image": "cut.png"}, "cannot be decoded"),
        ({**good[0], "image": "text.png"}, "cannot be decoded"),
        ({**good[0], "conversations": two}, "has 2 <image> markers and 1 images"),
        ({**good[0], "conversations": turns[:1]}, "ends without an answer"),
        ({**good[0], "conversations": turns[1:]}, "turn 0 is from 'gpt'"),
        ({**good[0], "conversations": "words"}, "allowed: a list of turns"),
        ("a text", "is a str; allowed: a mapping"),
        ({"conversations": talk[:58] + turns[2:]}, ""),  # long, and good: it is cut
        ({**good[0], "conversations": talk[:58] + turns}, "images beyond the limit"),
    ]
    records = good + [record for record, _ in harmed]
    (folder / "data.json").write_text(json.dumps(records))
    return {i: reason for i, (_, reason) in enumerate(harmed, start=len(good)) if reason}


def test_every_bad_sample_is_found_named_and_reported(world: Path) -> None:
    expected = spoil(world)
    data = {"path": "data.json", "template": "bare", "max_length": 128, "workers": 1}
    path = rewrite(world, data=data, stages=SFT)
    report = world / "found.json"
    result = command(path, "--no-dry-step", "--report", report)
    assert result.exit_code == 1
    found = json.loads(report.read_text())
    parts = {part["name"]: part for part in found["parts"]}
    bad = parts["data"]["bad_samples"]
    assert len(bad) == len(expected)
    for entry, (number, reason) in zip(bad, expected.items(), strict=True):
        assert f"data.json, sample {number}" in entry["sample"] and reason in entry["reason"]
        assert reason in result.output.replace("\n", "")
    (source,) = parts["data"]["sources"]
    assert (source["samples"], source["bad"], source["truncated"]) == (17, 10, 1)
    assert source["tokens"]["max"] == 128
    # Exactly what training passes over.
    recipe = load_recipe(path)
    dataset = load_data(recipe, recipe.stages[0], load_processor(recipe))
    passed_over = []
    for number in range(len(dataset)):
        try:
            dataset.load(number)
        except SampleError as error:
            passed_over.append({"sample": error.where, "reason": error.reason})
    assert passed_over == bad


def test_twenty_bad_samples_are_shown_and_all_counted(world: Path) -> None:
    records = json.loads((world / "data.json").read_text())
    lines = [json.dumps(record) for record in records] + ["{"] * 23
    (world / "data.jsonl").write_text("\n".join(lines))
    path = rewrite(world, data={"path": "data.jsonl", "template": "bare"}, stages=SFT)
    result = command(path, "--no-dry-step")
    assert result.exit_code == 1
    assert "23 bad samples" in result.output and "and 3 more" in result.output
    assert result.output.count("no json") == 20
    result = command(path, "--no-dry-step", "--samples", 6)
    assert result.exit_code == 0 and "only 6 of 29 samples were looked at" in result.output


def test_streams(world: Path) -> None:
    records = json.loads((world / "data.json").read_text())
    lines = [json.dumps(record) for record in records] + ["{"]
    (world / "data.jsonl").write_text("\n".join(lines))
    stream = {"path": "data.jsonl", "template": "bare", "streaming": True, "group_batches": False}
    path = rewrite(world, data=stream, stages=[{**SFT[0], "steps": 2}])
    (problem,) = check(path).part("data").problems
    assert "sample 6" in problem and "no json" in problem
    outcome = check(path, samples=6, dry_step=True)
    assert outcome.ok, problems(outcome)
    assert outcome.part("data").facts["sources"][0]["looked_at"] == 6
    assert "only its first 6 samples" in outcome.part("data").notes[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "absent.json"}, "data of sft: "),
        ({"path": "data.json", "template": "unheard"}, "template is 'unheard'"),
        ({"path": "data.json", "template": "bare", "image_root": "absent"}, "which is no folder"),
        ({"path": "data.json", "template": "bare", "limit": 0}, "has no samples"),
    ],
)
def test_sources(world: Path, data: dict[str, Any], message: str) -> None:
    outcome = check(rewrite(world, data=data, stages=SFT))
    assert message in "\n".join(outcome.part("data").problems)
    assert outcome.part("memory").left_out and outcome.part("dry step").left_out


def test_stages_that_need_images_and_have_none(world: Path) -> None:
    records = json.loads((world / "data.json").read_text())
    (world / "data.json").write_text(json.dumps(records[2:3]))
    (problem,) = check(rewrite(world, stages=KD)).part("data").problems
    assert "projector of stage dpt can learn nothing without" in problem


def change_config(folder: Path, *keys: str, value: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("image_token_id",), 7, "has 36 image tokens for the student and 0 for the teacher"),
        (("vision_config", "patch_size"), 24, "has 36 image tokens and the teacher makes 4 of its"),
        (("text_config", "vocab_size"), 100, "and the teacher knows 100"),
        (("text_config", "max_position_embeddings"), 50, "the teacher at most 50 positions"),
    ],
)
def test_both_models_must_take_the_batch(
    world: Path, keys: tuple[str, ...], value: int, message: str
) -> None:
    change_config(world / "teacher", *keys, value=value)
    models = {"teacher": "teacher", "student": "student"}
    outcome = check(rewrite(world, models=models, stages=KD), samples=1)
    assert message in "\n".join(outcome.part("data").problems)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_whose_images_have_grids(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without their processors' video part these cannot be loaded from a folder: it is handed over."""
    worlds.write_llava(tmp_path)
    resize(tmp_path)
    processor = write_pair(family, tmp_path)
    processor.tokenizer.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(checkpoints, "load_processor", lambda recipe: processor)
    path = tmp_path / "recipe.yaml"
    recipe = {
        "models": {"teacher": "teacher", "student": "student"},
        "output": "run",
        "cpu": True,
        "data": {"path": "data.json", "max_length": 256},
        "stages": KD,
    }
    path.write_text(yaml.safe_dump(recipe))
    outcome = check(path)
    assert outcome.ok, problems(outcome)
    most = outcome.part("data").facts["sources"][0]["visual_tokens"]["max"]
    assert most == {"qwen2_5_vl": 16, "llava_onevision": 88}[family]
    if family == "qwen2_5_vl":
        change_config(tmp_path / "teacher", "vision_config", "spatial_merge_size", value=4)
        assert "16 visual tokens and its images' grids make 4" in problems(check(path))


def test_quantiles_are_values_that_occur() -> None:
    assert quantiles(list(range(1, 101))) == {"median": 50, "p95": 95, "max": 100}
    assert quantiles([7]) == {"median": 7, "p95": 7, "max": 7}
    assert quantiles([]) == {}


# --------------------------------------------------------------------------- recorded targets


def test_recorded_targets_take_the_teachers_place(world: Path) -> None:
    stages = [{"preset": "dft", "lora": None}]
    models = {"teacher": "teacher", "student": "student", "cache": {"path": "targets"}}
    path = rewrite(world, models=models, stages=stages)
    (problem,) = check(path).part("recorded targets").problems
    assert "models.cache" in problem and "holds no finished recording of stage dft" in problem
    assert CliRunner().invoke(build_app(), ["cache", str(path)]).exit_code == 0

    shutil.rmtree(world / "teacher")  # it is not needed any more
    before = tree(world)
    outcome = check(path, dry_step=True)
    assert outcome.ok, problems(outcome)
    assert tree(world) == before
    assert set(outcome.part("dry step").facts["stages"]["dft"]["terms"]) == {
        "lm",
        "kd",
        "alignment",
    }
    lines = outcome.part("memory").facts["stages"]["dft"]["lines"]
    assert "teacher's weights" not in lines and "a recorded map" in lines

    records = json.loads((world / "data.json").read_text())
    records[4]["conversations"][1]["value"] = "at right"
    (world / "data.json").write_text(json.dumps(records))
    (problem,) = check(path).part("data").problems
    assert "sample 4" in problem and "not among the recorded targets of stage dft" in problem


# ------------------------------------------------------------------- memory and the dry step


def test_a_device_that_is_too_small(world: Path) -> None:
    path = rewrite(world, stages=SFT)
    result = command(path, "--no-dry-step", "--device-memory", "0.001")
    assert result.exit_code == 1 and "DOES NOT FIT" in result.output
    assert "student's weights" not in result.output
    assert "student's weights" in command(path, "--no-dry-step", "--plan").output
    assert "stages[0] (sft)" in result.output
    assert command(path, "--no-dry-step", "--device-memory", "80GiB").exit_code == 0


def test_a_plan_without_data_or_weights(world: Path) -> None:
    """Of a recipe that is meant for a device that is not here."""
    for name in ("data.json", "teacher/model.safetensors", "student/model.safetensors"):
        (world / name).unlink()
    stage = {"preset": "dft", "precision": "bf16"}
    path = rewrite(world, stages=[stage], cpu=False)
    outcome = check(path, visual_tokens=36, device_memory=80 * 2**30)
    assert [part.name for part in outcome.parts if part.problems] == ["checkpoints", "data"]
    (plan,) = outcome.plans
    assert (plan.shape.tokens, plan.shape.visual, plan.shape.labelled) == (1536, 36, 1500)
    problem = check(path, visual_tokens=1536, device_memory=80 * 2**30).part("memory").problems[0]
    assert "max_length is 1536, which 1536 image tokens do not fit" in problem
    if not torch.cuda.is_available():
        assert "bf16" in check(path).part("stages").problems[0]


def test_the_longest_sample_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(name="s", trains=("all",), micro_batch=2, global_batch=2)
    sizes = [Size(i, 10 * i, 0 if i % 4 else 5, 1) for i in range(1, 31)]
    source = Source("data", Data("data"), ["s"], sizes=sizes)
    unit = 2**30

    def total(recipe: Any, stage: Any, models: Any, shape: Any, **more: Any) -> Any:
        return SimpleNamespace(total=shape.batch * shape.tokens * unit)

    monkeypatch.setattr(dry, "plan_stage", total)
    recipe: Any = SimpleNamespace(cpu=True)
    models: Any = None

    def chosen(memory: int) -> list[int]:
        found = choose(recipe, stage, models, source, None, memory + dry.RESERVE_BYTES)
        return [size.index for size in found]

    assert chosen(2 * 300 * unit) == [1, 28]  # 30 is longer and has no image, 28 has one
    assert chosen(2 * 95 * unit) == [1, 8]
    assert chosen(2 * 35 * unit) == [1, 3]
    assert chosen(2 * 9 * unit) == []


def harm_weights(folder: Path, name: str, value: float | None) -> None:
    """Fill the weights whose name ends so; None takes them out."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    found = [key for key in weights if key.endswith(name)]
    assert found
    for key in found:
        if value is None:
            del weights[key]
        else:
            weights[key].fill_(value)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("role", "name", "value", "message"),
    [
        ("teacher", "lm_head.weight", float("nan"), "the loss kd of the dry step is nan"),
        ("student", "o_proj.weight", 0.0, "gives no gradient to the projector"),
        ("student", "norm.weight", None, "lacks"),
    ],
)
def test_what_only_a_step_shows(
    world: Path, role: str, name: str, value: float | None, message: str
) -> None:
    harm_weights(world / role, name, value)
    path = rewrite(world, models={"teacher": "teacher", "student": "student"}, stages=KD)
    assert check(path).ok
    outcome = check(path, dry_step=True)
    assert message in "\n".join(outcome.part("dry step").problems)
    json.dumps(outcome.plain(), allow_nan=False)
