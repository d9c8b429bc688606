"""SugarCrepe: twelve captions in the published files, scores worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastalign.distill.data.records import SampleError, SourceError
from fastalign.evals.benchmarks.sugarcrepe import SUBSETS, SUGARCREPE
from fastalign.evals.protocols import Ask, Wording
from fastalign.evals.runner import evaluate

from .stubs import Told, judged, number, scores, write_images

#: (subset, caption, negative caption), image i belongs to entry i
CAPTIONS = [
    ("add_att", "A dog on a lawn.", "A spotted dog on a lawn."),
    ("add_obj", "A man with a kite.", "A man with a kite and a hat."),
    ("add_obj", "Two cups on a table.", "Two cups and a plate on a table."),
    ("replace_att", "A red bus on a street.", "A blue bus on a street."),
    ("replace_obj", "A cat on a sofa.", "A dog on a sofa."),
    ("replace_obj", "A bowl of apples.", "A bowl of oranges."),
    ("replace_rel", "A man beside a horse.", "A man on a horse."),
    ("swap_att", "A white cat and a black dog.", "A black cat and a white dog."),
    ("swap_att", "A tall man and a short boy.", "A short man and a tall boy."),
    ("swap_att", "A full glass, an empty cup.", "An empty glass, a full cup."),
    ("swap_att", "A young girl, an old car.", "An old girl, a young car."),
    ("swap_obj", "A bird above a boat.", "A boat above a bird."),
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """(data, images) as published: a json a subset, {"0": {filename, caption, negative_caption}}."""
    names = [f"{index:012d}.jpg" for index in range(len(CAPTIONS))]
    for subset in SUBSETS:
        chosen = [(n, c) for n, c in zip(names, CAPTIONS, strict=True) if c[0] == subset]
        content = {
            str(i): {"filename": n, "caption": c[1], "negative_caption": c[2]}
            for i, (n, c) in enumerate(chosen)
        }
        (tmp_path / f"{subset}.json").write_text(json.dumps(content))
    return tmp_path, write_images(tmp_path / "val2017", names)


def read(files: tuple[Path, Path]) -> list[Any]:
    return SUGARCREPE.read(*files)


#: By sample: (A, B) log-probabilities with the right caption as A, then as B.
BY_LOG_PROBABILITY = {
    "add_att/0": (scores(-0.1, -2.0), scores(-2.0, -0.1)),  # right, right
    "add_obj/0": (scores(-0.1, -2.0), scores(-0.5, -1.0)),  # right, wrong; margin 1.9 - 0.5 > 0
    "add_obj/1": (scores(-0.1, -0.3), scores(-0.5, -1.5)),  # right, wrong; margin 0.2 - 1.0 < 0
    "replace_att/0": (scores(-2.0, -0.1), scores(-0.1, -2.0)),  # wrong, wrong
    "replace_obj/0": (scores(-0.2, -1.0), scores(-1.0, -0.2)),  # right, right
    "replace_obj/1": (scores(-1.0, -0.2), scores(-3.0, -0.2)),  # wrong, right; margin -0.8 + 2.8
    "replace_rel/0": (scores(-1.0, -1.0), scores(-2.0, -0.2)),  # a tie is no choice, right; 0 + 1.8
    "swap_att/0": (scores(-0.1, -2.0), scores(-2.0, -0.1)),  # right, right
    "swap_att/1": (scores(-0.1, -2.0), scores(-0.1, -2.0)),  # right, wrong; margin 1.9 - 1.9 = 0
    "swap_att/2": (scores(-2.0, -0.1), scores(-0.1, -2.0)),  # wrong, wrong
    "swap_att/3": (scores(-0.1, -2.0), scores(-0.1, -0.2)),  # right, wrong; margin 1.9 - 0.1 > 0
    "swap_obj/0": (scores(-0.1, -2.0), scores(-2.0, -0.1)),  # right, right
}


def test_scores_by_log_probability(files: tuple[Path, Path]) -> None:
    result = judged(SUGARCREPE, read(files), BY_LOG_PROBABILITY)
    subsets = result["subsets"]
    accuracy = {name: entry["accuracy"] for name, entry in subsets.items()}
    assert accuracy == {
        "add_att": 1.0,
        "add_obj": 2 / 4,
        "replace_att": 0.0,
        "replace_obj": 3 / 4,
        "replace_rel": 1 / 2,
        "swap_att": 4 / 8,
        "swap_obj": 1.0,
    }
    # unweighted over the subsets: (1 + 0.5 + 0 + 0.75 + 0.5 + 0.5 + 1) / 7, not 14 / 24
    assert result["accuracy"] == pytest.approx(4.25 / 7)
    assert {n: e["both_orders"] for n, e in subsets.items()} == {
        "add_att": 1, "add_obj": 0, "replace_att": 0, "replace_obj": 0.5, "replace_rel": 0,
        "swap_att": 0.25, "swap_obj": 1,
    }  # fmt: skip
    assert {n: e["unbiased"] for n, e in subsets.items()} == {
        "add_att": 1, "add_obj": 0.5, "replace_att": 0, "replace_obj": 1, "replace_rel": 1,
        "swap_att": 0.5, "swap_obj": 1,
    }  # fmt: skip
    # A was chosen, of two: add_att 1, add_obj 2 + 2, ..., swap_att 1 + 2 + 1 + 2 of 8
    assert subsets["add_obj"]["chose_first"] == 1.0
    assert subsets["swap_att"]["chose_first"] == 6 / 8


def test_scores_by_generation(files: tuple[Path, Path]) -> None:
    right, biased = ("A", "B"), ("A", "A")
    replies: dict[str, Any] = dict.fromkeys(BY_LOG_PROBABILITY, right)
    replies["swap_att/0"] = biased
    replies["swap_att/1"] = ("A white dog", "A. A short man and a tall boy.")  # no choice, wrong
    replies["swap_att/2"] = ("The answer is A.", "(b)")
    replies["swap_att/3"] = ("A young girl, an old car.", "A young girl, an old car.")  # its text
    replies["swap_obj/0"] = ("neither", "both")
    result = judged(SUGARCREPE, read(files), replies, Wording("generate"))
    # 1/2, 0/2, 2/2, 2/2 of the replies are right
    assert result["subsets"]["swap_att"]["accuracy"] == 5 / 8
    assert result["subsets"]["swap_att"]["both_orders"] == 2 / 4
    assert result["subsets"]["swap_obj"]["accuracy"] == 0
    assert result["accuracy"] == pytest.approx((5 + 5 / 8) / 7)


def oracle(ask: Ask) -> str:
    """Finds the true caption among the options by the image."""
    caption = CAPTIONS[number(ask.pictures[0])][1]
    return next(letter for letter in "AB" if f"{letter}. {caption}\n" in ask.prompt + "\n")


@pytest.mark.parametrize("method", SUGARCREPE.methods)
def test_an_oracle_gets_everything(files: tuple[Path, Path], tmp_path: Path, method: Any) -> None:
    result = evaluate(
        SUGARCREPE, read(files), Told(oracle), tmp_path / "out", wording=Wording(method), say=print
    )
    assert result["scores"]["accuracy"] == result["scores"]["unbiased"] == 1.0
    assert result["scores"]["chose_first"] == 0.5
    assert (result["samples"], result["of"], result["unread"]) == (12, 12, 0)


def test_always_a_is_half_right_and_never_in_both_orders(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    result = evaluate(SUGARCREPE, read(files), Told(lambda ask: "A"), tmp_path / "out", say=print)
    assert result["scores"]["accuracy"] == 0.5
    assert result["scores"]["both_orders"] == result["scores"]["unbiased"] == 0.0


def test_the_prompt(files: tuple[Path, Path]) -> None:
    first, second = SUGARCREPE.ask(read(files)[0], Wording("options"))
    assert first.prompt == (
        "Which caption describes the image correctly?\nA. A dog on a lawn.\n"
        "B. A spotted dog on a lawn.\nAnswer with the option's letter from the given choices directly."
    )
    assert "A. A spotted dog on a lawn.\nB. A dog on a lawn." in second.prompt
    assert first.options == ("A", "B")


def test_a_part_of_the_subsets_has_no_overall_score(files: tuple[Path, Path]) -> None:
    samples = SUGARCREPE.read(files[0] / "swap_obj.json", files[1])
    result = judged(SUGARCREPE, samples, BY_LOG_PROBABILITY)
    assert result["subsets"]["swap_obj"]["accuracy"] == 1.0
    assert "accuracy" not in result


def test_malformed_files_are_named(files: tuple[Path, Path]) -> None:
    path = files[0] / "swap_obj.json"
    path.write_text('{"0": {"filename": "000000000011.jpg", "caption": "A bird."}}')
    with pytest.raises(SampleError, match=r"swap_obj.json, sample '0': lacks 'negative_caption'"):
        read(files)
    path.write_text('{"0": {"filename": "x.jpg", "caption": 3, "negative_caption": "A"}}')
    with pytest.raises(SampleError, match=r"sample '0': 'caption' is 3; allowed: a text"):
        read(files)
    path.write_text('{"0": {"filename":\n "x.jpg",, }}')
    with pytest.raises(SourceError, match=r"swap_obj.json, line 2: no json"):
        read(files)
    with pytest.raises(SourceError, match=r"holds none of add_att.json"):
        SUGARCREPE.read(files[1], None)
