"""How many image tokens a model makes of a sample's images, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...models.layouts import layouts_of
from ...models.tokens import Tokens, has_images
from ...models.view import ModelView
from ..memory.models import FakeModels

#: Inputs whose values say how images are cut; from these the number is a formula (``layouts_of``).
GRIDS = ("image_grid_thw", "video_grid_thw", "image_sizes", "image_position_ids")


class ImageTokens:
    """Of teacher and student.

    Attributes:
        views: role -> model without storage; of the teacher only if it gets the batches.
    """

    def __init__(self, models: FakeModels, teacher: bool) -> None:
        self.models = models
        self.views = {"student": ModelView("student", models.plain_student())}
        if teacher:
            self.views["teacher"] = ModelView("teacher", models.teacher)
        self._known: dict[tuple[str, tuple[int, ...]], int | None] = {}

    def __call__(self, role: str, tokens: Tokens, inputs: Mapping[str, Any]) -> int | None:
        """The number; None where neither grids nor the vision tower tell.

        Raises:
            ValueError: the images' grids do not explain the sample's tokens.
        """
        if not has_images(inputs):
            return 0
        view = self.views[role]
        if any(inputs.get(name) is not None for name in GRIDS):
            (images,) = layouts_of(view, tokens, inputs)
            return sum(len(image.patches) for image in images)
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return None
        key = (role, tuple(pixels.shape))
        if key not in self._known:
            self._known[key] = self._run(view, tuple(pixels.shape))
        return self._known[key]

    def _run(self, view: ModelView, shape: tuple[int, ...]) -> int | None:
        """The features that the model's own function gives, on fake tensors.

        Raises:
            ValueError: it refuses images of that shape.
        """
        if not hasattr(view.model, "get_image_features"):
            return None
        dtype = next(view.model.parameters()).dtype
        with self.models.running(), torch.no_grad():
            try:
                out = view.model.get_image_features(pixel_values=torch.empty(shape, dtype=dtype))
            except (ValueError, RuntimeError) as error:
                raise ValueError(
                    f"the {view.role} refuses images of the shape {list(shape)}: {error}"
                ) from None
        features = getattr(out, "pooler_output", out)
        if isinstance(features, torch.Tensor):
            features = list(features)
        return sum(int(each.shape[-2]) for each in features)
