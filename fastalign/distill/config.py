"""``DistillConfig``: the Trainer's arguments and what distillation adds to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .plain import from_plain
from .terms import Losses


@dataclass
class DistillConfig(TrainingArguments):  # type: ignore[misc]
    """``transformers.TrainingArguments`` with these additions.

    Attributes:
        losses: the entries of ``Losses``, as a mapping.
        fused_head: output head, cross-entropy and logit distillation a few tokens at a time.
        share_vision: "auto": one run of the vision tower for both models where it is the same and
            frozen; "never".
        group_batches: batches of samples alike in modality and length.
    """

    losses: dict[str, Any] = field(default_factory=lambda: {"lm": 1.0, "kd": 1.0, "alignment": 1.0})
    fused_head: bool = True
    share_vision: str = "auto"
    group_batches: bool = False
    # The processor's outputs are all needed, whatever the model's signature names.
    remove_unused_columns: bool | None = False
    report_to: str | list[str] | None = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.terms()

    def terms(self) -> Losses:
        """The validated ``losses``."""
        return from_plain(Losses, self.losses, "losses")
