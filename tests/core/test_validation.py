"""Bad input: each error names the argument, what came and what is allowed, before any kernel runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastalign import RECIPES, AlignSpec, fused_attn_align_loss
from fastalign.backends import tiled

B, H, K, L, D = 2, 4, 2, 12, 8


def arguments(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "q_s": torch.randn(B, H, L, D),
        "k_s": torch.randn(B, K, L, D),
        "q_t": torch.randn(B, 6, L, 5),
        "k_t": torch.randn(B, 3, L, 5),
        "visual_mask": torch.ones(B, L, dtype=torch.bool),
    }
    return {**base, **changes}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q_s": torch.randn(H, L, D)}, ValueError, r"q_s has shape \[4, 12, 8\].*four dimensions"),
    ({"q_s": [1.0]}, TypeError, "q_s is list; allowed: a tensor"),
    ({"k_s": torch.ones(B, K, L, D, dtype=torch.int64)}, TypeError, "k_s is torch.int64"),
    ({"k_s": torch.randn(B, 3, L, D)}, ValueError, "q_s has 4 heads and k_s 3.*divides"),
    ({"k_s": torch.randn(B, K, L, D + 1)}, ValueError, "k_s has head size 9; allowed: 8"),
    ({"k_s": torch.randn(B, K, L + 1, D)}, ValueError, "q_s has length 12 and k_s 13"),
    ({"k_s": torch.randn(B + 1, K, L, D)}, ValueError, "k_s has batch size 3; allowed: 2"),
    ({"k_s": torch.randn(B, 0, L, D)}, ValueError, "at least one head"),
    ({"q_t": torch.randn(B, 6, L - 1, 5), "k_t": torch.randn(B, 3, L - 1, 5)}, ValueError, "q_t"),
    ({"q_t": None}, ValueError, "q_t is None; allowed: both q_t and k_t, or target"),
    ({"visual_mask": None}, ValueError, "visual_mask is None"),
    ({"visual_mask": torch.ones(B, L)}, TypeError, "visual_mask is torch.float32; allowed: bool"),
    ({"visual_mask": torch.ones(L, dtype=torch.bool)}, ValueError, r"visual_mask has shape \[12\]"),
    ({"query_mask": torch.ones(B, L + 1, dtype=torch.bool)}, ValueError, r"query_mask.*\[2, 12\]"),
    ({"attention_mask": torch.ones(B, L, dtype=torch.int64)}, TypeError, "attention_mask is torch"),
    ({"spec": "compodistil"}, ValueError, "spec is 'compodistil'; allowed.*'compodistill'"),
    ({"spec": 3}, TypeError, "spec is int"),
    ({"spec": "llavadi"}, ValueError, "query_mask is None.*rows='given'"),
    ({"spec": "minilm"}, ValueError, "q_s has 4 heads and q_t 6.*equal numbers"),
    ({"spec": "align_kd"}, ValueError, r"mix is None.*\[H_s, H_t\]"),
    (
        {"spec": "align_kd", "mix": torch.ones(4, 4)},
        ValueError,
        r"mix has shape \[4, 4\].*\[4, 6\]",
    ),
    ({"mix": torch.ones(4, 6)}, ValueError, "mix is given with heads='mean'"),
    ({"backend": "cuda"}, ValueError, "backend is 'cuda'; allowed: 'auto', 'reference', 'tiled'"),
    ({"causal": 1}, TypeError, "causal is 1"),
    ({"scale_s": float("nan")}, ValueError, "scale_s is nan"),
    ({"softcap_t": -1.0}, ValueError, "softcap_t is -1.0; allowed: None or a finite number > 0"),
    ({"window": 0}, ValueError, "window is 0; allowed: None or an integer of at least 1"),
    ({"chunk": 2.5}, ValueError, "chunk is 2.5"),
    ({"sink_s": torch.ones(3)}, ValueError, r"sink_s has shape \[3\]; allowed: \[4\]"),
    (
        {"segment_ids": torch.ones(B, L)},
        TypeError,
        "segment_ids is torch.float32; allowed: integer",
    ),
    ({"block_ids": torch.ones(B, 2, dtype=torch.int64)}, ValueError, "block_ids has shape"),
    ({"row_weight": torch.ones(B, L, dtype=torch.int64)}, TypeError, "row_weight is torch.int64"),
    ({"row_weight": -torch.ones(B, L)}, ValueError, "row_weight holds a negative weight"),
    ({"lse_s": torch.zeros(B, H)}, ValueError, r"lse_s has shape \[2, 4\]; allowed: \[2, 4, 12\]"),
    (
        {"lse_s": torch.zeros(B, H, L), "spec": AlignSpec(normalize="visual_per_head")},
        ValueError,
        "lse_s is given with normalize='visual_per_head'",
    ),
    (
        {"lse_s": torch.zeros(B, H, L), "spec": AlignSpec(temperature=2.0)},
        ValueError,
        "lse_s is given.*temperature 2.0",
    ),
    ({"target": torch.ones(B, 1, L, L)}, ValueError, "target is given with q_t or k_t"),
    (
        {"q_t": None, "k_t": None, "target": torch.ones(B, 2, L, L)},
        ValueError,
        r"target has shape \[2, 2, 12, 12\].*G = 1",
    ),
    (
        {"q_t": None, "k_t": None, "target": torch.ones(B, 1, L - 1, L)},
        ValueError,
        "target has 11 rows; allowed: at least 12",
    ),
    (
        {"q_t": None, "k_t": None, "target": torch.ones(B, 1, L, 5)},
        ValueError,
        "target has 5 columns; allowed: at least 12",
    ),
    ({"target_index": torch.zeros(1)}, ValueError, "target_index is given without target"),
    (
        {
            "q_t": None,
            "k_t": None,
            "target": torch.ones(B, 1, L, 2),
            "target_index": torch.full((B, 1, L, 2), 12),
        },
        ValueError,
        "target_index holds 12; allowed: -1",
    ),
    (
        {"q_t": None, "k_t": None, "target": torch.ones(B, 1, L), "spec": "compodistill_code"},
        ValueError,
        "target is given with compare='pooled' and sink_sigma",
    ),
    (
        {"query_positions": torch.full((B, L), L), "query_mask": None},
        ValueError,
        "query_positions holds 12; allowed: -1",
    ),
    (
        {
            "query_positions": torch.zeros(B, L, dtype=torch.int64),
            "query_mask": torch.ones(B, L, dtype=torch.bool),
        },
        ValueError,
        "query_mask is given with query_positions",
    ),
    ({"visual_mask": torch.ones(B, L, dtype=torch.bool, device="meta")}, ValueError, "is on meta"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[m[:40] for _, _, m in BAD])
def test_bad_arguments(
    changes: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(*_: Any) -> None:
        pytest.fail("a kernel ran on bad input")

    monkeypatch.setattr(tiled, "forward", no_kernel)
    keywords = arguments(**changes)
    with pytest.raises(error, match=message):
        fused_attn_align_loss(**keywords)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": "sum"}, "AlignSpec.heads is 'sum'; allowed: 'mean', 'each', 'mix'"),
        ({"divergence": "l1"}, "AlignSpec.divergence is 'l1'"),
        ({"temperature": 0.0}, "AlignSpec.temperature is 0.0; allowed: a finite number > 0"),
        ({"sink_sigma": float("inf")}, "AlignSpec.sink_sigma is inf"),
        ({"normalize": "none", "divergence": "kl"}, "scores are no distribution"),
        ({"normalize": "none", "divergence": "mse", "sink_sigma": 1.0}, "not on scores"),
        ({"heads": "mix", "divergence": "kl"}, "learned weights may be negative"),
        ({"reduction": "element_mean"}, "AlignSpec.reduction is 'element_mean'"),
        ({"causal": None}, "AlignSpec.causal is None"),
    ],
)
def test_bad_specs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignSpec(**fields)


def test_auto_says_once_what_it_picked(caplog: pytest.LogCaptureFixture) -> None:
    from fastalign import registry

    registry._log_once.cache_clear()
    with caplog.at_level("INFO", logger="fastalign"):
        for _ in range(2):
            fused_attn_align_loss(**arguments())
    assert len([r for r in caplog.records if "backend='auto' uses" in r.getMessage()]) == 1


def test_recipes_are_documented_and_round_trip() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert recipe.summary
        assert recipe.source
        assert AlignSpec(**recipe.spec.to_dict()) == recipe.spec
