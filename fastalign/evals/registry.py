"""The benchmarks by name."""

from __future__ import annotations

from typing import Any

from .benchmark import Benchmark
from .benchmarks.bivlc import BIVLC
from .benchmarks.gqa import GQA
from .benchmarks.mmbench import MMBENCH
from .benchmarks.mme import MME
from .benchmarks.naturalbench import NATURALBENCH
from .benchmarks.pope import POPE
from .benchmarks.sugarcrepe import SUGARCREPE
from .benchmarks.textvqa import TEXTVQA
from .benchmarks.winoground import WINOGROUND

BENCHMARKS: dict[str, Benchmark[Any]] = {
    benchmark.name: benchmark
    for benchmark in (
        SUGARCREPE,
        WINOGROUND,
        BIVLC,
        NATURALBENCH,
        GQA,
        TEXTVQA,
        POPE,
        MME,
        MMBENCH,
    )
}
