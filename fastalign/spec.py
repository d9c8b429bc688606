"""What is compared: everything of the objective that is not a tensor, and the published recipes by name.

An ``AlignSpec`` is a value: frozen, hashable, validated when it is made. Reading it tells the whole
objective; no backend adds a term, a constant or a default of its own.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, get_args

Heads = Literal["mean", "each", "mix"]
Normalize = Literal["joint", "visual", "visual_per_head", "none"]
Compare = Literal["map", "row", "pooled"]
Divergence = Literal["cosine", "kl", "reverse_kl", "js", "mse"]
Reduction = Literal["mean", "sum", "element_mean"]
Rows = Literal["all", "visual", "text", "given"]
Columns = Literal["visual", "all"]
LayerReduction = Literal["mean", "sum"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "heads": get_args(Heads),
    "normalize": get_args(Normalize),
    "compare": get_args(Compare),
    "divergence": get_args(Divergence),
    "reduction": get_args(Reduction),
    "rows": get_args(Rows),
    "columns": get_args(Columns),
    "layer_reduction": get_args(LayerReduction),
}

#: Divergences that compare logarithms; they need non-negative maps.
LOG_DIVERGENCES = ("kl", "reverse_kl", "js")


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


@dataclass(frozen=True, kw_only=True)
class AlignSpec:
    """The objective of one pair of attention layers.

    With ``P_h`` the softmax attention of head ``h`` (rows: queries, columns: keys) and ``V`` the
    compared columns, the compared map of a side is ``A_g = sum_h w_gh P_h`` on ``V``.

    Attributes:
        heads: the groups ``g``. ``"mean"``: one group, every head with weight 1/H (head counts may
            differ between student and teacher). ``"each"``: one group a head (equal head counts).
            ``"mix"``: the student's heads are mixed to the teacher's by a learned matrix
            ``mix`` [H_s, H_t]; the teacher's heads stay as they are.
        normalize: ``"joint"``: softmax over every visible key, then cut to ``V``, not renormalised.
            ``"visual"``: the joint map divided by its sum over ``V``, after the head mean.
            ``"visual_per_head"``: softmax over the visible keys of ``V`` alone, head by head.
            ``"none"``: the pre-softmax scores themselves (cosine and mse only).
        compare: ``"map"``: one flat vector of rows x columns per sample and group. ``"row"``: one
            vector per query row. ``"pooled"``: one vector over ``V``, the mean over the rows that
            see the column.
        divergence: of one compared unit, student ``s`` and teacher ``t``: ``"cosine"``: 1 - cos;
            ``"kl"``: sum t (log t - log s); ``"reverse_kl"``: sum s (log s - log t); ``"js"``:
            Jensen-Shannon, natural log; ``"mse"``: sum (s - t)^2. On ``"joint"`` maps cut to ``V`` the
            two sides need not have the same mass: kl is then the plain sum, which may be negative;
            choose ``normalize="visual"`` for a divergence of distributions.
        sink_sigma: None, or ``k``: entries above mean + k * std (unbiased, over the whole map,
            invisible entries counted as zeros) in either map are dropped from both, as are entries
            where the teacher is zero. No gradient flows through the statistics.
        temperature: divides the scores of both sides before the softmax. The loss is not rescaled.
        reduction: ``"mean"``: sum / count of the compared units; ``"sum"``; ``"element_mean"``: sum /
            count of the compared entries (mse only).
        rows: the query rows when no ``query_mask`` is given: ``"all"`` valid positions,
            ``"visual"`` ones, ``"text"`` (valid and not visual), or ``"given"``: the mask is required.
        columns: the columns when no ``visual_mask`` is given: ``"all"`` valid positions, or
            ``"visual"``: the mask is required.
        causal: whether keys after the query are hidden when the call does not say.
        layer_reduction: how losses of several layer pairs are reduced (used by ``fastalign.models``).

    Raises:
        ValueError: a field that is not one of its choices, or choices that contradict each other.
    """

    heads: Heads = "mean"
    normalize: Normalize = "joint"
    compare: Compare = "map"
    divergence: Divergence = "cosine"
    sink_sigma: float | None = None
    temperature: float = 1.0
    reduction: Reduction = "mean"
    rows: Rows = "all"
    columns: Columns = "visual"
    causal: bool = True
    layer_reduction: LayerReduction = "mean"
    key: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"AlignSpec.{name} is {value!r}; allowed: {_listed(allowed)}")
        if not _positive(self.temperature):
            raise ValueError(
                f"AlignSpec.temperature is {self.temperature!r}; allowed: a finite number > 0"
            )
        if self.sink_sigma is not None and not (
            isinstance(self.sink_sigma, (int, float)) and math.isfinite(self.sink_sigma)
        ):
            raise ValueError(
                f"AlignSpec.sink_sigma is {self.sink_sigma!r}; allowed: None or a finite number"
            )
        if not isinstance(self.causal, bool):
            raise ValueError(f"AlignSpec.causal is {self.causal!r}; allowed: True or False")
        self._check_combinations()
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        object.__setattr__(self, "key", json.dumps(values, sort_keys=True))

    def _check_combinations(self) -> None:
        logs = self.divergence in LOG_DIVERGENCES
        if self.normalize == "none" and logs:
            raise ValueError(
                f"AlignSpec.divergence is {self.divergence!r} with normalize='none': scores are no "
                "distribution; allowed: 'cosine' or 'mse'"
            )
        if self.normalize == "none" and self.sink_sigma is not None:
            raise ValueError(
                "AlignSpec.sink_sigma with normalize='none': the filter is defined on attention, "
                "not on scores; allowed: sink_sigma=None"
            )
        if self.heads == "mix" and (logs or self.normalize == "visual"):
            raise ValueError(
                "AlignSpec.heads is 'mix': learned weights may be negative, so that logarithms and "
                "renormalisation are undefined; allowed: divergence 'cosine' or 'mse' with normalize "
                "'joint', 'visual_per_head' or 'none'"
            )
        if self.reduction == "element_mean" and (
            self.divergence != "mse" or self.compare == "pooled"
        ):
            raise ValueError(
                "AlignSpec.reduction is 'element_mean': allowed with divergence='mse' and compare "
                "'map' or 'row' only"
            )

    @property
    def in_logs(self) -> bool:
        """Whether the maps are kept as logarithms, so that no probability underflows.

        True for the logarithmic divergences, and for ``normalize="visual"``, where a row that looks
        away from every visual token would otherwise be divided by an underflowed sum.
        """
        return self.divergence in LOG_DIVERGENCES or self.normalize == "visual"

    @property
    def sweeps_all_keys(self) -> bool:
        """Whether the softmax runs over keys outside the compared columns too."""
        return self.normalize in ("joint", "visual")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values (yaml- and json-safe); ``AlignSpec(**d)`` gives the spec back."""
        values = asdict(self)
        del values["key"]
        return values


@lru_cache(maxsize=256)
def spec_from_key(key: str) -> AlignSpec:
    """The spec whose ``key`` this is: how a spec travels through a torch operator's schema."""
    return AlignSpec(**json.loads(key))


@dataclass(frozen=True)
class Recipe:
    """A published objective: its name here, the spec that expresses it, and where it comes from."""

    name: str
    spec: AlignSpec
    summary: str
    source: str


def _recipe(name: str, summary: str, source: str, **spec: Any) -> tuple[str, Recipe]:
    return name, Recipe(name, AlignSpec(**spec), summary, source)


#: Every named recipe. Where a paper leaves a choice open, the summary says what was taken.
RECIPES: dict[str, Recipe] = dict(
    [
        _recipe(
            "compodistill",
            "1 - cos of the head-mean joint maps, all rows x visual columns, one flat vector a "
            "sample; mean over samples and layers",
            "CompoDistill, arXiv 2510.12184, the paper's formula (heads: mean, as in its code)",
        ),
        _recipe(
            "compodistill_code",
            "the released code's other function: visual rows x visual columns, sink filter at "
            "mean + 1 std, pooled over rows, 1 - cos; sum over layers",
            "CompoDistill's public code (ptkjw1997/CompoDistill), one layer pair",
            rows="visual",
            compare="pooled",
            sink_sigma=1.0,
            layer_reduction="sum",
        ),
        _recipe(
            "llavadi",
            "squared error of head-mean joint maps, answer rows x visual columns; sum / batch",
            "LLaVADI, arXiv 2407.19409",
            rows="given",
            divergence="mse",
        ),
        _recipe(
            "tunix",
            "1 - cos per query row of head-mean joint maps, all x all; mean over rows",
            "Tunix attention transfer",
            columns="all",
            compare="row",
        ),
        _recipe(
            "minilm",
            "KL(teacher || student) per head and row, all x all; mean over heads and rows",
            "MiniLM, arXiv 2002.10957, eq. 3",
            heads="each",
            columns="all",
            compare="row",
            divergence="kl",
        ),
        _recipe(
            "minilm_v2",
            "KL per relation head and row, all x all, not causal; q and k are the two sides of a "
            "relation (pass one tensor as both for Q-Q, K-K, V-V)",
            "MiniLMv2, arXiv 2012.15828, eq. 5",
            heads="each",
            columns="all",
            compare="row",
            divergence="kl",
            causal=False,
        ),
        _recipe(
            "linear_ard",
            "KL(teacher || student) per head and row, all x all; sum",
            "LinearARD, arXiv 2604.00004",
            heads="each",
            columns="all",
            compare="row",
            divergence="kl",
            reduction="sum",
        ),
        _recipe(
            "tinybert",
            "squared error of the pre-softmax scores per head, all x all visible entries; mean over "
            "the entries of all heads",
            "TinyBERT, arXiv 1909.10351, eq. 7",
            heads="each",
            columns="all",
            normalize="none",
            divergence="mse",
            reduction="element_mean",
        ),
        _recipe(
            "klal",
            "KL to a given map, answer rows x visual columns renormalised after the head mean; mean "
            "over rows",
            "KLAL",
            rows="given",
            normalize="visual",
            compare="row",
            divergence="kl",
        ),
        _recipe(
            "lavit",
            "KL to a given sparse map, few rows x visual columns, renormalised; mean over rows",
            "LaViT",
            rows="given",
            normalize="visual",
            compare="row",
            divergence="kl",
            layer_reduction="mean",
        ),
        _recipe(
            "ral",
            "Jensen-Shannon per response row over all visible keys, weighted mean over rows "
            "(row_weight)",
            "RAL",
            rows="given",
            columns="all",
            compare="row",
            divergence="js",
        ),
        _recipe(
            "align_kd",
            "squared error between the teacher's heads and a learned mix of the student's, text "
            "rows x visual columns; mean over entries",
            "Align-KD, arXiv 2412.01282 (first layer)",
            heads="mix",
            rows="text",
            divergence="mse",
            reduction="element_mean",
        ),
    ]
)


def resolve_spec(spec: AlignSpec | str) -> AlignSpec:
    """A recipe's name, or a spec as it is.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a string nor an ``AlignSpec``.
    """
    if isinstance(spec, AlignSpec):
        return spec
    if isinstance(spec, str):
        if spec not in RECIPES:
            raise ValueError(
                f"spec is {spec!r}; allowed: an AlignSpec or one of {_listed(RECIPES)}"
            )
        return RECIPES[spec].spec
    raise TypeError(f"spec is {type(spec).__name__}; allowed: an AlignSpec or a recipe's name")
