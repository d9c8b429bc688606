"""Peak bytes of tensors, as the benchmarks count them."""

from __future__ import annotations

from benchmarks.memory import peak_bytes

__all__ = ["peak_bytes"]
