"""What is measured: the loss with its gradients, or the forward of pooled maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .pooled import POOLED, pooled_applies
from .providers import PROVIDERS, Provider, applies
from .shapes import Shape


@dataclass(frozen=True)
class Mode:
    """One comparison.

    Attributes:
        providers: by name. oracle: the one whose float32 arithmetic the others are checked against.
        applies: (provider, shape, limit in bytes, device) -> why it is left out, or "".
    """

    providers: Mapping[str, Provider]
    oracle: Callable[[Shape], str]
    applies: Callable[[str, Shape, int, str], str]


def _oracle(shape: Shape) -> str:
    return "eager_rows" if shape.dtype.itemsize == 4 else "eager_rows_upcast"


MODES = {
    "fwd+bwd": Mode(PROVIDERS, _oracle, applies),
    "pooled fwd": Mode(POOLED, lambda shape: "eager_rows", pooled_applies),
}
