"""Attention received, relevance and sink scores against sums over eager weights."""

from __future__ import annotations

import pytest
import torch

from fastalign.models import attention_received, image_relevance, sink_scores
from tests.models import eager, tiny
from tests.models.zoo import CASES

BY_NAME = {case.name: case for case in CASES}
SINKS = "LLaVA-1.5, gpt_oss text"


@pytest.mark.parametrize(
    ("name", "rows"),
    [*((name, "all") for name in BY_NAME), ("Gemma 3", "response"), (SINKS, "response")],
)
def test_attention_received_and_relevance(name: str, rows: str) -> None:
    case = BY_NAME[name]
    model = case.model()
    inputs = case.batch(model, left=True)
    layers = [1, 3] if name == "Qwen3.5" else [1, 2]  # a hybrid's layers 0 and 2 have no map
    received = attention_received(model, inputs, layers=layers, rows=rows)
    everywhere = attention_received(model, inputs, layers=[1], rows=rows, columns="all")
    relevance = image_relevance(model, inputs, layers=layers, rows=rows)
    assert list(received) == list(relevance) == layers
    with torch.no_grad():
        _, weights = eager.attentions(eager.eager_copy(model), inputs)
    columns, valid = eager.visual_mask(model, inputs), inputs["attention_mask"].bool()
    chosen = valid if rows == "all" else inputs["labels"] != -100
    for layer in layers:
        for b in range(2):
            map = weights[layer].mean(1)[b][chosen[b]][:, columns[b]]
            seen = (map > 0).sum(0).clamp(min=1)
            count = int(columns[b].sum())
            torch.testing.assert_close(
                received[layer][b, :count], map.sum(0) / seen, rtol=1e-4, atol=1e-6
            )
            assert not received[layer][b, count:].any()
            at = chosen[b].nonzero().flatten() if rows == "all" else torch.arange(len(map))
            torch.testing.assert_close(relevance[layer][b, at], map.sum(-1), rtol=1e-4, atol=1e-6)
    assert everywhere[1].shape == (2, int(valid.sum(-1).max()))
    with pytest.raises(ValueError, match="columns is 'text'; allowed: 'visual' or 'all'"):
        attention_received(model, inputs, columns="text")


@pytest.mark.parametrize("rows", ["all", "text", "last"])
def test_sink_scores_are_those_of_eager_weights(rows: str) -> None:
    """Standard scores of the mean weight that each visual token receives, sample by sample."""
    model, inputs = tiny.llava().eval(), tiny.batch(left=True)
    received = attention_received(model, inputs, layers=[2], rows=rows)[2]
    with torch.no_grad():
        _, weights = eager.attentions(eager.eager_copy(model), inputs)
    columns, valid = eager.visual_mask(model, inputs), inputs["attention_mask"].bool()
    scores = sink_scores(received, columns.sum(-1))
    for b in range(2):
        chosen = valid[b] & ~columns[b] if rows == "text" else valid[b]
        chosen = chosen.nonzero().flatten()[-1:] if rows == "last" else chosen
        map = weights[2].mean(1)[b][chosen][:, columns[b]]
        mean = map.sum(0) / (map > 0).sum(0).clamp(min=1)
        expected = (mean - mean.mean()) / mean.std(unbiased=False)
        assert expected.abs().max() > 1
        torch.testing.assert_close(scores[b, : len(mean)], expected, rtol=1e-3, atol=1e-4)
        assert not scores[b, len(mean) :].any()


def test_a_sink_stands_out() -> None:
    scores = torch.tensor([[0.1, 0.1, 0.1, 0.9], [0.2, 0.4, 0.0, 0.0]])
    found = sink_scores(scores, torch.tensor([4, 2]))
    assert found[0].argmax() == 3
    assert found[0, 3] == pytest.approx(3**0.5)
    torch.testing.assert_close(found[1], torch.tensor([-1.0, 1.0, 0, 0]))
    assert not sink_scores(torch.full((1, 3), 0.25)).any()
    assert tiny.PATCHES
