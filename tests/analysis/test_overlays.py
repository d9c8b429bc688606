"""Attention over an image against eager attention, materialised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from fastalign.analysis.overlays import example
from fastalign.analysis.pictures import attention_figure
from tests.models import tiny

from .test_measure import eager_maps

BLANK = Image.new("RGB", (24, 24))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Head counts and depths differ. The student stands first: the teacher is shown first all the same."""
    return {
        "student": tiny.llava(layers=2, heads=2, kv_heads=1, head_dim=16, seed=2).eval(),
        "teacher": tiny.llava(layers=3, seed=1).eval(),
    }


def test_heat_and_cosine_are_those_of_the_materialised_maps(models: dict[str, Any]) -> None:
    batch = tiny.batch(images=(1,), lengths=(21,))
    found = example(models, batch, BLANK, "where?", {1: (0, 2)})
    assert [look.title for look in found.looks] == ["teacher", "student"]
    maps = {name: eager_maps(model, batch) for name, model in models.items()}
    visual = batch["input_ids"][0] == tiny.IMAGE
    rows = (batch["labels"][0] != -100).nonzero().flatten() - 1
    theirs = torch.stack([maps["teacher"][i][0].mean(0) for i in (0, 2)]).mean(0)
    ours = maps["student"][1][0].mean(0)
    cut = [m[rows][:, visual] for m in (theirs, ours)]
    for look, expected in zip(found.looks, cut, strict=True):
        heat = torch.from_numpy(look.weights)
        torch.testing.assert_close(heat.double(), expected.mean(0).view(3, 3), atol=1e-6, rtol=1e-4)
    cosine = torch.cosine_similarity(*cut, dim=-1).mean()
    assert found.looks[0].cosine is None
    assert found.looks[1].cosine == pytest.approx(float(cosine), abs=1e-5)
    titles = [axis.get_title() for axis in attention_figure([found]).axes]
    peaks = [f"peak {float(m.mean(0).max() / m.mean(0).sum()):.0%}" for m in cut]
    assert titles == [
        "where?",
        f"teacher\n{peaks[0]}",
        f"student\ncosine {cosine:.3f}, {peaks[1]}",
    ]


def test_without_a_teacher_there_is_no_cosine(models: dict[str, Any]) -> None:
    batch = tiny.batch(images=(1,), lengths=(21,))
    alone = {"student": models["student"]}
    found = example(alone, batch, BLANK, "where?", {1: (2,)})  # the teacher's layer does not count
    both = example(models, batch, BLANK, "where?", {1: (2,)})
    assert found.looks[0].cosine is None
    assert (found.looks[0].weights == both.looks[1].weights).all()


def test_what_is_no_single_image_is_refused(models: dict[str, Any]) -> None:
    for images, message in (((2,), "has 2 images"), ((0,), "has 0 images"), ((1, 1), "2 samples")):
        batch = tiny.batch(images=images, lengths=(29,) * len(images))
        with pytest.raises(ValueError, match=message):
            example(models, batch, BLANK, "where?", "last:1")
