"""``Measurement``: what is summed over batches, and the plain numbers that come out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.layer import LayerState, concatenable, concatenate
from ..models.matching import Matching, Rule, match_layers
from ..models.reductions import received, sink_scores
from ..models.tokens import Inputs, RowChoice
from .batches import (
    ROWS,
    Seen,
    column_groups,
    look,
    row_groups,
    same_tokens,
    sample_means,
)
from .similarity import METRICS, column_entropy, column_mass, head_values, row_values

#: A visual token is a sink of a layer where what it receives lies this many standard deviations above
#: the mean of the sample's visual tokens.
SINK_SIGMA = 2.0


class Measurement:
    """Similarity of several students' visual attention to one teacher's, over batches.

    Args:
        teacher, students: models of known families; their tokens must be the same.
        layers: which student layer is compared with which teacher layers, see ``match_layers``.
        grid: also the cosine of every student layer with every teacher layer (answer rows, visual
            columns).
    """

    def __init__(
        self,
        teacher: nn.Module,
        students: Mapping[str, nn.Module],
        layers: Rule = "uniform",
        *,
        grid: bool = True,
    ) -> None:
        self.models: dict[str, nn.Module] = {"teacher": teacher, **students}
        if len(self.models) != len(students) + 1:
            raise ValueError("a student is called 'teacher'; allowed: other names")
        self.students = list(students)
        self.layers, self.grid = layers, grid
        self.matching: dict[str, Matching] = {}
        #: key -> per-sample values, one entry a batch: [B]
        self._values: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        self.samples = 0

    def add(self, batch: Inputs) -> dict[str, Seen]:
        """Measure a batch; returns what each model did with it."""
        seen = {name: look(model, batch) for name, model in self.models.items()}
        teacher = seen["teacher"]
        groups = row_groups(teacher.tokens, batch["labels"])
        self.samples += len(batch["labels"])
        for name, found in seen.items():
            self._values["right", name].append(found.right.double())
            self._looks(name, found, groups)
        for name in self.students:
            same_tokens(teacher.tokens, seen[name].tokens, {"first": "teacher", "second": name})
            self._compare(name, seen[name], teacher, groups)
        return seen

    def _looks(self, name: str, seen: Seen, groups: Mapping[str, Tensor]) -> None:
        """Mass on the image, entropy over it, and the share that sinks take."""
        visual = seen.tokens.visual
        choice = RowChoice(seen.positions, True, None)
        for layer, state in seen.states.items():
            mass = column_mass(state, seen.positions, visual)
            entropy = column_entropy(state, seen.positions, visual)
            scores = sink_scores(received(state, choice, visual), visual.sum(-1))
            sinks = _spread(scores > SINK_SIGMA, visual)
            sunk = column_mass(state, seen.positions, sinks)
            share = torch.where(mass > 0, sunk / mass.clamp(min=1e-30), torch.nan)
            for rows, mask in groups.items():
                for what, values in (("mass", mass), ("entropy", entropy), ("sink_share", share)):
                    self._note(("looks", name, layer, rows, what), values, mask)

    def _compare(
        self, name: str, student: Seen, teacher: Seen, groups: Mapping[str, Tensor]
    ) -> None:
        if name not in self.matching:
            self.matching[name] = match_layers(
                self.layers, list(student.states), list(teacher.states)
            )
        positions = student.positions
        for layer, group in self.matching[name].items():
            theirs = _window([teacher.states[t] for t in group], layer)
            for columns, mask in column_groups(student.tokens).items():
                for metric in METRICS:
                    values = row_values(student.states[layer], theirs, positions, mask, metric)
                    for rows, chosen in groups.items():
                        self._note(("pairs", name, layer, rows, columns, metric), values, chosen)
            visual = student.tokens.visual
            by_head = head_values(student.states[layer], theirs, positions, visual, "cosine")
            for rows in ROWS:
                for head in range(by_head.shape[1]):
                    self._note(("heads", name, layer, rows, head), by_head[:, head], groups[rows])
        if self.grid:
            for i, ours in student.states.items():
                for j, other in teacher.states.items():
                    values = row_values(ours, other, positions, student.tokens.visual, "cosine")
                    self._note(("grid", name, i, j), values, groups["answer"])

    def _note(self, key: tuple[Any, ...], values: Tensor, rows: Tensor) -> None:
        self._values[key].append(sample_means(values, rows).cpu())

    # --------------------------------------------------------------------------- results

    def per_sample(self, *key: Any) -> Tensor:
        """[N] float64, in the order in which samples were added; nan where a sample has no such row."""
        return torch.cat(self._values[key])

    def similarity(self, student: str) -> Tensor:
        """[N]: mean cosine of the matched layers, answer rows, visual columns."""
        layers = self.matching[student]
        return torch.stack(
            [self.per_sample("pairs", student, i, "answer", "visual", "cosine") for i in layers]
        ).mean(0)

    def summary(self, bins: int = 5) -> dict[str, Any]:
        """Means over samples as plain, json-safe values (None for a mean over nothing)."""
        found: dict[str, Any] = {"samples": self.samples, "sink_sigma": SINK_SIGMA}
        found["matching"] = {
            name: {str(i): list(group) for i, group in matching.items()}
            for name, matching in self.matching.items()
        }
        tree: dict[str, Any] = {}
        for key, values in self._values.items():
            place = tree
            for part in key[:-1]:
                place = place.setdefault(str(part), {})
            place[str(key[-1])] = _mean(torch.cat(values))
        found["accuracy"] = tree.pop("right", {})
        found.update(tree)
        found["bins"] = {
            name: accuracy_bins(self.similarity(name), self.per_sample("right", name), bins)
            for name in self.students
        }
        return found


def accuracy_bins(similarity: Tensor, right: Tensor, bins: int) -> list[dict[str, Any]]:
    """Accuracy in bins of equally many samples, least alike first.

    Args:
        similarity: [N], nan where a sample has none (left out). right: [N] 0 or 1.
    """
    known = ~similarity.isnan()
    similarity, right = similarity[known], right[known]
    order = similarity.argsort(stable=True)
    found = []
    for part in order.tensor_split(bins):
        if len(part):
            values = similarity[part]
            found.append(
                {
                    "low": float(values.min()),
                    "high": float(values.max()),
                    "samples": len(part),
                    "accuracy": float(right[part].mean()),
                }
            )
    return found


def _window(states: Sequence[LayerState], layer: int) -> LayerState:
    if not concatenable(states):
        raise ValueError(
            f"student layer {layer} is compared with teacher layers of different shapes or scales; "
            "allowed: windows of alike layers, or one layer"
        )
    return concatenate(states)


def _spread(chosen: Tensor, columns: Tensor) -> Tensor:
    """[B, L] bool: chosen [B, C], ordinals of a sample's columns, at their positions."""
    index = (columns.cumsum(-1) - 1).clamp(min=0)
    if not chosen.shape[1]:
        return torch.zeros_like(columns)
    return chosen.gather(1, index.clamp(max=chosen.shape[1] - 1)) & columns


def _mean(values: Tensor) -> float | None:
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean
