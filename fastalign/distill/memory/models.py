"""Student and teacher of a recipe without storage: shapes and types only, from their config.json."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..loading import choose_trained, place_of
from ..plain import RecipeError
from ..recipe import Recipe
from ..stages import Stage


class FakeModels:
    """The two models of a recipe as fake tensors; a folder that holds only a config.json is enough.

    Args:
        recipe: whose ``models`` are read.

    Attributes:
        teacher: the transformers model; None where the recipe never loads it and it is not there.
        mode: enter ``self.running()`` to compute with them.

    Raises:
        RecipeError: a model that has no readable configuration.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.mode = FakeTensorMode()
        models = recipe.models
        self._configs = {"student": read_config(recipe, models.student, "models.student")}
        try:
            self._configs["teacher"] = read_config(recipe, models.teacher, "models.teacher")
        except RecipeError:
            if loads_teacher(recipe):
                raise
        if models.taf is not None and self._configs["student"].model_type != "llava_taf":
            self._configs["student"] = _with_taf(self._configs, models.taf)
        self.teacher: Any = None
        if "teacher" in self._configs:
            teacher = self._meta("teacher", models.teacher_dtype).eval().requires_grad_(False)
            self.teacher = self._fake(teacher)

    def student(self, stage: Stage) -> Any:
        """The student as a stage trains it: adapter fetch, frozen parts and LoRA included."""
        student = self._meta("student", self.recipe.models.student_dtype)
        with torch.device("meta"):
            student = choose_trained(student, stage)
        return self._fake(student)

    def plain_student(self) -> Any:
        """The student before any stage."""
        return self._fake(self._meta("student", self.recipe.models.student_dtype).eval())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Tensors made inside have no storage."""
        with self.mode:
            yield

    def _meta(self, role: str, dtype: str) -> Any:
        from transformers import AutoModelForImageTextToText

        # A copy: a model makes changes in its configuration.
        config = copy.deepcopy(self._configs[role])
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))

    def _fake(self, model: nn.Module) -> Any:
        """Fake tensors in the place of meta ones: these have a device, which autocast asks for."""
        made: dict[int, Tensor] = {}  # tied weights stay tied
        with self.running():
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is None:
                            continue
                        if id(tensor) not in made:
                            fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                            if isinstance(tensor, nn.Parameter):
                                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                            made[id(tensor)] = fake
                        tensors[name] = made[id(tensor)]  # type: ignore[assignment]
        return model


def runs_teacher(recipe: Recipe, stage: Stage) -> bool:
    """Whether the teacher itself runs in a stage (and not what was recorded of it)."""
    return stage.losses.needs_teacher and recipe.models.cache is None


def loads_teacher(recipe: Recipe) -> bool:
    """Whether the teacher's weights are read at all."""
    return bool(recipe.models.taf) or any(runs_teacher(recipe, stage) for stage in recipe.stages)


def _with_taf(configs: dict[str, Any], adapter: str) -> Any:
    from ..taf import taf_config

    for role, config in configs.items():
        if config.model_type != "llava":
            raise RecipeError(
                f"models.taf is {adapter!r} and the {role} is a {config.model_type}; allowed: null, or "
                "two LLaVA models"
            )
    return taf_config(configs["student"], configs["teacher"], adapter)


def read_config(recipe: Recipe, name: str, where: str) -> Any:
    """The configuration of a checkpoint.

    Raises:
        RecipeError: it cannot be read; ``where`` is the recipe's entry.
    """
    from transformers import AutoConfig

    from .. import taf  # noqa: F401  (makes AutoConfig know its checkpoints)

    try:
        return AutoConfig.from_pretrained(
            place_of(recipe, name), trust_remote_code=recipe.models.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{where} is {name!r}, whose configuration cannot be read: {error}"
        ) from None
