"""MME: six images, twelve questions, in the released folder; points worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastalign.distill.data.records import SampleError
from fastalign.evals.benchmarks.mme import COGNITION, MME, PERCEPTION, reads_as_yes
from fastalign.evals.protocols import Ask, Wording
from fastalign.evals.runner import evaluate

from .stubs import Told, image, judged, number, scores, write_images, write_parquet

TAIL = " Please answer yes or no."
#: image i: (category, name); its questions are answered Yes and No
IMAGES = [
    ("existence", "000000006040"),
    ("existence", "000000006041"),
    ("existence", "000000006042"),
    ("posters", "tt0048028"),
    ("posters", "tt0055928"),
    ("code_reasoning", "0001"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """existence and code_reasoning keep image and text together, posters in two folders."""
    root = tmp_path / "MME_Benchmark_release_version"
    names = []
    for category, name in IMAGES:
        folder = root / category
        text = folder / "questions_answers_YN" if category == "posters" else folder
        text.mkdir(parents=True, exist_ok=True)
        lines = f"Is this {name}?{TAIL}\tYes\nIs this a cat?{TAIL}\tNo\n"
        (text / f"{name}.txt").write_text(lines)
        inner = f"{category}/images" if category == "posters" else category
        names.append(f"{inner}/{name}.{'png' if category == 'code_reasoning' else 'jpg'}")
    write_images(root, names)
    return root


#: Yes, No are right.
REPLIES = {
    "existence/000000006040": ("Yes", "No"),  # both
    "existence/000000006041": ("Yes.", "Yes"),  # one
    "existence/000000006042": ("no", "yes"),  # none
    "posters/tt0048028": ("Yes, it is", "No, it is not"),  # both
    "posters/tt0055928": ("It is", "n"),  # the first has no answer: one
    "code_reasoning/0001": ("The answer is yes", "not a cat"),  # beyond four letters: one
}


def test_points_by_generation(data: Path) -> None:
    samples = MME.read(data, None)
    assert len(samples) == 12
    replies = {f"{pair}/{n + 1}": [said[n]] for pair, said in REPLIES.items() for n in (0, 1)}
    result = judged(MME, samples, replies)
    # existence: acc 3/6, acc+ 1/3; posters: acc 3/4, acc+ 1/2; code_reasoning: acc 1/2, acc+ 0
    assert result["categories"]["existence"] == {
        "acc": 1 / 2, "acc_plus": 1 / 3, "points": pytest.approx(50 + 100 / 3),
    }  # fmt: skip
    assert result["categories"]["posters"] == {"acc": 3 / 4, "acc_plus": 1 / 2, "points": 125}
    assert result["categories"]["code_reasoning"] == {"acc": 1 / 2, "acc_plus": 0, "points": 50}
    assert "perception_points" not in result  # eight categories are missing
    assert "cognition_points" not in result


def test_points_by_log_probability(data: Path) -> None:
    yes, no, tie = scores(-0.1, -2.5), scores(-2.5, -0.1), scores(-0.7, -0.7)
    samples = [s for s in MME.read(data, None) if s.category == "existence"]
    given = (yes, no, yes, yes, tie, no)  # both; one; a tie is wrong: one
    replies = {s.id: [r] for s, r in zip(samples, given, strict=True)}
    result = judged(MME, samples, replies, Wording("options"))
    assert result["categories"]["existence"]["acc"] == 4 / 6
    assert result["categories"]["existence"]["acc_plus"] == 1 / 3


def whole(tmp_path: Path) -> list[Any]:
    """Every category once, from parquet."""
    rows = [
        {
            "question_id": f"{category}/{i:04d}.png",
            "image": image(i),
            "question": f"{text}{TAIL}",
            "answer": answer,
            "category": category,
        }
        for i, category in enumerate(PERCEPTION + COGNITION)
        for text, answer in ((f"Is this number {i}?", "Yes"), ("Is this a cat?", "No"))
    ]
    return MME.read(write_parquet(tmp_path / "data" / "test.parquet", rows), None)


@pytest.mark.parametrize("method", MME.methods)
def test_an_oracle_gets_everything(tmp_path: Path, method: Any) -> None:
    def oracle(ask: Ask) -> str:
        return "Yes" if f"number {number(ask.pictures[0])}?" in ask.prompt else "No"

    samples = whole(tmp_path)
    result = evaluate(MME, samples, Told(oracle), tmp_path / "out", wording=Wording(method))
    assert result["scores"]["perception_points"] == 2000
    assert result["scores"]["cognition_points"] == 800


def test_always_yes_earns_fifty_a_category(tmp_path: Path) -> None:
    result = evaluate(MME, whole(tmp_path), Told(lambda ask: "Yes"), tmp_path / "out")
    assert result["scores"]["perception_points"] == 500
    assert result["scores"]["cognition_points"] == 200


def test_the_folders_images_belong_to_their_questions(data: Path) -> None:
    for sample in MME.read(data, None):
        assert IMAGES[number(sample.image)] == tuple(sample.pair.split("/"))


def test_prompts(data: Path) -> None:
    sample = MME.read(data, None)[0]
    (ask,) = MME.ask(sample, Wording())
    assert ask.prompt == f"Is this 000000006040?{TAIL}"
    (ask,) = MME.ask(sample, Wording(instruction="One word."))
    assert ask.prompt == "Is this 000000006040?\nOne word."


@pytest.mark.parametrize(
    ("answer", "yes"),
    [("Yes", True), ("n", False), (" No.", False), ("yes!", True), ("It is", None), ("y", True)],
)
def test_answers_are_read_as_the_published_script_reads_them(answer: str, yes: bool | None) -> None:
    assert reads_as_yes(answer) is yes


def test_malformed_files_are_named(data: Path, tmp_path: Path) -> None:
    path = data / "existence" / "000000006041.txt"
    path.write_text(f"Is this it?{TAIL}\tYes\nIs this a cat?{TAIL} No\n")
    with pytest.raises(SampleError, match=r"000000006041.txt, line 2: .*question <tab> Yes or No"):
        MME.read(data, None)
    path.write_text(f"Is this it?{TAIL}\tYes\n")
    with pytest.raises(SampleError, match=r"1 questions about existence/000000006041; allowed: 2"):
        MME.read(data, None)
    row = {
        "question_id": "x",
        "image": image(0),
        "question": "?",
        "answer": "Yes",
        "category": "ocr",
    }
    with pytest.raises(SampleError, match=r"row 0: 'category' is 'ocr'; allowed: existence"):
        MME.read(write_parquet(tmp_path / "x.parquet", [row]), None)
