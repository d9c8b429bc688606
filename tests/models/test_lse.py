"""The log-sum-exp that a model's own sdpa computed takes the place of our sweep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.models import AttentionAlignment, capture, observe
from fastalign.models.layer import LayerState
from tests.models import eager, tiny


def _states(model: Any, inputs: Any) -> list[LayerState]:
    found: list[LayerState] = []
    observe.observe(
        model, inputs, None, "all", lambda layer, state, rows, tokens: found.append(state)
    )
    return found


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("text", ["llama", "mistral"])  # mistral: a sliding window
def test_it_is_the_one_of_the_visible_keys(text: str, left: bool) -> None:
    model = tiny.llava(text=text, **({"sliding_window": 6} if text == "mistral" else {})).eval()
    inputs = tiny.batch(left=left)
    for state in _states(model, inputs):
        assert state.lse is not None
        valid = inputs["attention_mask"].bool()
        place = torch.arange(valid.shape[1]).expand_as(valid)
        see = state.visibility.visible(place, place).unsqueeze(1)
        k = state.k.double().repeat_interleave(state.q.shape[1] // state.k.shape[1], 1)
        scores = state.scale * state.q.double() @ k.transpose(-1, -2)
        exact = scores.masked_fill(~see, -torch.inf).logsumexp(-1)
        here = valid.unsqueeze(1).expand_as(exact)
        torch.testing.assert_close(state.lse[here].double(), exact[here], atol=1e-5, rtol=0)


def test_there_is_none_under_eager_and_with_dropout() -> None:
    inputs = tiny.batch()
    assert all(state.lse is None for state in _states(eager.eager_copy(tiny.llava()), inputs))
    dropped = tiny.llava(attention_dropout=0.5).train()
    assert all(state.lse is None for state in _states(dropped, inputs))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_our_own_sweep(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny.batch(left=True)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for sweep in (False, True):
        if sweep:
            monkeypatch.setattr(capture, "usable_lse", lambda query, lse: None)
        student, teacher = tiny.llava(seed=1).train(), tiny.llava(seed=2, heads=8).eval()
        if checkpointing:
            student.activation_checkpointing_enable()
        alignment = AttentionAlignment(student, teacher, layers="all", backend="tiled")
        with alignment.step(inputs):
            with torch.no_grad():
                teacher(**inputs)
            student(**inputs)
        alignment.loss().backward()
        found.append((alignment.loss().detach(), eager.gradients(student)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=0, rtol=1e-5)
    assert eager.relative_error(found[0][1], found[1][1]) < 1e-5
