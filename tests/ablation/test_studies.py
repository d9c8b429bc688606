"""Studies: cut anywhere and resumed they come out bit for bit; other runs are not compared."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastalign.ablation.records import Record, read_records, sources_digest
from fastalign.ablation.runner import Progress, repeat, run_study
from fastalign.ablation.study import Study, StudyError, load_study
from fastalign.ablation.task import find_task
from fastalign.commands import build_app

TEXT = """
name: toy
task: tests.ablation.toy:ToyTask
settings: {steps: 12}
conditions:
  plain:
  noisy: {noise: 0.5}
  fast: {lr: 0.3}
seeds: [0, 1, 2]
measures: [closeness]
compare: [[fast, plain], [noisy, plain]]
thresholds: [0.4, 2.0]
score_every: 2
checkpoint_every: 4
"""


def study(folder: Path, text: str = TEXT) -> Study:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(text)
    return load_study(path)


def timeless(record: Record) -> dict[str, Any]:
    values = asdict(record)
    for name in ("cpu_seconds", "wall_seconds", "scoring_seconds", "pieces"):
        del values[name]
    for entry in values["curve"]:
        del entry["cpu_seconds"]
    return values


def quiet(text: str) -> None:
    pass


class Ticks:
    """A clock that goes on by a second at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_pieces_give_the_records_of_one_go(tmp_path: Path) -> None:
    whole, cut = study(tmp_path / "whole"), study(tmp_path / "cut")
    assert run_study(whole, checkpoints=tmp_path / "a", say=quiet) == Progress(9, 0)
    pieces = 0
    while True:
        pieces += 1
        progress = run_study(
            cut, checkpoints=tmp_path / "b", minutes=3 / 60, say=quiet, clock=Ticks()
        )
        assert pieces < 100
        if not progress.left:
            break
    assert pieces > 5
    task = find_task(whole)
    ours, theirs = read_records(whole, task), read_records(cut, task)
    assert [r.name for r in ours] == [
        f"{c}-{s}" for s in range(3) for c in ("plain", "noisy", "fast")
    ]
    assert [timeless(r) for r in ours] == [timeless(r) for r in theirs]
    assert max(r.pieces for r in theirs) > 1
    assert not list((tmp_path / "b").rglob("*.pt"))
    assert [e["step"] for e in ours[0].curve] == [2, 4, 6, 8, 10, 12]


def test_a_finished_run_is_not_made_again_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    made = study(tmp_path)
    run_study(made, checkpoints=tmp_path / "a", say=quiet, only=[("noisy", 1)])
    path = tmp_path / "runs" / "noisy-1.json"
    before = path.read_bytes()
    run_study(made, checkpoints=tmp_path / "a", say=quiet, only=[("noisy", 1)])
    assert path.read_bytes() == before
    assert repeat(made, "noisy", 1) == []
    values = json.loads(before)
    values["final"]["closeness"] += 1e-12
    values["weights"] = "0"
    path.write_text(json.dumps(values))
    assert repeat(made, "noisy", 1) == ["final", "weights"]


def test_conditions_of_a_seed_share_data_and_initial_weights(tmp_path: Path) -> None:
    made = study(tmp_path)
    task = find_task(made)
    first = [task(task.Settings(lr=lr), 1).step(0) for lr in (0.1, 0.3)]
    assert first[0] == first[1] != task(task.Settings(), 2).step(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"steps": 12, "lr": 0.2, "noise": 0.0}}, "lr: run 0.2, study 0.1"),
        ({"sources_digest": "0"}, "the code of .* differs"),
        ({"study": "other"}, "is a run of study 'other'"),
        ({"condition": "gone"}, "no condition 'gone'"),
        ({"format": 9}, "has format 9; allowed: 1"),
        ({"environment": {"torch": "1.0"}}, "environment.* allowed: the same"),
        ({"config": {"step": 12}}, "settings that the task does not know"),
    ],
)
def test_runs_that_differ_in_something_unnamed_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    made = study(tmp_path)
    run_study(made, checkpoints=tmp_path / "a", say=quiet)
    path = tmp_path / "runs" / "plain-1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StudyError, match=message):
        read_records(made, find_task(made))


def test_what_may_differ_is_named_in_the_study(tmp_path: Path) -> None:
    made = study(tmp_path)
    run_study(made, checkpoints=tmp_path / "a", say=quiet)
    path = tmp_path / "runs" / "plain-1.json"
    values = json.loads(path.read_text())
    values["environment"]["threads"] = 99
    path.write_text(json.dumps(values))
    with pytest.raises(StudyError, match=r"environment\.threads"):
        read_records(made, find_task(made))
    assert len(read_records(replace(made, may_differ=("threads",)), find_task(made))) == 9


def test_a_setting_that_the_code_of_the_run_did_not_have_counts_as_its_default(
    tmp_path: Path,
) -> None:
    from fastalign.ablation.records import digest

    made = study(tmp_path)
    run_study(made, checkpoints=tmp_path / "a", say=quiet, only=[("plain", 0)])
    path = tmp_path / "runs" / "plain-0.json"
    values = json.loads(path.read_text())
    del values["config"]["noise"]
    values["config_digest"] = digest(values["config"])
    path.write_text(json.dumps(values))
    assert len(read_records(made, find_task(made))) == 1
    values["config_digest"] = "0"
    path.write_text(json.dumps(values))
    with pytest.raises(StudyError, match="its digest is not that"):
        read_records(made, find_task(made))


def test_a_checkpoint_of_another_study_is_refused(tmp_path: Path) -> None:
    made = study(tmp_path)
    run_study(made, checkpoints=tmp_path / "a", minutes=3 / 60, say=quiet, clock=Ticks())
    other = study(tmp_path, TEXT.replace("steps: 12", "steps: 16"))
    with pytest.raises(StudyError, match="checkpoint of other settings"):
        run_study(other, checkpoints=tmp_path / "a", say=quiet)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("noise: 0.5", "nois: 0.5", r"conditions.noisy has an entry 'nois'"),
        ("ToyTask", "NoTask", "allowed: 'module:Class'"),
        ("tests.ablation.toy:ToyTask", "toy", "task is 'toy'"),
        ("[fast, plain]", "[fast, slow]", r"compare has \['fast', 'slow'\]"),
        ("[0, 1, 2]", "[0, 0]", "none twice"),
        ("checkpoint_every: 4", "checkpoint_every: 3", "a multiple of it"),
        ("name: toy", "nam: toy", "an entry 'nam'"),
    ],
)
def test_wrong_studies_name_the_entry(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        run_study(study(tmp_path, TEXT.replace(old, new)), checkpoints=tmp_path, say=quiet)


def test_layout_comments_and_docstrings_are_no_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for name, text in (
        ("one", '"""A."""\ndef f(x):\n    """B."""\n    return x + 1\n'),
        ("two", "def f(x):  # C\n\n    return (x + 1)\n"),
        ("three", "def f(x):\n    return x + 2\n"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "code_under_study.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
        digests.append(sources_digest(["code_under_study"]))
        monkeypatch.undo()
    assert digests[0] == digests[1] != digests[2]


def test_the_command_runs_reports_and_says_by_its_exit_code(tmp_path: Path) -> None:
    study(tmp_path)
    runner = CliRunner()
    command = ["ablate", str(tmp_path / "study.yaml"), "--checkpoints", str(tmp_path / "a")]
    first = runner.invoke(build_app(), [*command, "--seeds", "0,1"])
    assert first.exit_code == 0, first.output
    assert "6 runs finished, 0 left" in first.output
    again = runner.invoke(build_app(), [*command, "--repeat", "fast-1"])
    assert (again.exit_code, "bit for bit" in again.output) == (0, True)
    text = (tmp_path / "table.md").read_text()
    assert "6 of 9 runs are finished" in text
    found = json.loads((tmp_path / "table.json").read_text())
    values = [
        json.loads((tmp_path / "runs" / f"fast-{s}.json").read_text())["final"]["closeness"]
        for s in (0, 1)
    ]
    assert found["conditions"]["fast"]["measures"]["closeness"]["mean"] == sum(values) / 2
    assert found["conditions"]["plain"]["reached"]["2.0"]["runs"] == 0
    assert "never (0 of 2)" in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    for arguments in (["--seeds", "7"], ["--conditions", "none"], ["--repeat", "fast-9"]):
        assert runner.invoke(build_app(), command + arguments).exit_code == 2
    assert runner.invoke(build_app(), ["ablate", str(tmp_path / "none.yaml")]).exit_code == 2
    path = tmp_path / "runs" / "plain-0.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 0, "odd": 1'))
    broken = runner.invoke(build_app(), [*command, "--table"])
    assert broken.exit_code == 1
    assert "plain-0.json is not a run record" in broken.output
