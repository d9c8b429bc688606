"""Which loss terms a stage has, with which weights: plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..spec import AlignSpec, resolve_spec
from .divergences import Divergence, check_divergence
from .features import HIDDEN_DISTANCES

TERMS = ("lm", "kd", "visual_kd", "alignment", "hidden", "relation")
#: Those that a recorded teacher (``fastalign cache``) suffices for.
RECORDED_TERMS = ("lm", "kd", "alignment")


@dataclass(frozen=True)
class Losses:
    """Weights and options; the total is the weighted sum. A weight of 0 leaves the term out.

    Attributes:
        lm: cross-entropy of the answer tokens.
        kd: divergence from the teacher's next-token distribution, answer tokens (``kd_divergence``,
            ``kd_temperature``; LLaVA-MoD's dense distillation is this term, too).
        visual_kd: the same at the image tokens (LLaVA-KD).
        alignment: attention to the visual tokens (``alignment_spec``: a recipe's name or the fields of
            an ``AlignSpec``; ``alignment_layers``, ``alignment_rows``, and as controls
            ``alignment_columns``, ``alignment_target``: see ``AttentionAlignment``).
        hidden: distance of the last hidden states at every valid token (``hidden_distance``); models
            of different width get a learned projection, which is thrown away afterwards.
        relation: LLaVA-KD's relation of the image tokens' last hidden states.
    """

    lm: float = 1.0
    kd: float = 0.0
    visual_kd: float = 0.0
    alignment: float = 0.0
    hidden: float = 0.0
    relation: float = 0.0
    kd_divergence: Divergence = "forward_kl"
    kd_temperature: float = 1.0
    alignment_spec: str | dict[str, Any] = "compodistill"
    alignment_layers: str | dict[int, Any] = "compodistill"
    alignment_rows: str | None = None
    alignment_columns: Literal["visual", "text"] = "visual"
    alignment_target: Literal["teacher", "shuffled", "random"] = "teacher"
    hidden_distance: str = "mse"

    def __post_init__(self) -> None:
        for name in TERMS:
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"losses.{name} is {weight!r}; allowed: a finite weight >= 0")
        if not any(getattr(self, name) for name in TERMS):
            raise ValueError("losses has only weights of 0; allowed: at least one term")
        check_divergence(self.kd_divergence, self.kd_temperature)
        if self.hidden_distance not in HIDDEN_DISTANCES:
            raise ValueError(
                f"losses.hidden_distance is {self.hidden_distance!r}; allowed: "
                f"{', '.join(HIDDEN_DISTANCES)}"
            )
        if self.alignment:
            self.spec()

    def spec(self) -> AlignSpec:
        """The alignment's objective."""
        if isinstance(self.alignment_spec, str):
            return resolve_spec(self.alignment_spec)
        try:
            return AlignSpec(**self.alignment_spec)
        except TypeError as error:
            raise ValueError(f"losses.alignment_spec: {error}") from None

    @property
    def weights(self) -> dict[str, float]:
        """The terms that are there."""
        return {name: getattr(self, name) for name in TERMS if getattr(self, name)}

    @property
    def live_terms(self) -> list[str]:
        """Those that need the teacher itself, of which a recording is not enough."""
        return [name for name in self.weights if name not in RECORDED_TERMS]

    @property
    def needs_teacher(self) -> bool:
        return any(name != "lm" for name in self.weights)
