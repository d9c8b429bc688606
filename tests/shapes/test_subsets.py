"""Minimal pairs: true and false by the oracle, a word or a swap apart, scored by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from examples.shapes.demo import load_teacher
from fastalign.evals.shapes.dataset import encode
from fastalign.evals.shapes.subsets import SUBSETS, Pair, pair_set, score_pairs
from tests.shapes import oracle

PAIRS = pair_set("validation", 60)


def test_every_true_text_is_true_and_every_false_one_false() -> None:
    assert [sum(p.subset == s for p in PAIRS) for s in SUBSETS] == [60] * len(SUBSETS)
    for pair in PAIRS:
        assert oracle.answer(pair.scene, pair.true) == "yes"
        assert oracle.answer(pair.scene, pair.false) == "no"


def test_pairs_differ_as_their_subset_says() -> None:
    for pair in PAIRS:
        true, false = pair.true.strip("?").split(), pair.false.strip("?").split()
        colours, shapes = (
            {t.colour for t in pair.scene.things},
            {t.shape for t in pair.scene.things},
        )
        changed = [(a, b) for a, b in zip(true, false, strict=False) if a != b]
        if pair.subset == "swap_obj":
            assert sorted(true) == sorted(false)
        elif pair.subset == "add":
            extra = set(false) - set(true)
            assert len(extra) == 1
            assert extra <= colours | shapes
        elif pair.subset == "replace_rel":
            assert len(changed) == 1
            assert changed[0][0] in ("left", "right", "above", "below")
        else:
            [(_, new)] = changed
            here = colours | shapes
            assert (new in here) == (pair.subset == "swap_att")


def test_the_same_arguments_give_the_same_pairs() -> None:
    assert pair_set("validation", 5) == pair_set("validation", 5)
    assert pair_set("validation", 5) != pair_set("test", 5)


class Fixed(torch.nn.Module):
    """Says what it is told, question by question: [N, (yes, no, other)] logits."""

    def __init__(self, rows: list[tuple[float, float, float]]) -> None:
        super().__init__()
        self.rows = iter(rows)

    def forward(self, input_ids: torch.Tensor, **rest: Any) -> Any:
        logits = torch.full((len(input_ids), 1, 400), -9.0)
        for row in logits[:, 0]:
            row[encode("yes")[0]], row[encode("no")[0]], row[399] = next(self.rows)
        return type("Out", (), {"logits": logits})


def test_scores_by_hand() -> None:
    scene = PAIRS[0].scene
    pairs = [Pair("add", scene, "is there a circle?", "is there a red circle?") for _ in range(4)]
    model = Fixed(
        [
            (2, 0, 0), (0, 2, 0),  # right
            (2, 0, 0), (1, 0, 0),  # chosen rightly, but yes to both
            (0, 2, 0), (0, 3, 9),  # chosen rightly, both wrong
            (0, 2, 0), (2, 0, 0),  # wrong
        ]
    )  # fmt: skip
    [score] = score_pairs(model, pairs, batch_size=3).values()
    assert (score.choice, score.both, score.asked) == (0.75, 0.25, 4)


def test_the_teacher_tells_all_subsets_apart() -> None:
    for name, score in score_pairs(load_teacher(), PAIRS).items():
        assert score.choice > 0.95, name


@pytest.mark.parametrize("subset", SUBSETS)
def test_false_texts_do_not_repeat_one_form(subset: str) -> None:
    """A model that knows the texts alone should not tell true from false: both have many forms."""
    chosen = [p for p in PAIRS if p.subset == subset]
    assert len({p.false for p in chosen}) > 20
