"""Teachers with other patch grids: layouts of images, weights by area, loss and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.models import AttentionAlignment
from fastalign.models.grids import area_weights
from fastalign.models.layouts import Layout, layouts_of
from fastalign.models.tokens import read_tokens
from fastalign.models.view import ModelView
from tests.models import eager, zoo

BY_NAME = {case.name: case for case in zoo.CASES}
LLAVA, NEXT = BY_NAME["LLaVA-1.5, llama text"], BY_NAME["LLaVA-NeXT"]


def layouts(case: zoo.Case, *, left: bool = False, **changes: Any) -> list[list[Layout]]:
    model = case.model()
    inputs = {**case.batch(model, left=left), **changes}
    view = ModelView("teacher", model)
    return layouts_of(view, read_tokens(view, inputs), inputs)


# -------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("name", "views"),
    [
        ("LLaVA-1.5, llama text", [(1, 3, 3)] * 3),
        ("LLaVA with Pixtral tower", [(1, 3, 3)] * 3),
        ("Mistral3", [(1, 2, 2)] * 3),
        ("Qwen2-VL", [(1, 2, 2), (1, 2, 3), (1, 2, 2)]),
        ("Qwen2-VL, video", [(2, 2, 2)] * 3),
        ("Idefics3", [(1, 2, 2)] * 3),
        ("PaliGemma", [(1, 3, 3)] * 3),
        ("Gemma 3", [(1, 2, 2)] * 3),
        ("Gemma 4", [(1, 2, 2)] * 3),
        ("Llama 4", [(1, 2, 2)] * 3),
    ],
)
def test_images_of_one_view(name: str, views: list[Any]) -> None:
    first, second = layouts(BY_NAME[name])
    assert [image.views for image in (*first, *second)] == [(view,) for view in views]
    assert (len(first), len(second)) == (1, 2)
    assert all(all(image.patches) for image in (*first, *second))


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "LLaVA-OneVision"])
@pytest.mark.parametrize("size", [(12, 24), (24, 12), (10, 24), (24, 7), (30, 30), (5, 31)])
def test_tiles_and_newlines_lie_where_the_model_puts_them(name: str, size: Any) -> None:
    """The tokens that stand for no patch are the model's newline, and no others are."""
    case = BY_NAME[name]
    model = case.model()
    sizes = torch.tensor([size])
    with torch.no_grad():
        features = model.get_image_features(
            pixel_values=torch.randn(1, 3, 3, 12, 12), image_sizes=sizes
        ).pooler_output[0]
    ids = torch.full((1, len(features)), zoo.IMAGE)
    view = ModelView("teacher", model)
    inputs = {"input_ids": ids, "image_sizes": sizes}
    [[image]] = layouts_of(view, read_tokens(view, inputs), inputs)
    newline = (features == model.model.image_newline).all(-1)
    assert torch.tensor(image.patches).tolist() == (~newline).tolist()
    assert len(image.views) == 2
    assert sum(map(math.prod, image.views)) == sum(image.patches)


def test_large_images_that_onevision_shrinks() -> None:
    """Beyond nine tiles' worth of patches the features are interpolated to fewer."""
    model = zoo.onevision_of_many_tiles(seed=0).eval()
    size = (48, 60)
    with torch.no_grad():
        features = model.get_image_features(
            pixel_values=torch.randn(1, 21, 3, 12, 12), image_sizes=torch.tensor([size])
        ).pooler_output[0]
    view = ModelView("teacher", model)
    inputs = {
        "input_ids": torch.full((1, len(features)), zoo.IMAGE),
        "image_sizes": torch.tensor([size]),
    }
    [[image]] = layouts_of(view, read_tokens(view, inputs), inputs)
    newline = (features == model.model.image_newline).all(-1)
    assert image.patches == tuple((~newline).tolist())
    assert math.prod(image.views[1]) < 12 * 15  # the grid of all tiles

    several = {**inputs, "batch_num_images": torch.tensor([2])}
    several["image_sizes"] = torch.tensor([size, size])
    several["input_ids"] = torch.full((1, 20), zoo.IMAGE)  # images of one view and one newline each
    [[first, second]] = layouts_of(view, read_tokens(view, several), several)
    assert first == second == Layout(((1, 3, 3),), (True,) * 9 + (False,))


def test_images_side_by_side_and_tiles_are_told_apart_by_the_pixels() -> None:
    """Four images of 9 tokens in a run of 36 are no image of 6 x 6."""
    case = LLAVA
    model = case.model()
    view = ModelView("teacher", model)
    ids = torch.full((1, 40), 11)
    ids[0, 2:38] = zoo.IMAGE
    inputs = {"input_ids": ids, "pixel_values": torch.randn(4, 3, 12, 12)}
    [images] = layouts_of(view, read_tokens(view, inputs), inputs)
    assert [image.views for image in images] == [((1, 3, 3),)] * 4
    inputs["pixel_values"] = torch.randn(5, 3, 12, 12)
    with pytest.raises(ValueError, match="36 visual tokens for 5 images or tiles"):
        layouts_of(view, read_tokens(view, inputs), inputs)


# -------------------------------------------------------------------------------- weights


def test_area_weights_keep_mass_and_know_simple_cases() -> None:
    same = area_weights((1, 3, 2), (1, 3, 2))
    torch.testing.assert_close(same, torch.eye(6))
    halves = area_weights((1, 1, 2), (1, 1, 1))
    assert halves.tolist() == [[1, 1]]
    spread = area_weights((1, 1, 1), (1, 2, 2))
    assert spread.flatten().tolist() == [0.25] * 4
    thirds = area_weights((1, 1, 2), (1, 1, 3))
    torch.testing.assert_close(thirds, torch.tensor([[2 / 3, 0], [1 / 3, 1 / 3], [0, 2 / 3]]))
    video = area_weights((2, 2, 3), (2, 5, 4))
    assert video.shape == (40, 12)
    torch.testing.assert_close(video.sum(0), torch.ones(12))
    assert not video[:20, 6:].any()
    time = area_weights((2, 1, 1), (3, 1, 1))
    torch.testing.assert_close(time, thirds)


# ----------------------------------------------------------------------- loss and gradients


def overlap(s: Sequence[int], t: Sequence[int]) -> Tensor:
    """[patches of s, patches of t] the area in common, counted in cells of a raster of both."""
    sizes = [math.lcm(a, b) for a, b in zip(s, t, strict=True)]
    cells = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
    owners = []
    for grid in (s, t):
        at = [c * n // size for c, n, size in zip(cells, grid, sizes, strict=True)]
        owners.append(((at[0] * grid[1] + at[1]) * grid[2] + at[2]).flatten())
    count = torch.zeros(math.prod(s), math.prod(t))
    count.index_put_(tuple(owners), torch.ones(len(owners[0])), accumulate=True)
    return count


def expected_target(
    weights: Tensor, student: list[Any], teacher: list[Any], rows: list[int], places: Any
) -> Tensor:
    """[rows, student patches] of one sample, by the raster.

    weights: the teacher's [L, L] map. student, teacher: views of each image. rows: positions of the
    student. places: text and patch positions of (student, teacher).
    """
    (text_s, patch_s), (text_t, patch_t) = places
    blocks = []
    for views_s, views_t in zip(student, teacher, strict=True):
        if len(views_s) == len(views_t):
            parts = [overlap(a, b) for a, b in zip(views_s, views_t, strict=True)]
            parts = [x / x.sum() for x in parts]
            blocks.append(torch.block_diag(*parts))
        else:
            parts = [overlap(views_s[0], b) for b in views_t]
            blocks.append(torch.cat([x / x.sum() for x in parts], dim=1))
    area = torch.block_diag(*blocks)
    share, average = area / area.sum(0), area / area.sum(1, keepdim=True)
    out = []
    for at in rows:
        if at in text_s:
            row = weights[text_t[text_s.index(at)]][patch_t]
        else:
            row = average[patch_s.index(at)] @ weights[patch_t][:, patch_t]
        out.append(share @ row)
    return torch.stack(out)


def views_and_places(case: zoo.Case, model: Any, inputs: Any) -> tuple[Any, Any]:
    view = ModelView("teacher", model)
    found = layouts_of(view, read_tokens(view, inputs), inputs)
    places = []
    visual, valid = eager.visual_mask(model, inputs), inputs["attention_mask"].bool()
    for b, images in enumerate(found):
        flags = torch.tensor([flag for image in images for flag in image.patches])
        patches = visual[b].nonzero().flatten()[flags].tolist()
        places.append(((valid[b] & ~visual[b]).nonzero().flatten().tolist(), patches))
    return [[image.views for image in images] for images in found], places


@pytest.mark.parametrize("rows", ["text", "all"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (LLAVA, BY_NAME["InternVL"]),
        (LLAVA, BY_NAME["Qwen2-VL"]),  # one image is 2 x 3
        (LLAVA, NEXT),  # two views and newlines onto one view
        (NEXT, zoo.LARGER_NEXT),  # view by view, newlines on both sides
        (BY_NAME["Qwen2-VL, video"], zoo.LONGER_VIDEO),  # 2 frames of 2 x 2 <- 3 of 2 x 3
    ],
    ids=lambda case: case.name,
)
def test_a_teacher_with_another_grid(student: zoo.Case, teacher: zoo.Case, rows: str) -> None:
    """Padded on other sides; against rasters of both grids and eager attention."""
    model_s, model_t = student.model(seed=2).train(), teacher.model(seed=1)
    inputs, other = student.batch(model_s, left=False), teacher.batch(model_t, left=True)
    reference, teacher_ref = eager.eager_copy(model_s), eager.eager_copy(model_t)
    alignment = AttentionAlignment(
        model_s, model_t, layers={1: [1, 2], 3: 3}, rows=rows, resample="area"
    )
    with alignment.step(inputs, teacher_inputs=other):
        with torch.no_grad():
            model_t(**other)
        out = model_s(**inputs)
    loss = alignment.loss() + 0.01 * out.loss
    loss.backward()

    out, weights_s = eager.attentions(reference, inputs)
    with torch.no_grad():
        _, weights_t = eager.attentions(teacher_ref, other)
    views_s, places_s = views_and_places(student, model_s, inputs)
    views_t, places_t = views_and_places(teacher, model_t, other)
    losses = []
    for layer, group in alignment.matching.items():
        terms = []
        for b in range(2):
            text, patches = places_s[b]
            at = sorted(text + patches) if rows == "all" else text
            mean = torch.stack([weights_t[j].mean(1)[b] for j in group]).mean(0)
            t = expected_target(mean, views_s[b], views_t[b], at, (places_s[b], places_t[b]))
            s = weights_s[layer].mean(1)[b][at][:, patches]
            t = (t * (s > 0)).flatten()
            terms.append(1 - s.flatten() @ t / (s.norm() * t.norm()))
        losses.append(torch.stack(terms).mean())
    expected = torch.stack(losses).mean() + 0.01 * out.loss
    expected.backward()
    assert expected > 0.02
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert eager.relative_error(eager.gradients(model_s), eager.gradients(reference)) < 1e-4


def test_sampled_rows_of_another_grid() -> None:
    """Every row drawn: the same as all rows from the first image on, each with weight one."""
    model_s, model_t = LLAVA.model(seed=2), BY_NAME["InternVL"].model(seed=1)
    inputs = LLAVA.batch(model_s, left=False)
    other = BY_NAME["InternVL"].batch(model_t, left=True)
    found = []
    for rows in ("all", "all:1000", "all:5"):
        alignment = AttentionAlignment(
            model_s, model_t, "tunix", layers={1: 1}, rows=rows, resample="area"
        )
        with alignment.step(inputs, teacher_inputs=other), torch.no_grad():
            model_t(**other)
            model_s(**inputs)
        found.append(alignment.loss().item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[2] != pytest.approx(found[0], rel=1e-5)


# -------------------------------------------------------------------------------- refusals


def run(student: Any, teacher: Any, inputs: Any, other: Any, **arguments: Any) -> None:
    alignment = AttentionAlignment(student, teacher, **arguments)
    with alignment.step(inputs, teacher_inputs=other), torch.no_grad():
        teacher(**other)
        student(**inputs)


def test_what_resampling_refuses() -> None:
    case_t = BY_NAME["InternVL"]
    student, teacher = LLAVA.model(seed=2), case_t.model(seed=1)
    inputs, other = LLAVA.batch(student, left=False), case_t.batch(teacher, left=False)
    with pytest.raises(ValueError, match=r"student \[9, 18\], teacher \[4, 8\]"):
        run(student, teacher, inputs, other)
    longer = case_t.batch(teacher, left=False, counts=(2, 1))
    with pytest.raises(ValueError, match="sample 0 has 2 images in the teacher's batch and 1"):
        run(student, teacher, inputs, longer, resample="area")
    more = {k: v.clone() for k, v in other.items()}
    more["attention_mask"][0, -1] = 1  # one of the padding tokens is text
    with pytest.raises(ValueError, match="text tokens per sample: student"):
        run(student, teacher, inputs, more, resample="area")
    wide = {**other, "pixel_values": torch.randn(2, 3, 16, 16)}
    with pytest.raises(ValueError, match="an image has 6 tokens, which is no square grid"):
        run(student, teacher, inputs, wide, resample="area")
    tiled = NEXT.model(seed=1)
    with pytest.raises(
        ValueError, match="an image has 2 views in the student and 1 in the teacher"
    ):
        run(tiled, student, NEXT.batch(tiled, left=False), inputs, resample="area")
