"""What a check found: parts, each with problems, notes and figures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..memory import StagePlan


def size_text(size: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


@dataclass
class Part:
    """One thing that is looked at.

    Attributes:
        name: of its line in the summary.
        problems: what must be mended; each begins with the recipe's entry or with file and sample.
        notes: what is worth knowing and no problem.
        left_out: why it was not looked at; empty: it was.
        summary: what was found, in a few words.
        facts: figures, as plain values.
    """

    name: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: str = ""
    summary: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``problems``, ``left out`` or ``ok``."""
        if self.problems:
            return "problems"
        return "left out" if self.left_out else "ok"


@dataclass
class Outcome:
    """All parts of a recipe's check, and the memory plans of its stages."""

    recipe: str
    parts: list[Part] = field(default_factory=list)
    plans: list[StagePlan] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(part.problems for part in self.parts)

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def plain(self) -> dict[str, Any]:
        """As mappings, lists and scalars, for json; what json has no number for is text ("nan")."""
        whole: dict[str, Any] = {
            "recipe": self.recipe,
            "ok": self.ok,
            "parts": [
                {
                    "name": part.name,
                    "verdict": part.verdict,
                    "summary": part.summary,
                    "left_out": part.left_out,
                    "problems": part.problems,
                    "notes": part.notes,
                    **part.facts,
                }
                for part in self.parts
            ],
        }
        plain: dict[str, Any] = _without_nan(whole)
        return plain


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
