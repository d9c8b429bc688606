"""Every number of an analysis against eager attention, materialised, written a second time."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.analysis.batches import answered, look, row_groups
from fastalign.analysis.measure import SINK_SIGMA, Measurement, accuracy_bins
from fastalign.analysis.similarity import row_values
from tests.models import tiny


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Head counts, key heads and head sizes differ."""
    return {
        "teacher": tiny.llava(layers=3, seed=1).eval(),
        "small": tiny.llava(layers=2, heads=2, kv_heads=1, head_dim=16, seed=2).eval(),
        "other": tiny.llava(layers=3, heads=6, kv_heads=3, seed=3).eval(),
    }


def eager_maps(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """[B, H, L, L] of each layer, from transformers' own eager attention."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        found = eager(**inputs, output_attentions=True, use_cache=False)
    return [a.double() for a in found.attentions]


def naive(values: Tensor, rows: Tensor) -> float:
    """Mean over samples of the mean over a sample's rows; samples without such rows left out."""
    means = []
    for b in range(len(values)):
        chosen = [
            float(values[b, i]) for i in rows[b].nonzero().flatten() if values[b, i] == values[b, i]
        ]
        if chosen:
            means.append(sum(chosen) / len(chosen))
    return sum(means) / len(means)


def metric_of(name: str, s: Tensor, t: Tensor, columns: Tensor) -> Tensor:
    """[B, L] from head-mean maps [B, L, L]; nan where a row sees no column."""
    batch, length = columns.shape
    out = torch.full((batch, length), float("nan"), dtype=torch.float64)
    for b in range(batch):
        for i in range(length):
            at = columns[b] & (torch.arange(length) <= i)
            x, y = s[b, i, at], t[b, i, at]
            if not at.any() or not x.sum() > 0:
                continue
            if name == "cosine":
                out[b, i] = x @ y / (x.norm() * y.norm())
                continue
            x, y = x / x.sum(), y / y.sum()
            if name == "kl":
                out[b, i] = (y * (y / x).log()).sum()
            else:
                m = (x + y) / 2
                out[b, i] = ((x * (x / m).log()).sum() + (y * (y / m).log()).sum()) / 2
    return out


@pytest.mark.parametrize("left", [False, True])
def test_every_number_is_the_materialised_one(models: dict[str, Any], left: bool) -> None:
    students = {name: model for name, model in models.items() if name != "teacher"}
    batch = tiny.batch(images=(1, 2, 0), lengths=(17, 29, 12), left=left)
    measurement = Measurement(models["teacher"], students, "last:2")
    measurement.add(batch)
    found = measurement.summary()
    maps = {name: eager_maps(model, batch) for name, model in models.items()}
    valid = batch["attention_mask"].bool()
    visual = batch["input_ids"] == tiny.IMAGE
    shifted = torch.zeros_like(valid)
    shifted[:, :-1] = batch["labels"][:, 1:] != -100
    rows = {"visual": visual, "question": valid & ~visual & ~shifted, "answer": shifted}
    columns = {"visual": visual, "text": valid & ~visual}

    for name in students:
        depth = len(maps[name])
        assert found["matching"][name] == {str(depth - 2): [1], str(depth - 1): [2]}
        for layer, (teacher,) in found["matching"][name].items():
            s, t = maps[name][int(layer)], maps["teacher"][teacher].mean(1)
            for column, mask in columns.items():
                for metric in ("cosine", "kl", "js"):
                    values = metric_of(metric, s.mean(1), t, mask)
                    for row, chosen in rows.items():
                        ours = found["pairs"][name][layer][row][column][metric]
                        assert ours == pytest.approx(naive(values, chosen), abs=1e-5)
            for head in range(s.shape[1]):
                values = metric_of("cosine", s[:, head], t, visual)
                ours = found["heads"][name][layer]["answer"][str(head)]
                assert ours == pytest.approx(naive(values, rows["answer"]), abs=1e-5)
        for i in range(depth):
            for j in range(3):
                values = metric_of(
                    "cosine", maps[name][i].mean(1), maps["teacher"][j].mean(1), visual
                )
                ours = found["grid"][name][str(i)][str(j)]
                assert ours == pytest.approx(naive(values, rows["answer"]), abs=1e-5)

    for name, layers in maps.items():
        for layer, attention in enumerate(layers):
            a = attention.mean(1)
            on_image = a * visual[:, None, :]
            mass = on_image.sum(-1)
            share = on_image / mass.unsqueeze(-1)
            entropy = -(share * share.clamp(min=1e-300).log()).sum(-1)
            sunk = torch.zeros_like(mass)
            for b in range(len(a)):
                at = visual[b].nonzero().flatten()
                if not len(at):
                    continue
                received = []
                for j in at.tolist():
                    seers = [i for i in range(a.shape[1]) if valid[b, i] and i >= j]
                    received.append(float(torch.stack([a[b, i, j] for i in seers]).mean()))
                r = torch.tensor(received)
                sinks = at[(r - r.mean()) / r.std(unbiased=False) > SINK_SIGMA]
                sunk[b] = on_image[b][:, sinks].sum(-1)
            none = mass == 0
            for what, values in (
                ("mass", mass),
                ("entropy", entropy.masked_fill(none, math.nan)),
                ("sink_share", (sunk / mass).masked_fill(none, math.nan)),
            ):
                for row, chosen in rows.items():
                    ours = found["looks"][name][str(layer)][row][what]
                    assert ours == pytest.approx(naive(values, chosen), abs=1e-5), (name, what, row)


def test_head_counts_of_the_measured_layers_do_not_leave_the_kernels(
    models: dict[str, Any],
) -> None:
    """A layer that sees a window is not compared with one that sees everything."""
    batch = tiny.batch()
    seen = look(models["teacher"], batch)
    windowed = tiny.llava(layers=1, seed=4, text="mistral", sliding_window=4).eval()
    other = look(windowed, batch)
    with pytest.raises(ValueError, match="see different tokens"):
        row_values(seen.states[0], other.states[0], seen.positions, seen.tokens.visual, "cosine")
    with pytest.raises(ValueError, match="allowed: cosine, kl, js"):
        row_values(seen.states[0], seen.states[0], seen.positions, seen.tokens.visual, "l2")


def test_a_model_is_alike_to_itself_and_batches_add_up(models: dict[str, Any]) -> None:
    twin = copy.deepcopy(models["teacher"])
    whole = Measurement(models["teacher"], {"twin": twin}, "all", grid=False)
    parts = Measurement(models["teacher"], {"twin": twin}, "all", grid=False)
    batch = tiny.batch(images=(1, 1), lengths=(20, 20))
    whole.add(batch)
    for b in range(2):
        parts.add({k: v[b : b + 1] for k, v in batch.items()})
    assert whole.similarity("twin") == pytest.approx(torch.ones(2), abs=1e-5)
    assert parts.samples == whole.samples == 2
    one, two = whole.summary()["looks"], parts.summary()["looks"]
    for layer in one["teacher"]:
        for row in one["teacher"][layer]:
            assert one["teacher"][layer][row] == pytest.approx(two["teacher"][layer][row], abs=1e-5)


def test_rows_and_answers_by_hand() -> None:
    ids = torch.tensor([[1, 5, 5, 7, 8, 9, 2, 0]])
    labels = torch.tensor([[-100, -100, -100, -100, -100, 9, 2, -100]])
    from fastalign.models.tokens import Tokens

    tokens = Tokens(ids != 0, ids == 5, None)
    groups = {
        name: mask[0].nonzero().flatten().tolist()
        for name, mask in row_groups(tokens, labels).items()
    }
    assert groups == {"visual": [1, 2], "question": [0, 3, 6], "answer": [4, 5]}
    logits = torch.zeros(1, 8, 12)
    logits[0, 4, 9] = logits[0, 5, 2] = 1
    assert answered(logits, labels).tolist() == [True]
    logits[0, 5, 3] = 2
    assert answered(logits, labels).tolist() == [False]


def test_bins_hold_equally_many_samples_in_order() -> None:
    similarity = torch.tensor([0.9, 0.1, float("nan"), 0.5, 0.3, 0.7])
    right = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    bins = accuracy_bins(similarity, right, 2)
    assert [b["samples"] for b in bins] == [3, 2]
    assert [b["accuracy"] for b in bins] == pytest.approx([1 / 3, 0.5])
    assert (bins[0]["low"], bins[1]["high"]) == pytest.approx((0.1, 0.9))


def test_a_batch_without_labels_is_refused(models: dict[str, Any]) -> None:
    batch = tiny.batch()
    del batch["labels"]
    with pytest.raises(ValueError, match="no labels"):
        look(models["teacher"], batch)
