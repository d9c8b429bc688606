"""A recipe with a cache: recorded, gone on with, refused, and training as with the teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from fastalign.commands import build_app
from fastalign.distill import recording, targets
from fastalign.distill.data.content import content_digest
from fastalign.distill.recipe import load_recipe
from fastalign.distill.run import run_recipe
from fastalign.models import TeacherCache
from fastalign.models.cache import MANIFEST

from .test_run import world

VOCABULARY = 10_000  # more than there are
STAGES = [
    {"preset": "dpt", "losses": {"lm": 1, "kd": 1, "kd_temperature": 2}},
    {"preset": "dft", "lora": None, "losses": {"lm": 1, "kd": 1, "alignment": 1}},
]
WHOLE = {"path": "targets", "top_k": VOCABULARY, "dtype": "float32"}


def command(folder: Path, *words: str) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(), [*words, str(folder / "recipe.yaml")])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def losses(folder: Path) -> list[dict[str, float]]:
    summary = run_recipe(load_recipe(folder / "recipe.yaml"), say=lambda _: None)
    return [entry for stage in summary["stages"] for entry in stage["history"]]


def change(folder: Path, **changes: Any) -> None:
    """Other models' entries, data's entries or top-level ones of the recipe."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for name, value in changes.items():
        if isinstance(value, dict):
            recipe[name] = {**recipe[name], **value}
        else:
            recipe[name] = value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with every likeliest token recorded in float32."""
    folder = tmp_path_factory.mktemp("recorded")
    models = {"teacher": "teacher", "student": "student", "taf": "linear", "cache": WHOLE}
    world(folder, stages=STAGES, models=models, pictures=0)
    code, output = command(folder, "cache")
    assert code == 0, output
    assert "dpt: recorded 6 samples" in output and "dft: recorded 6 samples" in output
    return folder


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    shutil.copytree(recorded, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_losses_are_the_live_teachers(
    copy: Path, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffled, in other batches, a bad sample among them: each step's every term to 1e-6."""
    defaults = {"fused_head": fused, "steps": 3}
    change(copy, defaults=defaults)
    records = json.loads((copy / "data.json").read_text())
    records[4]["image"] = "missing.png"
    (copy / "data.json").write_text(json.dumps(records))
    loaded: list[Any] = []
    monkeypatch.setattr(
        "fastalign.distill.run.load_teacher", lambda r: loaded.append(r) or targets_teacher(r)
    )
    found = losses(copy)
    assert len(loaded) == 1  # for the adapter, before the first stage
    change(copy, models={"cache": None}, output="live")
    expected = losses(copy)
    assert len(found) == len(expected) == 6
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    assert any(entry["loss/alignment"] > 1e-3 for entry in found if "loss/alignment" in entry)


def targets_teacher(recipe: Any) -> Any:
    from fastalign.distill.loading import load_teacher

    return load_teacher(recipe)


def test_fewer_digits_come_near_and_fewer_tokens_never_above(copy: Path) -> None:
    at: dict[tuple[int, str], float] = {}
    for k, dtype in (
        (VOCABULARY, "float32"),
        (VOCABULARY, "bfloat16"),
        (8, "float32"),
        (1, "float32"),
    ):
        cache = {"path": f"targets_{k}_{dtype}", "top_k": k, "dtype": dtype}
        change(
            copy,
            models={"cache": cache},
            output=f"run_{k}_{dtype}",
            stages=[STAGES[0]],
            defaults={"steps": 1},
        )
        assert command(copy, "cache")[0] == 0
        at[k, dtype] = losses(copy)[0]["loss/kd"]
    whole = at[VOCABULARY, "float32"]
    assert at[VOCABULARY, "bfloat16"] == pytest.approx(whole, rel=1e-2)
    assert at[VOCABULARY, "bfloat16"] != whole
    assert 0 < at[1, "float32"] < at[8, "float32"] < whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"max_length": 64}}, "was recorded with max_length 1536, and 64 is asked for"),
        ({"data": {"template": "vicuna"}}, "recorded with template 'bare', and 'vicuna'"),
        ({"models": {"cache": {**WHOLE, "top_k": 4}}}, "with top_k 10000, and 4 is asked for"),
        ({"models": {"teacher": "other"}}, "was recorded with teacher_files"),
        ({"models": {"teacher_dtype": "bfloat16"}}, "with teacher_dtype 'float32', and 'bfloat16'"),
        (
            {"stages": [{**STAGES[0], "losses": {"lm": 1, "kd": 1, "kd_temperature": 3}}]},
            "with kd_temperature 2.0, and 3.0",
        ),
        (
            {"stages": [{**STAGES[1], "name": "new"}]},
            "holds no finished recording of stage new; allowed: run `fastalign cache`",
        ),
        (
            {"stages": [{**STAGES[1], "losses": {"lm": 1, "hidden": 1}}]},
            "stages[0].losses has ['hidden'] and models.cache is given; allowed with a cache: lm, kd",
        ),
    ],
)
def test_another_recipe_is_refused(copy: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("models", {}).get("teacher"):
        shutil.copytree(copy / "teacher", copy / "other")
        weights = bytearray((copy / "other" / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (copy / "other" / "model.safetensors").write_bytes(weights)
    change(copy, **changes)
    code, output = command(copy, "distill")
    assert code == 2
    assert message in output


def test_other_data_are_refused(copy: Path) -> None:
    """The same words about another picture: found by the first batch that has it."""
    records = json.loads((copy / "data.json").read_text())
    for record in records:
        if "image" in record:
            record["image"] = "0.png"
    (copy / "data.json").write_text(json.dumps(records))
    code, output = command(copy, "distill")
    assert code == 1
    assert "is not in the cache of the teacher's targets" in output


def test_a_recording_that_is_killed_goes_on(
    copy: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after the second batch of the second stage: what is there is not made again."""
    shutil.rmtree(copy / "targets" / "dft")
    monkeypatch.setattr(targets, "SHARD_SAMPLES", 2)
    real = targets._record
    batches: list[int] = []

    def cut(recorder: Any, teacher: Any, batch: Any, stage: Any) -> Any:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(batch["input_ids"]))
        return real(recorder, teacher, batch, stage)

    monkeypatch.setattr(targets, "_record", cut)
    recipe = load_recipe(copy / "recipe.yaml")
    with pytest.raises(KeyboardInterrupt):
        recording.record_recipe(recipe, plan=False, say=lambda _: None, bar=quiet)
    assert not (copy / "targets" / "dft" / MANIFEST).exists()
    code, output = command(copy, "distill")  # before the first stage, which is recorded
    assert not (copy / "run").exists()
    assert code == 2 and "holds no finished recording of stage dft" in output
    batches.clear()
    batches.append(0)  # one batch more
    recording.record_recipe(recipe, plan=False, say=lambda _: None, bar=quiet)
    assert batches == [0, 2]
    ours, theirs = (TeacherCache(f / "targets" / "dft") for f in (copy, recorded))
    assert ours.hashes == theirs.hashes and ours.numbers == theirs.numbers
    for sample in range(len(ours)):
        for layer in ours.matching:
            a, b = (c.read(sample, f"layer_{layer}/values") for c in (ours, theirs))
            assert a is not None and b is not None and torch.equal(a, b)


def quiet(name: str) -> Any:
    from contextlib import nullcontext

    return nullcontext(lambda done, total: None)


def test_a_finished_recording_is_checked(copy: Path) -> None:
    code, output = command(copy, "cache")
    assert code == 0
    assert "dft: 6 samples are there, their checksums hold" in output
    shard = copy / "targets" / "dpt" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, output = command(copy, "cache")
    assert code == 1
    assert "shard-00000.safetensors is missing or does not have the checksum" in output


def test_the_size_is_told_first_and_is_the_files(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All samples are looked at here, so what is announced is what tensors take."""
    shutil.rmtree(copy / "targets")
    recipe = load_recipe(copy / "recipe.yaml")
    said: list[str] = []
    recording.record_recipe(recipe, plan=True, say=said.append, bar=quiet)
    assert not (copy / "targets").exists()
    assert [line.partition(":")[0] for line in said] == ["dpt", "dft"]
    recording.record_recipe(recipe, plan=False, say=lambda _: None, bar=quiet)
    for stage in recipe.stages:
        processor = recording.load_processor(recipe)
        data = recording.load_data(recipe, stage, processor)
        collate = recording.Collator(processor.tokenizer.pad_token_id)
        size = targets.estimate(recipe, stage, data, collate)
        cache = TeacherCache(copy / "targets" / stage.name)
        held = sum(
            tensor.numel() * tensor.element_size()
            for file, names in cache._files
            for tensor in map(file.get_tensor, names)
        )
        assert size.total == pytest.approx(held, rel=1e-9)
    monkeypatch.setattr(targets.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1))
    shutil.rmtree(copy / "targets")
    code, output = command(copy, "cache")
    assert code == 1
    assert "has too little space for 6 samples of about" in output


def test_a_content_is_all_that_a_model_gets() -> None:
    item = {"input_ids": [1, 2], "labels": [-100, 2], "pixel_values": torch.zeros(1, 3, 2, 2)}
    name = content_digest(item)
    assert content_digest({**item, "skipped_samples": ["x"], "recorded": 3}) == name
    dark = torch.zeros(1, 3, 2, 2)
    dark[0, 0, 0, 0] = 1e-6
    for other in (
        {"input_ids": [1, 3]},
        {"labels": [1, 2]},
        {"pixel_values": dark},
        {"pixel_values": torch.zeros(1, 3, 4, 1)},
        {"pixel_values": torch.zeros(1, 3, 2, 2).bfloat16()},
        {"token_type_ids": [0, 0]},
    ):
        assert content_digest({**item, **other}) != name
