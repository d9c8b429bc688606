"""Small shapes, where the call itself shows: `make bench`; microseconds, forward and backward.

Not part of `make test`: pytest collects tests/ alone. The correctness gate runs first here, too.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .case import Case
from .gate import check
from .modes import MODES
from .shapes import SHAPES

PROVIDERS = ("eager_rows", "eager_rows_compiled", "tiled", "cpu")


# torch.compile's own imports and its advice about matrix precision are no matter of this suite
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", ["small", "tiny"])
def test_call(shape: str, provider: str, benchmark: BenchmarkFixture) -> None:
    case, mode = Case.of(SHAPES[shape]), MODES["fwd+bwd"]
    benchmark.group = f"{shape}: {case.shape.describe()}"
    step = mode.providers[provider](case)
    assert check(case, mode, {provider: step}) == {provider: ""}
    benchmark.pedantic(step, warmup_rounds=5, rounds=200)
