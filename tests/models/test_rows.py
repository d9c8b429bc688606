"""Which rows: by name, mask, function; and that sampled rows give unbiased means."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastalign import AlignSpec
from fastalign.models import AttentionAlignment
from fastalign.models.tokens import Tokens, choose_rows
from tests.models import eager, tiny
from tests.models.test_llava import step


def tokens() -> tuple[Tokens, dict[str, Any]]:
    """Two samples of 8: text, 3 visual, text, response 2; the second padded on the left by 2."""
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, :2] = False
    visual = torch.zeros_like(valid)
    visual[0, 1:4] = True
    visual[1, 3:6] = True
    labels = torch.full((2, 8), -100)
    labels[:, 6:] = 1
    return Tokens(valid, visual, None), {"labels": labels}


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        ("visual", [1, 2, 3], [3, 4, 5]),
        ("text", [0, 4, 5, 6, 7], [2, 6, 7, -1, -1]),
        ("response", [6, 7], [6, 7]),
        ("instruction", [0, 4, 5], [2, -1, -1]),
        ("last", [7], [7]),
        (lambda inputs: inputs["labels"] == 1, [6, 7], [6, 7]),
    ],
)
def test_rows_by_name(rule: Any, first: list[int], second: list[int]) -> None:
    held, inputs = tokens()
    choice = choose_rows(rule, held, inputs)
    assert choice.positions.tolist() == [first, second]
    assert choice.weight is None
    assert not choice.every


def test_all_rows_and_masks() -> None:
    held, inputs = tokens()
    choice = choose_rows("all", held, inputs)
    assert choice.every
    assert choice.positions.tolist() == [list(range(8)), [-1, -1, *range(2, 8)]]
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, :3] = True  # padding is not a row, whatever the mask says
    assert choose_rows(mask, held, inputs).positions.tolist() == [[0, 1, 2], [2, -1, -1]]
    none = choose_rows(torch.zeros_like(mask), held, inputs)
    assert none.positions.tolist() == [[-1], [-1]]


def test_slicing_takes_the_rows() -> None:
    held, inputs = tokens()
    choice = choose_rows("text", held, inputs)
    q = torch.randn(2, 3, 8, 4)
    sliced = choice.slice(q)
    assert sliced.shape == (2, 3, 5, 4)
    assert torch.equal(sliced[0], q[0, :, [0, 4, 5, 6, 7]])
    assert torch.equal(sliced[1, :, :3], q[1, :, [2, 6, 7]])
    every = choose_rows("all", held, inputs)
    assert every.slice(q) is q


def test_a_sample_of_rows() -> None:
    held, inputs = tokens()
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(2, 8)
    for _ in range(400):
        choice = choose_rows("all:3", held, inputs, generator)
        assert choice.positions.shape == (2, 3)
        assert choice.weight is not None
        for b, (first, rows) in enumerate([(1, 7), (3, 5)]):
            drawn = choice.positions[b].tolist()
            assert drawn == sorted(set(drawn))
            assert min(drawn) >= first  # earlier rows see no visual token
            torch.testing.assert_close(choice.weight[b], torch.full((8,), rows / 3))
            counts[b, drawn] += 1
    for b, (first, rows) in enumerate([(1, 7), (3, 5)]):
        assert not counts[b, :first].any()
        assert (counts[b, first:] / 400 - 3 / rows).abs().max() < 0.1
    few = choose_rows("response:5", held, inputs, generator)  # no more than there are
    assert few.positions[:, :2].tolist() == [[6, 7], [6, 7]]
    assert (few.positions[:, 2:] == -1).all()
    assert few.weight is not None
    assert (few.weight == 1).all()


@pytest.mark.parametrize(
    "spec",
    [
        AlignSpec(compare="row"),
        AlignSpec(compare="row", divergence="kl", normalize="visual"),
        AlignSpec(divergence="mse"),
    ],
    ids=["row cosine", "row kl", "map mse"],
)
def test_the_mean_over_sampled_rows_is_unbiased(
    spec: AlignSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over every possible draw is the loss of all rows, and so is the gradient's."""
    teacher, student = tiny.llava(seed=1).eval(), tiny.llava(seed=2)
    inputs = tiny.batch()
    marked = inputs["labels"] != -100
    draws = [(i, j) for i in range(5) for j in range(5)]  # one row of five in each sample

    def run(rows: str, chosen: list[tuple[int, int]]) -> tuple[list[float], dict[str, Any]]:
        student.zero_grad()
        values = []
        for pair in chosen:
            noise = torch.zeros(marked.shape)
            for b, ordinal in enumerate(pair):
                noise[b, marked[b].nonzero()[ordinal]] = 0.5
            monkeypatch.setattr(torch, "rand", lambda *_, noise=noise, **__: noise)
            alignment = AttentionAlignment(student, teacher, spec, {2: 2}, rows)
            step(alignment, student, teacher, inputs)
            (alignment.loss() / len(chosen)).backward()
            values.append(alignment.loss().item())
        return values, eager.gradients(student)

    exact, exact_gradient = run("response", draws[:1])
    values, gradient = run("response:1", draws)
    assert max(values) > 1.2 * min(values)
    assert sum(values) / len(values) == pytest.approx(exact[0], rel=1e-5)
    assert eager.relative_error(gradient, exact_gradient) < 1e-5
