"""The teacher's attention in the student: rows stay distributions, 0 changes nothing, 1 replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastalign.analysis import mixing
from fastalign.analysis.mixing import Mix, mixed_forward
from fastalign.models import visual_attention
from tests.models import tiny


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    student = tiny.llava(layers=3, heads=2, kv_heads=1, seed=1).eval()
    return student, tiny.llava(layers=3, seed=2).eval()


def inputs(**changes: Any) -> dict[str, Any]:
    batch = tiny.batch(**changes)
    del batch["labels"]
    return batch


def test_a_share_of_0_is_the_student_itself(pair: tuple[Any, Any]) -> None:
    student, teacher = pair
    batch = inputs(left=True)
    with torch.no_grad():
        plain = student(**batch, use_cache=False).logits
    mixed = mixed_forward(student, teacher, batch, Mix(0.0)).logits
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(mixed[valid], plain[valid], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        again = student(**batch, use_cache=False).logits
    assert torch.equal(again, plain)  # nothing of it is left in the student


def test_a_teacher_that_looks_alike_changes_nothing(pair: tuple[Any, Any]) -> None:
    """With one head the head mean is the head itself."""
    model = tiny.llava(layers=2, heads=1, kv_heads=1, head_dim=16, seed=3).eval()
    twin = tiny.llava(layers=2, heads=1, kv_heads=1, head_dim=16, seed=3).eval()
    batch = inputs()
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**batch, use_cache=False).logits
    for kind in mixing.KINDS:
        mixed = mixed_forward(model, twin, batch, Mix(1.0, kind=kind)).logits
        torch.testing.assert_close(mixed[valid], plain[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", mixing.KINDS)
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_mixed_rows_by_hand(
    pair: tuple[Any, Any], kind: str, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair
    batch = inputs(images=(1,), lengths=(17,))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    make = mixing._change

    def spying(*arguments: Any) -> Any:
        change = make(*arguments)

        def spy(probabilities: torch.Tensor) -> torch.Tensor:
            out = change(probabilities)
            seen.append((probabilities, out))
            return out

        return spy

    monkeypatch.setattr(mixing, "_change", spying)
    mixed_forward(student, teacher, batch, Mix(weight, kind=kind, only=(1,)))
    [(before, after)] = seen  # one layer only
    maps = visual_attention(teacher, batch, layers=[1])[1][0]
    at = (batch["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
    off = [j for j in range(17) if j not in at.tolist()]
    torch.testing.assert_close(after.sum(-1), torch.ones_like(after.sum(-1)))
    for i in range(17):
        for h in range(2):
            p, q, t = before[0, h, i], after[0, h, i], maps[i]
            if t.sum() == 0:
                torch.testing.assert_close(q, p)
                continue
            if kind == "place":
                image = (1 - weight) * p[at] + weight * t / t.sum() * p[at].sum()
                text = p[off]
            else:
                image = (1 - weight) * p[at] + weight * t
                text = p[off] * (1 - image.sum()) / p[off].sum()
            torch.testing.assert_close(q[at], image)
            torch.testing.assert_close(q[off], text)


def test_wrong_mixes_are_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="weight is 2"):
        Mix(2)
    with pytest.raises(ValueError, match="allowed: 'map', 'place'"):
        Mix(1, kind="all")
    with pytest.raises(ValueError, match="only names layer 7"):
        mixed_forward(*pair, inputs(), Mix(1.0, only=(7,)))
