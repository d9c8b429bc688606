"""Attention over images: what a report's examples show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models.layouts import layouts_of
from ..models.pictures import visual_attention
from ..models.tokens import Inputs, read_tokens
from ..models.view import ModelView
from .batches import NOT_INPUTS, row_groups
from .pictures import Example, Look

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


def example(
    models: Mapping[str, nn.Module], batch: Inputs, image: PILImage, question: str
) -> Example:
    """One sample's image under each model's attention from its answer rows, layers averaged.

    Args:
        batch: of one sample with one image.

    Raises:
        ValueError: several samples or images, or image tokens that are no grid.
    """
    looks = []
    labels: Tensor = batch["labels"]
    if len(labels) != 1:
        raise ValueError(f"the batch has {len(labels)} samples; allowed: 1")
    inputs: dict[str, Any] = {k: v for k, v in batch.items() if k not in NOT_INPUTS}
    for name, model in models.items():
        view = ModelView("teacher" if name == "teacher" else "student", model)
        tokens = read_tokens(view, inputs)
        images = layouts_of(view, tokens, inputs)[0]
        if len(images) != 1 or images[0].views[0][0] != 1:
            raise ValueError(f"the sample has {len(images)} images or a video; allowed: one image")
        rows = row_groups(tokens, labels)["answer"]
        maps = visual_attention(model, {**inputs, "use_cache": False}, rows=rows)
        weights = torch.stack(list(maps.values())).mean(0)[0].mean(0)
        _, height, width = images[0].views[0]  # the first view covers the whole image
        patches = weights[torch.tensor(images[0].patches)][: height * width]
        looks.append(Look(name, patches.view(height, width).float().cpu().numpy()))
    return Example(image, question, looks)
