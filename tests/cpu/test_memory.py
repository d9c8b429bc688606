"""Peak extra memory of the C++ kernels: bounded by their budget and the inputs, flat in heads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.case import Case
from benchmarks.memory import step_bytes
from benchmarks.providers import cpu
from benchmarks.shapes import SHAPES, Shape

MIB = 2**20
#: Of the named shapes all but those that differ by type or rows alone; few rows, for time.
NAMES = ("compodistill-text", "compodistill-visual", "long-d64", "qwen2.5-vl", "video")


def extra(shape: Shape) -> int:
    """Peak bytes of tensors and workspace of one forward and backward, beyond the inputs."""
    return step_bytes(cpu(Case.of(shape)))


@pytest.mark.parametrize("name", NAMES)
def test_within_64_mib_and_twice_the_inputs(name: str) -> None:
    shape = SHAPES[name]
    shape = replace(shape, count=min(64, len(shape.positions())))
    peak, bound = extra(shape), 64 * MIB + 2 * shape.input_bytes()
    print(f"{name}: {peak / MIB:.0f} MiB, bound {bound / MIB:.0f}")
    assert peak <= bound


def test_flat_when_heads_double() -> None:
    """Beyond twice the inputs, of which gradients and their copies are a part."""
    shape = SHAPES["long-d64"]
    double = replace(shape, heads=(32, 40), key_heads=(32, 40))

    def beyond(shape: Shape) -> int:
        return extra(shape) - 2 * shape.input_bytes()

    assert beyond(double) <= max(64 * MIB, 1.05 * beyond(shape))


def test_the_bound_is_one_that_eager_breaks() -> None:
    from benchmarks.providers import eager_rows

    shape = SHAPES["long-d64"]
    assert step_bytes(eager_rows(Case.of(shape))) > 64 * MIB + 2 * shape.input_bytes()
