"""Attention over images: where the answers of a sample look, model by model.

Maps are pooled over the answer rows by the streaming backend (``received``), and compared row by row from
its statistics (``row_values``): rows x columns is never held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models.layer import LayerState, concatenable, concatenate
from ..models.layouts import layouts_of
from ..models.matching import Matching, Rule, match_layers
from ..models.observe import observe
from ..models.reductions import received
from ..models.tokens import Inputs, RowChoice, Tokens, read_tokens
from ..models.view import ModelView
from ..models.visibility import same_visibility
from .batches import NOT_INPUTS, move, row_groups, same_tokens
from .pictures import Example, Look
from .similarity import row_values

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


def example(
    models: Mapping[str, nn.Module],
    batch: Inputs,
    image: PILImage,
    question: str,
    layers: Rule = "uniform",
) -> Example:
    """One sample's image under each model's attention from its answer rows, mean of heads and layers.

    Args:
        models: by their titles; one may be called ``"teacher"``. Each runs where its parameters are.
        batch: of one sample with one image, with labels.
        layers: which student layers are compared with which of the teacher's (``match_layers``); these,
            of each model, are what is shown.

    Returns:
        With a teacher, every other look has the mean cosine of its matched layers with the teacher's,
        answer rows, visual columns; None where these layers see different tokens.

    Raises:
        ValueError: several samples or images, image tokens that are no grid, other tokens than the
            teacher's, a rule that does not fit the models.
    """
    labels: Tensor = batch["labels"]
    if len(labels) != 1:
        raise ValueError(f"the batch has {len(labels)} samples; allowed: 1")
    views = {
        name: ModelView("teacher" if name == "teacher" else "student", model)
        for name, model in models.items()
    }
    matchings = {
        name: _matching(layers, view, views.get("teacher"))
        for name, view in views.items()
        if name != "teacher"
    }
    used = {name: tuple(matching) for name, matching in matchings.items()}
    if "teacher" in views:
        groups = [group for matching in matchings.values() for group in matching.values()]
        used["teacher"] = tuple(sorted({layer for group in groups for layer in group}))
    looks = []
    teacher: _Seen | None = None
    for name in sorted(views, key=lambda name: name != "teacher"):
        seen = _look(models[name], views[name], batch, used[name])
        cosine = None
        if name == "teacher":
            teacher = seen
        elif teacher is not None:
            same_tokens(teacher.tokens, seen.tokens, {"first": "teacher", "second": name})
            cosine = _cosine(seen, teacher, matchings[name])
        looks.append(Look(name, seen.heat.numpy(), cosine))
    return Example(image, question, looks)


def _matching(layers: Rule, student: ModelView, teacher: ModelView | None) -> Matching:
    if teacher is None and isinstance(layers, Mapping):
        layers = {layer: layer for layer in layers}
    theirs = student if teacher is None else teacher
    return match_layers(layers, list(student.attentions), list(theirs.attentions))


@dataclass(frozen=True)
class _Seen:
    """States of the used layers with the answer rows of q; heat [height, width] on the CPU."""

    states: dict[int, LayerState]
    choice: RowChoice
    tokens: Tokens
    heat: Tensor


def _look(model: nn.Module, view: ModelView, batch: Inputs, layers: tuple[int, ...]) -> _Seen:
    here = move(batch, next(model.parameters()).device)
    inputs: dict[str, Any] = {k: v for k, v in here.items() if k not in NOT_INPUTS}
    tokens = read_tokens(view, inputs)
    images = layouts_of(view, tokens, inputs)[0]
    if len(images) != 1 or images[0].views[0][0] != 1:
        raise ValueError(f"the sample has {len(images)} images or a video; allowed: one image")
    states: dict[int, LayerState] = {}
    choices: list[RowChoice] = []

    def see(layer: int, state: LayerState, choice: RowChoice, tokens: Tokens) -> None:
        states[layer] = state
        choices.append(choice)

    rows = row_groups(tokens, here["labels"])["answer"]
    observe(model, {**inputs, "use_cache": False}, layers, rows, see)
    maps = [received(state, choices[0], tokens.visual)[0] for state in states.values()]
    weights = torch.stack(maps).mean(0).float().cpu()
    _, height, width = images[0].views[0]  # the first view covers the whole image
    patches = weights[torch.tensor(images[0].patches)][: height * width]
    known = Tokens(tokens.valid.cpu(), tokens.visual.cpu(), None)
    return _Seen(states, choices[0], known, patches.view(height, width))


def _cosine(student: _Seen, teacher: _Seen, matching: Matching) -> float | None:
    found = []
    for layer, group in matching.items():
        ours = student.states[layer]
        theirs = [teacher.states[t].to(ours.q.device) for t in group]
        alike = partial(same_visibility, ours.visibility)
        if not (concatenable(theirs) and all(alike(state.visibility) for state in theirs)):
            return None
        visual = student.tokens.visual.to(ours.q.device)
        values = row_values(ours, concatenate(theirs), student.choice.positions, visual, "cosine")
        found.append(values.nanmean())
    return float(torch.stack(found).mean())
