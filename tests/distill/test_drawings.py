"""Pictures of a stage: which there are, who names them, and that none of them can cost a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastalign.analysis import overlays
from fastalign.distill.recipe import load_recipe
from fastalign.distill.run import run_recipe

from .test_run import world

DFT = {"preset": "dft", "lora": None, "steps": 2, "losses": {"lm": 1, "kd": 1, "alignment": 1}}


def run(folder: Path, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    """(summary, what was said)."""
    world(folder, **changes)
    said: list[str] = []
    return run_recipe(load_recipe(folder / "recipe.yaml"), say=said.append), said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "final" / "model.safetensors")


def test_a_stage_leaves_curves_and_overlays_and_the_card_shows_them(tmp_path: Path) -> None:
    summary, _ = run(tmp_path / "drawn", stages=[DFT])
    stage = summary["stages"][0]
    assert stage["pictures"] == ["01-dft/curves.png", "01-dft/attention.png"]
    assert stage["picture_notes"] == []
    output = tmp_path / "drawn" / "run"
    saved = json.loads((output / "01-dft" / "final" / "stage.json").read_text())
    assert saved == json.loads(json.dumps(stage))
    card = (output / "final" / "README.md").read_text()
    for name in stage["pictures"]:
        copy = name.replace("/", "-")
        assert f"]({copy})" in card
        assert (output / "final" / copy).read_bytes() == (output / name).read_bytes()
    with Image.open(output / "01-dft" / "attention.png") as picture:
        assert (
            picture.size[0] > picture.size[1] * 0.7
        )  # four rows of four: image, teacher, before, after
    # Whether somebody looks changes no bit of the student.
    summary, _ = run(tmp_path / "plain", stages=[DFT], pictures=0)
    assert summary["stages"][0]["pictures"] == ["01-dft/curves.png"]
    drawn, plain = weights(tmp_path / "drawn"), weights(tmp_path / "plain")
    assert all(torch.equal(drawn[name], plain[name]) for name in drawn)


def test_data_without_images_has_no_overlay_and_says_so(tmp_path: Path) -> None:
    world(tmp_path)
    records = json.loads((tmp_path / "data.json").read_text())
    for record in records:
        record.pop("image", None)
        record["conversations"][0]["value"] = "where is the red circle?"
    (tmp_path / "text.json").write_text(json.dumps(records))
    data = {"path": "text.json", "template": "bare"}
    summary, said = run(tmp_path, stages=[{**DFT, "losses": {"lm": 1}}], data=data)
    note = "no attention pictures: no sample of the data has one image"
    assert summary["stages"][0]["picture_notes"] == [note]
    assert f"01-dft: {note}" in said


@pytest.mark.parametrize("broken", ["before", "after"])
def test_a_picture_that_fails_is_told_and_the_run_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    real = overlays.example

    def fails(models: Any, *arguments: Any, **keywords: Any) -> Any:
        if f"student {broken}" in models:
            raise RuntimeError("no ink")
        return real(models, *arguments, **keywords)

    monkeypatch.setattr(overlays, "example", fails)
    summary, said = run(tmp_path, stages=[DFT])
    note = "no attention pictures: RuntimeError: no ink"
    assert summary["stages"][0]["picture_notes"] == [note]
    assert summary["stages"][0]["pictures"] == ["01-dft/curves.png"]
    assert f"01-dft: {note}" in said
    assert weights(tmp_path)
