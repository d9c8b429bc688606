"""Streaming data: one order, whatever the workers and wherever a run was cut off."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from fastalign.distill.data import Encoder, SampleError
from fastalign.distill.data.records import SourceError
from fastalign.distill.data.stream import SPARE, ConversationStream, StreamSampler
from fastalign.distill.plain import RecipeError
from fastalign.distill.recipe import load_recipe, recipe_from_plain
from fastalign.distill.run import run_recipe
from fastalign.distill.trainer import DistillTrainer
from fastalign.evals.shapes.tokenizer import build_processor

from .test_run import world

STREAM = {
    "path": "data.jsonl",
    "template": "bare",
    "streaming": True,
    "shuffle_buffer": 4,
    "group_batches": False,
}


def streamed(folder: Path, count: int = 10, bad: tuple[int, ...] = (), **changes: Any) -> Path:
    """A world whose data are a jsonl file of ``count`` different samples."""
    recipe = world(folder, data=STREAM, pictures=0, stages=[{"preset": "dft", "lora": None}])
    records = json.loads((folder / "data.json").read_text())
    lines = []
    for i in range(count):
        record = {**records[i % len(records)], "id": str(i)}
        words = " ".join(["red"] * i)
        turns = [dict(turn) for turn in record["conversations"]]
        turns[-2]["value"] = f"how many blue things? {words}"
        record["conversations"] = turns
        if i in bad:
            record["image"] = "missing.png"
        lines.append(json.dumps(record))
    (folder / "data.jsonl").write_text("\n\n".join(lines) + "\n")
    recipe["defaults"] = {**recipe["defaults"], "steps": 6, **changes.pop("defaults", {})}
    recipe.update(changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def stream(folder: Path, **options: Any) -> ConversationStream:
    encoder = Encoder(build_processor(), "bare")
    return ConversationStream(folder / "data.jsonl", encoder, folder, **{"buffer": 4, **options})


def numbers(stream: ConversationStream, seed: int, count: int) -> list[int]:
    return [line.number for line in islice(stream.passes(seed), count)]


def test_each_pass_has_every_sample_in_an_order_of_its_own(tmp_path: Path) -> None:
    streamed(tmp_path)
    found = numbers(stream(tmp_path), 3, 30)
    assert found == numbers(stream(tmp_path), 3, 30)
    assert found != numbers(stream(tmp_path), 4, 30)
    passes = [found[i : i + 10] for i in (0, 10, 20)]
    for one in passes:
        assert sorted(one) == list(range(10))
    assert passes[0] != passes[1] != passes[2]
    assert numbers(stream(tmp_path, buffer=1), 3, 20) == [*range(10), *range(10)]
    assert Counter(numbers(stream(tmp_path, limit=3), 3, 6)) == {0: 2, 1: 2, 2: 2}


def test_processes_share_the_batches_of_one_order(tmp_path: Path) -> None:
    streamed(tmp_path)
    keys = list(StreamSampler(stream(tmp_path), 24, 3))
    assert [key[0].number for key in keys] == numbers(stream(tmp_path), 3, 24)
    shares = [
        list(
            BatchSamplerShard(BatchSampler(StreamSampler(stream(tmp_path), 24, 3), 2, False), 2, i)
        )
        for i in range(2)
    ]
    together = [key for pair in zip(*shares, strict=True) for batch in pair for key in batch]
    assert together == keys


def test_the_next_good_sample_takes_a_bad_ones_place(tmp_path: Path) -> None:
    streamed(tmp_path, bad=(1, 3, 4))
    data = stream(tmp_path, buffer=1)
    keys = list(StreamSampler(data, 5, 0))
    assert len(keys[3]) == SPARE + 1
    item = data[keys[3]]
    fifth = data.load(keys[3][2:])
    assert item["input_ids"] == fifth["input_ids"]
    assert ["missing.png" in reason for reason in item["skipped_samples"]] == [True, True]
    assert "sample 3" in item["skipped_samples"][0]
    with pytest.raises(SampleError, match=r"sample 1 .*missing.png"):
        stream(tmp_path, buffer=1, on_error="raise")[keys[1]]
    with pytest.raises(SampleError, match="none of 1 samples can be used"):
        data[keys[1][:1]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "final" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_six_steps_are_three_and_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the end of a pass, with a bad sample; workers change nothing; another seed does."""
    options: dict[str, Any] = {"bad": (5,)}
    recipes = {
        "whole": streamed(tmp_path / "whole", **options),
        "cut": streamed(tmp_path / "cut", **options),
        "workers": streamed(tmp_path / "workers", data={**STREAM, "workers": 2}, **options),
        "ordered": streamed(tmp_path / "ordered", data={**STREAM, "shuffle_buffer": 1}, **options),
    }
    summary = run_recipe(load_recipe(recipes["whole"]), say=lambda _: None)
    assert sum(summary["stages"][0]["skipped"].values()) >= 2  # 24 samples of 10
    step = DistillTrainer.training_step

    def cut_off(self: DistillTrainer, *arguments: Any, **keywords: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(DistillTrainer, "training_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(recipes["cut"]), say=lambda _: None)
    monkeypatch.setattr(DistillTrainer, "training_step", step)
    decoded: list[int] = []
    load = ConversationStream.load
    monkeypatch.setattr(
        ConversationStream, "load", lambda self, key: decoded.append(1) or load(self, key)
    )
    run_recipe(load_recipe(recipes["cut"]), resume=True, say=lambda _: None)
    assert 12 <= len(decoded) <= 14  # three steps of four, and what replaced a bad one
    monkeypatch.setattr(ConversationStream, "load", load)
    for name in ("workers", "ordered"):
        run_recipe(load_recipe(recipes[name]), say=lambda _: None)
    found = {name: weights(tmp_path / name) for name in recipes}
    assert same(found["cut"], found["whole"])
    assert same(found["workers"], found["whole"])
    assert not same(found["ordered"], found["whole"])


def test_a_run_that_was_cut_off_at_its_end_takes_no_further_step(tmp_path: Path) -> None:
    recipe = load_recipe(streamed(tmp_path, defaults={"steps": 2}))
    run_recipe(recipe, say=lambda _: None)
    before = weights(tmp_path)
    for folder in (tmp_path / "run" / "01-dft" / "final", tmp_path / "run" / "final"):
        folder.rename(folder.with_name("lost"))
    run_recipe(recipe, resume=True, say=lambda _: None)
    assert same(weights(tmp_path), before)


def test_pictures_come_from_the_files_beginning(tmp_path: Path) -> None:
    recipe = load_recipe(streamed(tmp_path, pictures=2, defaults={"steps": 1}))
    summary = run_recipe(recipe, say=lambda _: None)
    assert summary["stages"][0]["pictures"] == ["01-dft/attention.png"]


@pytest.mark.parametrize(
    ("data", "stage", "message"),
    [
        ({"group_batches": True}, {}, "streaming is true and group_batches is true"),
        ({"path": "data.json"}, {}, "streaming is true and path is 'data.json'; allowed: a .jsonl"),
        ({"shuffle_buffer": 0}, {}, "shuffle_buffer is 0; allowed: at least 1"),
        ({}, {"steps": None}, "has streaming data and no steps"),
    ],
)
def test_what_cannot_be_streamed_is_refused(
    tmp_path: Path, data: dict[str, Any], stage: dict[str, Any], message: str
) -> None:
    plain = {
        "models": {"teacher": "t", "student": "s"},
        "output": "run",
        "data": {**STREAM, **data},
        "stages": [{"preset": "dft", "steps": 3, **stage}],
    }
    with pytest.raises(RecipeError, match=message):
        recipe_from_plain(plain, tmp_path)


def test_a_file_without_samples(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"data.jsonl cannot be read: no such file"):
        stream(tmp_path)
    (tmp_path / "data.jsonl").write_text("\n\n")
    with pytest.raises(SampleError, match="holds no sample"):
        next(stream(tmp_path).passes(0))
