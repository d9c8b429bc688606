"""``fastalign eval`` as a user runs it, on the shipped teacher and questions that it can answer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from examples.shapes.demo import TEACHER, load_teacher
from fastalign.commands import build_app
from fastalign.evals.benchmarks.pope import POPE
from fastalign.evals.loading import load
from fastalign.evals.protocols import Ask
from fastalign.evals.registry import BENCHMARKS
from fastalign.evals.shapes.dataset import EvaluationSet, evaluation_set
from fastalign.evals.shapes.render import render
from fastalign.evals.shapes.scoring import answers_right

runner = CliRunner()
PER_TYPE = 24


@pytest.fixture(scope="module")
def world() -> EvaluationSet:
    return evaluation_set("test", PER_TYPE, seed=2)


@pytest.fixture(scope="module")
def data(world: EvaluationSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's yes/no questions as one file of POPE."""
    folder = tmp_path_factory.mktemp("pope")
    (folder / "images").mkdir()
    lines = []
    for i, item in enumerate(world.items):
        if item.question.answer in ("yes", "no"):
            render(world.scenes[item.scene]).save(folder / "images" / f"{i}.png")
            question = {"question_id": i, "image": f"{i}.png", "text": item.question.text}
            lines.append(json.dumps(question | {"label": item.question.answer}) + "\n")
    (folder / "coco_pope_random.json").write_text("".join(lines))
    return folder


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    """The teacher was trained on bare questions: no instruction, LLaVA's bare template."""
    return [
        *("eval", str(TEACHER), "pope", "--data", str(data / "coco_pope_random.json")),
        *("--images", str(data / "images"), "--out", str(out)),
        *("--instruction", "", "--template", "bare", *more),
    ]


def test_the_teachers_score_is_that_of_its_own_evaluation(
    data: Path, world: EvaluationSet, tmp_path: Path
) -> None:
    """Greedy decoding by the evaluator against teacher forcing by the world's own scoring."""
    result = runner.invoke(build_app(), arguments(data, tmp_path / "out", "--batch-size", "7"))
    assert result.exit_code == 0, result.output
    items = [item for item in world.items if item.question.answer in ("yes", "no")]
    expected = answers_right(load_teacher(), world, items)
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    verdicts = [json.loads(line) for line in lines]
    assert [v["said_yes"] == v["label"] for v in verdicts] == expected
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    accuracy = scores["scores"]["splits"]["random"]["accuracy"]
    assert accuracy == pytest.approx(sum(expected) / len(expected))
    assert accuracy > 0.9
    assert f"{accuracy:.4f}" in result.output
    assert scores["unread"] == 0


def test_the_likelier_answer_is_the_generated_one(data: Path) -> None:
    """The two ways to take an answer from a model that knows its answers, asked one by one."""
    vlm = load(str(TEACHER), template="bare")
    samples = POPE.read(data / "coco_pope_random.json", data / "images")
    asks = [Ask(s.id, (s.image, s.question), ("yes", "no")) for s in samples]
    compared = [("yes", "no")[reply.best or 0] for reply in vlm.reply(asks)]
    asks = [dataclasses.replace(ask, options=()) for ask in asks]
    assert compared == [reply.text for reply in vlm.reply(asks)]
    assert len(set(compared)) == 2


def test_a_limit_is_told(data: Path, tmp_path: Path) -> None:
    result = runner.invoke(build_app(), arguments(data, tmp_path / "out", "--limit", "5"))
    assert result.exit_code == 0
    assert "on 5 of" in result.output
    assert "not the benchmark's score" in result.output


def test_resume_and_exit_codes(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = arguments(data, out, "--limit", "4")
    assert runner.invoke(build_app(), first).exit_code == 0
    again = runner.invoke(build_app(), first)
    assert again.exit_code == 2
    assert "allowed: --resume" in again.output
    resumed = runner.invoke(build_app(), [*first, "--resume"])
    assert resumed.exit_code == 0
    assert "4 replies are there already, 0 to go" in resumed.output
    other = runner.invoke(build_app(), [*first, "--resume", "--method", "options"])
    assert other.exit_code == 2
    assert "another method" in other.output


def test_wrong_usage_and_bad_files_tell(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong = arguments(data, out)
    wrong[2] = "vqa"
    result = runner.invoke(build_app(), wrong)
    assert result.exit_code == 2
    assert "benchmark is 'vqa'; allowed: sugarcrepe" in result.output
    result = runner.invoke(build_app(), arguments(data, out, "--method", "match"))
    assert result.exit_code == 2
    assert "--method is 'match'; allowed for pope: generate, options" in result.output
    bad = tmp_path / "bad"
    shutil.copytree(data, bad)
    path = bad / "coco_pope_random.json"
    path.write_text(path.read_text().replace('"label": "yes"', '"label": 1', 1))
    result = runner.invoke(build_app(), arguments(bad, out))
    assert result.exit_code == 1
    assert "'label' is 1; allowed: a text" in result.output
    (tmp_path / "empty").mkdir()
    missing = arguments(data, out)
    missing[1] = str(tmp_path / "empty")
    assert runner.invoke(build_app(), missing).exit_code == 1
    assert not (out / "replies.jsonl").exists()


def test_the_list_names_every_benchmark() -> None:
    result = runner.invoke(build_app(), ["eval", "--list"])
    assert result.exit_code == 0
    for name, benchmark in BENCHMARKS.items():
        assert f"{name}: {benchmark.title}" in result.output
