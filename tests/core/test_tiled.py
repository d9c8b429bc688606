"""The streaming backend against the definition: every spec, every precision, any tile size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from fastalign import AlignSpec
from fastalign.backends import tiled

from ..problems import Inputs, every_spec, random_inputs, spec_id
from ..strategies import calls
from ..streaming import check_any_call, check_precision


@pytest.mark.parametrize("spec", every_spec(), ids=spec_id)
def test_equals_the_definition_in_float64(spec: AlignSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients to 1e-10, with whole tiles and with tiles that cut rows and heads."""
    inputs = random_inputs(spec)
    exact = inputs.run(spec, "reference")
    for tile_bytes in (tiled.TILE_BYTES, 8 * 37 * 5, 8 * 37):  # whole; 5 rows x heads; a row of one
        monkeypatch.setattr(tiled, "TILE_BYTES", tile_bytes)
        monkeypatch.setattr(tiled, "MIN_ROWS", 2)
        for got, want in zip(inputs.run(spec, "tiled"), exact, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", every_spec(sinks=(None,)), ids=spec_id)
def test_error_is_within_twice_torchs_own(spec: AlignSpec, dtype: torch.dtype) -> None:
    check_precision("tiled", spec, dtype)


@settings(max_examples=1500)
@given(call=calls())
def test_any_call_is_finite_and_right(call: tuple[AlignSpec, Inputs]) -> None:
    """Shapes 1-70, B 0-3, GQA, unequal sides, any mask, logits to 1e4: no NaN, no warning."""
    check_any_call("tiled", *call)


def test_identical_bits_on_a_second_run() -> None:
    for spec in (AlignSpec(), AlignSpec(rows="visual", compare="pooled", sink_sigma=1.0)):
        inputs = random_inputs(spec, length=150, dtype=torch.float32)
        for first, second in zip(inputs.run(spec, "tiled"), inputs.run(spec, "tiled"), strict=True):
            assert torch.equal(first, second)


def test_hidden_tiles_are_never_read() -> None:
    """Keys that nobody sees may hold NaN: tiles beyond the causal diagonal are skipped.

    In a tile that is visited a hidden key's score is overwritten, but NaN in k would still reach dq
    through 0 * NaN, so the poison lies beyond the last row's position.
    """
    spec = AlignSpec(compare="row")
    inputs = random_inputs(spec, extras=False)
    rows = torch.zeros(2, 37, dtype=torch.bool)
    rows[:, 10:20] = True
    clean = inputs.run(spec, "tiled", query_mask=rows)
    inputs.k_s[:, :, 20:] = float("nan")
    inputs.k_t[:, :, 20:] = float("nan")
    for got, want in zip(inputs.run(spec, "tiled", query_mask=rows), clean, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_window_skips_the_keys_before_it() -> None:
    spec = AlignSpec(compare="row", columns="all")
    inputs = random_inputs(spec, extras=False)
    inputs.keywords.pop("visual_mask")
    rows = torch.zeros(2, 37, dtype=torch.bool)
    rows[:, 25:30] = True
    clean = inputs.run(spec, "tiled", query_mask=rows, window=4)
    inputs.k_s[:, :, :22] = float("nan")
    inputs.k_t[:, :, :22] = float("nan")
    for got, want in zip(inputs.run(spec, "tiled", query_mask=rows, window=4), clean, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
