"""Winoground and BiVLC: ten squares each, scores worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastalign.distill.data.records import SampleError
from fastalign.evals.benchmarks.bivlc import BIVLC
from fastalign.evals.benchmarks.winoground import WINOGROUND
from fastalign.evals.protocols import Ask, Reply, Wording
from fastalign.evals.runner import evaluate

from .stubs import Told, image, judged, number, scores, write_images, write_parquet

#: s[i][c], image i with caption c, as log-probabilities of Yes; then (text, image): which comparisons
#: are won. text 0: s00 > s01, text 1: s11 > s10; image 0: s00 > s10, image 1: s11 > s01.
SQUARES = [
    ((-1, -2, -2, -1), (1, 1), (1, 1)),
    ((-1, -2, -1.5, -1), (1, 1), (1, 1)),
    ((-1, -1, -2, -0.5), (0, 1), (1, 1)),  # a tie is not won
    ((-1, -2, -0.5, -1.5), (1, 0), (0, 1)),  # the second image likes everything
    ((-1, -1.5, -0.2, -0.1), (1, 1), (0, 1)),
    ((-3, -2, -4, -1), (0, 1), (1, 1)),  # the second caption fits everything
    ((-2, -1, -1, -2), (0, 0), (0, 0)),
    ((-1, -1, -1, -1), (0, 0), (0, 0)),
    ((-1, -2, -3, -2.5), (1, 1), (1, 0)),
    ((-0.1, -5, -5, -0.1), (1, 1), (1, 1)),
]
#: text: squares 0, 1, 4, 8, 9; image: 0, 1, 2, 5, 9; both: 0, 1, 9
TEXT, IMAGE, GROUP = 0.5, 0.5, 0.3
TAGS = ["Object"] * 5 + ["Relation"] * 4 + ["Both"]
TYPES = [("replace", "obj")] * 4 + [("swap", "att")] * 4 + [("add", "obj")] * 2


def yes(value: float) -> Reply:
    """Yes with this log-probability; No's does not matter."""
    return scores(value, -0.01)


MATCHES = {str(i): [yes(v) for v in square[0]] for i, square in enumerate(SQUARES)}


@pytest.fixture
def winoground(tmp_path: Path) -> Path:
    """examples.jsonl as published; image 2 i + j is image_j of row i."""
    rows = [
        {
            "id": i,
            "image_0": f"ex_{i}_img_0",
            "image_1": f"ex_{i}_img_1",
            "caption_0": f"thing {i} on a box",
            "caption_1": f"a box on thing {i}",
            "tag": "Noun",
            "secondary_tag": "",
            "num_main_preds": 1,
            "collapsed_tag": TAGS[i],
        }
        for i in range(10)
    ]
    write_images(tmp_path / "images", [f"ex_{i}_img_{j}.png" for i in range(10) for j in (0, 1)])
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def bivlc(tmp_path: Path) -> Path:
    rows = [
        {
            "image": image(2 * i),
            "caption": f"thing {i} on a box",
            "negative_caption": f"a box on thing {i}",
            "negative_image": image(2 * i + 1),
            "type": TYPES[i][0],
            "subtype": TYPES[i][1],
        }
        for i in range(10)
    ]
    return write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)


def test_the_squares_are_as_noted() -> None:
    """The table above against the definitions, once more."""
    for (s00, s01, s10, s11), text, image_ in SQUARES:
        assert (s00 > s01, s11 > s10) == tuple(map(bool, text))
        assert (s00 > s10, s11 > s01) == tuple(map(bool, image_))


def test_winoground_by_matching(winoground: Path) -> None:
    result = judged(WINOGROUND, WINOGROUND.read(winoground, None), MATCHES)
    assert {k: result[k] for k in ("text", "image", "group")} == {
        "text": TEXT,
        "image": IMAGE,
        "group": GROUP,
    }
    # Object: 0..4, Relation: 5..8, Both: 9
    assert result["tags"]["Object"] == {"text": 3 / 5, "image": 3 / 5, "group": 2 / 5}
    assert result["tags"]["Relation"] == {"text": 1 / 4, "image": 1 / 4, "group": 0}
    assert result["tags"]["Both"] == {"text": 1, "image": 1, "group": 1}


def test_bivlc_by_matching(bivlc: Path) -> None:
    result = judged(BIVLC, BIVLC.read(bivlc, None), MATCHES)
    assert (result["i2t"], result["t2i"], result["group"]) == (TEXT, IMAGE, GROUP)
    # columns of the table: won of ten
    assert result["positive_image_to_text"] == 0.6
    assert result["negative_image_to_text"] == 0.7
    assert result["positive_text_to_image"] == 0.6
    assert result["negative_text_to_image"] == 0.7
    # replace: squares 0..3, swap: 4..7, add: 8 and 9
    assert result["types"]["replace"]["i2t"] == 2 / 4
    assert result["types"]["replace/obj"]["t2i"] == 3 / 4
    assert result["types"]["swap"]["group"] == 0
    assert result["types"]["add/obj"]["group"] == 1 / 2


def test_side_by_side_both_orders_must_agree(winoground: Path) -> None:
    """Asks of a sample: image 0 (right first, second), caption 0, image 1, caption 1."""
    samples = WINOGROUND.read(winoground, None)
    right = ["A", "B"] * 4
    replies: dict[str, Sequence[Reply | str]] = {s.id: right for s in samples}
    replies["1"] = ["A", "A", *right[2:]]  # the first image's caption in one order only
    replies["2"] = [*right[:2], "B", "B", *right[4:]]  # the first caption's image in one order only
    replies["3"] = ["A box", "B", *right[2:]]  # no choice
    replies["4"] = ["a box on thing 4", "A. a box on thing 4", *right[2:]]  # wrong by its text
    result = judged(WINOGROUND, samples, replies, Wording("generate"))
    assert (result["text"], result["image"], result["group"]) == (0.7, 0.9, 0.6)


def test_side_by_side_a_margin_forgives_a_preference_for_a_letter(winoground: Path) -> None:
    samples = WINOGROUND.read(winoground, None)[:1]
    first, second = scores(-0.1, -3.0), scores(-1.0, -1.5)  # A both times; 2.9 - 0.5 > 0
    assert judged(WINOGROUND, samples, {"0": [first, second] * 4}, Wording("options"))["group"] == 1
    first = scores(-0.1, -0.4)  # 0.3 - 0.5 < 0
    assert judged(WINOGROUND, samples, {"0": [first, second] * 4}, Wording("options"))["text"] == 0


def oracle(ask: Ask) -> str:
    """Image 2 i shows "thing i on a box", image 2 i + 1 "a box on thing i"."""
    truths = [
        f"a box on thing {number(p) // 2}" if number(p) % 2 else f"thing {number(p) // 2} on a box"
        for p in ask.pictures
    ]
    if len(truths) == 2:
        return "AB"[truths.index(ask.prompt.split("\n")[-2])]
    if "A. " in ask.prompt:
        return "A" if f"A. {truths[0]}\n" in ask.prompt else "B"
    return "Yes" if f'"{truths[0]}"' in ask.prompt else "No"


@pytest.mark.parametrize("method", WINOGROUND.methods)
def test_an_oracle_gets_everything(
    winoground: Path, bivlc: Path, tmp_path: Path, method: Any
) -> None:
    wording = Wording(method)
    told = Told(oracle)
    first = evaluate(
        WINOGROUND, WINOGROUND.read(winoground, None), told, tmp_path / "w", wording=wording
    )
    assert [first["scores"][k] for k in ("text", "image", "group")] == [1, 1, 1]
    second = evaluate(BIVLC, BIVLC.read(bivlc, None), told, tmp_path / "b", wording=wording)
    assert [second["scores"][k] for k in ("i2t", "t2i", "group")] == [1, 1, 1]


def test_always_yes_wins_nothing(bivlc: Path, tmp_path: Path) -> None:
    result = evaluate(BIVLC, BIVLC.read(bivlc, None), Told(lambda ask: "Yes"), tmp_path / "out")
    assert result["scores"]["i2t"] == result["scores"]["t2i"] == 0


def test_winoground_from_parquet(tmp_path: Path) -> None:
    row = {
        "id": 7,
        "image_0": image(3),
        "image_1": image(4),
        "caption_0": "x y",
        "caption_1": "y x",
    }
    (sample,) = WINOGROUND.read(write_parquet(tmp_path / "test.parquet", [row]), None)
    assert (sample.id, [number(p) for p in sample.images]) == ("7", [3, 4])


def test_malformed_rows_are_named(winoground: Path, bivlc: Path) -> None:
    lines = winoground.read_text().splitlines()
    winoground.write_text("\n".join([*lines[:3], lines[3][:-9], *lines[4:]]))
    with pytest.raises(SampleError, match=r"examples.jsonl, line 4: no json"):
        WINOGROUND.read(winoground, None)
    winoground.write_text("\n".join([*lines[:9], lines[0]]))
    with pytest.raises(SampleError, match=r"line 10: has the id '0' of .*line 1"):
        WINOGROUND.read(winoground, None)
    write_parquet(bivlc, [{"image": image(0), "caption": "x", "negative_caption": "y"}])
    with pytest.raises(SampleError, match=r"parquet, row 0: lacks 'negative_image'"):
        BIVLC.read(bivlc, None)
