"""Few rows: the keys of a row block are cut into parts, whose results are added up in their order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastalign import AlignSpec
from fastalign.backends import triton as backend  # noqa: F401, it makes fastalign.kernels importable

from ...problems import Inputs, random_inputs, spec_id
from .common import check, run

from fastalign.kernels import dq, map_gradient, pooled, row_delta, row_lse, statistics  # isort: skip
from fastalign.kernels.launch import Call  # isort: skip

LENGTH = 70
SPECS = [
    AlignSpec(),
    AlignSpec(compare="row", divergence="kl", normalize="visual"),
    AlignSpec(heads="mix"),
    AlignSpec(compare="pooled"),
    AlignSpec(compare="pooled", divergence="kl"),
    AlignSpec(heads="each", divergence="js", compare="row", normalize="visual_per_head"),
]


def _few_rows(spec: AlignSpec) -> Inputs:
    """Five rows of a sequence of five tiles; a window hides some tiles from all of them."""
    inputs = random_inputs(
        spec,
        batch=1,
        length=LENGTH,
        heads=(2, 3),
        key_heads=(1, 3),
        extras=False,
        dtype=torch.float32,
    )
    inputs.q_s, inputs.q_t = inputs.q_s[:, :, :5], inputs.q_t[:, :, :5]  # type: ignore[index]
    positions = torch.tensor([[69, 3, 41, 55, 68]])
    inputs.keywords.update(query_positions=positions, visual_mask=torch.ones(1, LENGTH).bool())
    inputs.keywords["visual_mask"][:, ::5] = False
    return inputs


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], dict[str, list[int]]]:
    """``cut(True)``: as many parts as there are tiles; ``cut(False)``: one. Returns what was chosen."""
    chosen: dict[str, list[int]] = {}
    for module in (dq, map_gradient, pooled, row_delta, row_lse, statistics):
        name = module.__name__.rpartition(".")[2]
        real = module.splits_for

        def spy(*arguments: int, name: str = name, real: Callable[..., int] = real) -> int:
            parts = real(*arguments)
            chosen.setdefault(name, []).append(parts)
            return parts

        monkeypatch.setattr(module, "splits_for", spy)

    def set_size(many: bool) -> dict[str, list[int]]:
        monkeypatch.setattr(Call, "multiprocessors", lambda self: 10_000 if many else 0)
        chosen.clear()
        return chosen

    return set_size


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_parts_are_the_whole(spec: AlignSpec, cut: Callable[[bool], dict[str, list[int]]]) -> None:
    inputs = _few_rows(spec)
    chosen = cut(False)
    whole = run(inputs, spec)
    assert all(parts == 1 for counts in chosen.values() for parts in counts)
    chosen = cut(True)
    parts = check(inputs, spec)
    used = {name for name, counts in chosen.items() if max(counts) > 2}
    assert {"row_lse", "row_delta", "dq"} <= used
    # pooled_sums cuts rows, and five are one tile of them; renormalising needs a row's whole sum
    assert "statistics" in used or spec.compare == "pooled"
    assert "map_gradient" in used or spec.normalize == "visual"
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("spec", SPECS[:2], ids=spec_id)
def test_the_same_bits_on_a_second_run(
    spec: AlignSpec, cut: Callable[[bool], dict[str, list[int]]]
) -> None:
    inputs = _few_rows(spec)
    cut(True)
    first: list[Tensor] = run(inputs, spec, window=30)
    for got, want in zip(run(inputs, spec, window=30), first, strict=True):
        assert torch.equal(got, want)
    check(inputs, spec, window=30)


def test_rows_cut_into_parts(cut: Callable[[bool], dict[str, list[int]]]) -> None:
    """pooled: few columns, many rows."""
    for spec in (AlignSpec(compare="pooled"), AlignSpec(compare="pooled", divergence="kl")):
        inputs = random_inputs(
            spec, batch=1, length=50, heads=(1, 1), key_heads=(1, 1), dtype=torch.float32
        )
        chosen = cut(True)
        check(inputs, spec)
        assert max(chosen["pooled"]) > 2
