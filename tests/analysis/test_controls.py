"""Controls of an alignment: other columns, disturbed targets, frozen attention; from a recipe's entries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign import AlignSpec
from fastalign.distill.loading import choose_trained
from fastalign.distill.objective import Objective
from fastalign.distill.stages import Lora, Stage
from fastalign.distill.terms import Losses
from fastalign.models import AttentionAlignment
from fastalign.models.controls import disturbance
from fastalign.models.layer import LayerState
from fastalign.select import Visibility
from tests.analysis.test_measure import eager_maps
from tests.models import tiny

ROW = AlignSpec(compare="row")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return tiny.llava(layers=2, heads=2, seed=1).eval(), tiny.llava(layers=2, seed=2).eval()


def aligned(pair: tuple[Any, Any], batch: dict[str, Tensor], **options: Any) -> float:
    alignment = AttentionAlignment(*pair, layers="all", **{"spec": ROW, **options})
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad(), alignment.step(batch):
        pair[1](**inputs, use_cache=False)
        pair[0](**inputs, use_cache=False)
    return float(alignment.loss())


def row_loss(s: Tensor, t: Tensor, columns: Tensor, valid: Tensor) -> float:
    """1 - cos, mean over the rows that see a column; s, t [B, L, L]."""
    found = []
    for b in range(len(s)):
        for i in valid[b].nonzero().flatten().tolist():
            at = columns[b] & (torch.arange(s.shape[1]) <= i)
            if at.any():
                x, y = s[b, i, at], t[b, i, at]
                found.append(1 - float(x @ y / (x.norm() * y.norm())))
    return sum(found) / len(found)


def test_text_columns_are_the_valid_ones_that_are_not_visual(pair: tuple[Any, Any]) -> None:
    batch = tiny.batch(left=True)
    valid = batch["attention_mask"].bool()
    text = valid & (batch["input_ids"] != tiny.IMAGE)
    s, t = (eager_maps(model, batch) for model in pair)
    expected = (
        sum(row_loss(x.mean(1), y.mean(1), text, valid) for x, y in zip(s, t, strict=True)) / 2
    )
    assert aligned(pair, batch, columns="text") == pytest.approx(expected, abs=1e-5)
    assert aligned(pair, batch) != pytest.approx(expected, abs=1e-2)


def test_a_shuffled_target_has_the_teachers_values_at_other_columns(pair: tuple[Any, Any]) -> None:
    """One permutation a sample, the same in all layers: text rows after the image see a permuted map."""
    batch = tiny.batch(images=(1, 1), lengths=(20, 20))
    visual = batch["input_ids"] == tiny.IMAGE
    rows = torch.zeros_like(visual)
    rows[:, -4:] = True
    s, t = (eager_maps(model, batch) for model in pair)
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(tiny.PATCHES, generator=generator) for _ in range(2)]
    losses = []
    for x, y in zip(s, t, strict=True):
        moved = y.mean(1).clone()
        for b, order in enumerate(orders):
            at = visual[b].nonzero().flatten()
            moved[b][:, at] = moved[b][:, at[order]]
        losses.append(row_loss(x.mean(1), moved, visual, rows))
    found = aligned(
        pair, batch, rows=rows, target="shuffled", generator=torch.Generator().manual_seed(5)
    )
    assert found == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert found != pytest.approx(aligned(pair, batch, rows=rows), abs=1e-3)


def test_a_random_target_keeps_text_keys_and_norms(pair: tuple[Any, Any]) -> None:
    columns = torch.tensor([[False, True, True, False]])
    k = torch.randn(1, 2, 4, 8)
    state = LayerState(k, k, 1.0, None, None, Visibility(torch.zeros(1, 4), None, True, 0))
    disturb = disturbance("random", columns, torch.Generator().manual_seed(1))
    assert disturb is not None
    drawn = disturb(state).k
    assert torch.equal(drawn[:, :, [0, 3]], k[:, :, [0, 3]])
    torch.testing.assert_close(drawn.norm(dim=-1), k.norm(dim=-1))
    assert not torch.allclose(drawn[:, :, 1], k[:, :, 1], atol=0.1)
    assert disturbance("teacher", columns) is None
    batch = tiny.batch()
    assert aligned(pair, batch, target="random") != pytest.approx(aligned(pair, batch), abs=1e-3)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("columns", "answer", "columns is 'answer'; allowed: 'visual', 'text'"),
        ("target", "zero", "target is 'zero'; allowed: 'teacher', 'shuffled', 'random'"),
    ],
)
def test_unknown_controls_are_refused(
    pair: tuple[Any, Any], option: str, value: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionAlignment(*pair, layers="all", **{option: value})


def test_a_recipes_losses_switch_the_controls_on(pair: tuple[Any, Any]) -> None:
    losses = Losses(
        lm=0,
        alignment=1,
        alignment_layers="all",
        alignment_columns="text",
        alignment_target="random",
    )
    alignment = Objective(*pair, losses, whole_step=True).alignment
    assert alignment is not None
    assert (alignment.columns, alignment.target) == ("text", "random")


def test_units_of_text_columns_are_counted_over_micro_batches(pair: tuple[Any, Any]) -> None:
    """Half batches add up to the whole: BOS is seen by every row, the image is not."""
    losses = Losses(
        lm=0,
        alignment=1,
        alignment_spec={"compare": "row"},
        alignment_layers="all",
        alignment_columns="text",
    )
    batch = tiny.batch(images=(1, 1), lengths=(20, 20))
    halves = [{k: v[b : b + 1] for k, v in batch.items()} for b in range(2)]
    whole = Objective(*pair, losses, whole_step=True)
    parts = Objective(*pair, losses)
    expected, _ = whole(pair[0], batch, whole.count(batch))
    counts = {"alignment": sum(parts.count(half)["alignment"] for half in halves)}
    found = sum(parts(pair[0], half, counts)[0] for half in halves)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# raised by peft about transformers' own attribute
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=4)])
def test_frozen_attention_trains_everything_else(lora: Lora | None) -> None:
    stage = Stage("s", ("language_model", "projector"), lora=lora, freeze_attention=True)
    model = choose_trained(tiny.llava(layers=2, seed=1), stage)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not [name for name in names if ".self_attn." in name and "language_model" in name]
    assert [name for name in names if ".mlp." in name and "language_model" in name]
    assert [name for name in names if "projector" in name]
    free = choose_trained(tiny.llava(layers=2, seed=1), replace(stage, freeze_attention=False))
    assert [n for n, p in free.named_parameters() if p.requires_grad and ".self_attn." in n]
