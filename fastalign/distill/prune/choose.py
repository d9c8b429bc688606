"""From scores and wanted sizes to what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .importance import Importance
from .structure import TIED_HEAD_SIZE, PruneError, Structure, linears

Score = Literal["activation", "contribution"]


@dataclass(frozen=True)
class Sizes:
    """What the student shall have; None: as many as the model.

    Attributes:
        layers: decoder layers. hidden: width of the residual stream. heads, kv_heads: attention heads
            of queries and of keys. mlp: channels of each MLP.
    """

    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    mlp: int | None = None

    def resolved(self, structure: Structure) -> dict[str, int]:
        """Every size as a number.

        Raises:
            PruneError: one that is not possible, and what is.
        """
        have = structure.sizes()
        want = {name: getattr(self, name) or most for name, most in have.items()}
        for name, most in have.items():
            given = getattr(self, name)
            if given is not None and not 1 <= given <= most:
                raise PruneError(f"{name} is {given}; allowed: 1 to {most}, what the model has")
        heads, keys = want["heads"], want["kv_heads"]
        most = have["heads"] // have["kv_heads"]
        if heads % keys or heads // keys > most:
            possible = [
                k for k in range(1, have["kv_heads"] + 1) if heads % k == 0 and heads // k <= most
            ]
            allowed = f"kv_heads {', '.join(map(str, possible))}" if possible else "another number"
            raise PruneError(
                f"heads is {heads} with kv_heads {keys}, and each key head serves {most} query heads; "
                f"allowed with {heads} heads: {allowed}"
            )
        size = structure.head_size
        if structure.text.model_type in TIED_HEAD_SIZE and want["hidden"] != heads * size:
            raise PruneError(
                f"hidden is {want['hidden']} with {heads} heads, and {structure.text.model_type} takes its "
                f"head size ({size} here, which rotary embedding fixes) from hidden / heads; allowed: "
                f"hidden {heads * size} with {heads} heads"
            )
        if want == have:
            raise PruneError("the sizes are those of the model; allowed: at least one smaller one")
        return want


@dataclass(frozen=True)
class Kept:
    """Indices in the original model, ascending.

    Attributes:
        layers: decoder layers. hidden: residual dimensions, the same in every layer.
        heads, kv_heads, mlp: for each kept layer, in order. projector: units, or None.
    """

    layers: list[int]
    hidden: list[int]
    heads: list[list[int]]
    kv_heads: list[list[int]]
    mlp: list[list[int]]
    projector: list[int] | None


def choose(model: Any, sizes: Sizes, importance: Importance, score: Score = "activation") -> Kept:
    """What stays: the highest scores; the lower index where two are equal.

    Heads are cut by groups: first the key heads whose query heads have the largest sum of scores, then
    in each of these the same number of query heads. Everything is chosen at once from one measurement.

    Args:
        score: ``"activation"``: as measured. ``"contribution"``: times the norm of the weights that the
            unit feeds (Wanda's |x| |W|, arXiv 2306.11695, for whole heads and channels), so that what
            nobody reads is not important. Layers and hidden size are chosen as measured in both cases.

    Raises:
        PruneError: see ``Structure`` and ``Sizes``.
    """
    if score not in get_args(Score):
        raise PruneError(f"score is {score!r}; allowed: {', '.join(get_args(Score))}")
    structure = Structure(model)
    want = sizes.resolved(structure)
    layers = _best(importance.influence, want["layers"])
    heads, kv_heads, mlp = [], [], []
    for i in layers:
        scores = {"heads": importance.heads[i], "mlp": importance.mlp[i]}
        if score == "contribution":
            for axis, linear in linears(structure.layers[i]):
                scores[axis] = scores[axis] * _reads(linear, len(scores[axis]))
        keys, queries = _groups(scores["heads"], structure.sizes()["kv_heads"], want)
        heads.append(queries)
        kv_heads.append(keys)
        mlp.append(_best(scores["mlp"], want["mlp"]))
    projector = None
    if importance.projector is not None:
        units = importance.projector
        if score == "contribution":
            units = units * _reads(structure.projector_output, len(units))
        projector = _best(units, want["hidden"])  # LLaVA's projector is as wide as the text model
    return Kept(layers, _best(importance.hidden, want["hidden"]), heads, kv_heads, mlp, projector)


def _best(scores: Tensor, count: int) -> list[int]:
    order = scores.argsort(descending=True, stable=True)[:count]
    return order.sort().values.tolist()


def _groups(scores: Tensor, groups: int, want: dict[str, int]) -> tuple[list[int], list[int]]:
    """(key heads, query heads) that stay."""
    by_group = scores.view(groups, -1)
    keys = _best(by_group.sum(-1), want["kv_heads"])
    each = want["heads"] // want["kv_heads"]
    queries = [k * by_group.shape[1] + q for k in keys for q in _best(by_group[k], each)]
    return keys, queries


def _reads(linear: Any, units: int) -> Tensor:
    """[units] Frobenius norm of the columns of ``linear`` that read each unit."""
    weight: Tensor = linear.weight.detach().double().cpu()
    return torch.linalg.vector_norm(weight.unflatten(1, (units, -1)), dim=(0, 2))  # type: ignore[no-any-return]
