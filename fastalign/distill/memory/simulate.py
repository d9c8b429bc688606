"""Bytes alive while a part of the step runs, found by running it on fake tensors.

Nothing is computed: torch's fake tensors carry shapes, types and lifetimes through forward, autograd,
checkpointing and autocast, so that what is kept for the backward is what torch keeps, whatever the
family of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Follows the storages that are made inside: ``now`` alive, ``peak`` the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given: list[Tensor] = []
        tree_map_only(Tensor, given.append, (args, kwargs))
        # An argument's storage was there before, also where an operator hands it on.
        old = {t.untyped_storage()._cdata for t in given}
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, lambda t: self._see(t, old), out)
        return out

    def _see(self, tensor: Tensor, old: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in old:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Pass:
    """Bytes of a decoder's forward and backward, beyond its weights, input and gradients.

    Attributes:
        forward_peak: the most while the forward runs.
        forward_end: alive when it has ended, inside autocast (with the low-precision weights).
        kept: alive until the backward: what autograd saved, and the output.
        backward_peak: the most while the backward runs, ``kept`` included.
    """

    forward_peak: int
    forward_end: int
    kept: int
    backward_peak: int


def run_decoder(
    model: Any,
    *,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    autocast: bool,
    training: bool,
    checkpointing: bool = False,
) -> Pass:
    """One forward (and backward) of a model's decoder on [batch, tokens] embeddings.

    Where ``batch`` > 1 samples are taken to be padded, so that a [batch, 1, tokens, tokens] mask exists.
    """
    decoder = _decoder(model)
    model.train(training)
    if checkpointing:
        _checkpoint(model)
    width = model.config.get_text_config().hidden_size
    embeds = torch.empty(batch, tokens, width, dtype=dtype).requires_grad_(training)
    more: dict[str, Any] = {}
    if batch > 1:
        more["attention_mask"] = torch.empty(batch, 1, tokens, tokens, dtype=torch.bool)
    handles = [
        p.register_post_accumulate_grad_hook(_forget) for p in model.parameters() if p.requires_grad
    ]
    live = LiveBytes()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with live, torch.set_grad_enabled(training):
        with context, _no_packing():
            out = decoder(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state
            peak, end = live.peak, live.now
        kept = live.now
        live.peak = live.now
        if training:
            gradient = torch.empty_like(out)
            out.backward(gradient)
            embeds.grad = None
    for handle in handles:
        handle.remove()
    return Pass(peak, end, kept, live.peak)


@contextmanager
def _no_packing() -> Iterator[None]:
    """Positions that begin once are no packed sequences, which transformers cannot see on fake tensors.

    Where it cannot see it, it makes a [1, 1, L, L] mask that no run has.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name, None)
    if before is not None:
        setattr(masking_utils, name, lambda *arguments, **keywords: None)
    try:
        yield
    finally:
        if before is not None:
            setattr(masking_utils, name, before)


def run_head(
    *,
    tokens: int,
    widths: tuple[int, int | None],
    vocabularies: tuple[int, int | None],
    dtypes: tuple[torch.dtype, torch.dtype],
    weights: tuple[torch.dtype, torch.dtype],
    trained: bool,
    labelled: bool,
    fused: bool,
    positions: int,
) -> int:
    """The most bytes of output head, cross-entropy and KD at ``tokens`` labelled positions.

    Args:
        widths, vocabularies: of student and teacher; None: no KD.
        dtypes, weights: of their hidden states and of their heads.
        positions: of the batch; without ``fused`` every one of them has logits.
    """
    from ..fused import fused_linear_losses
    from ..losses import kd_sum, lm_sum

    hidden = torch.empty(tokens, widths[0], dtype=dtypes[0]).requires_grad_()
    head = torch.empty(vocabularies[0], widths[0], dtype=weights[0]).requires_grad_(trained)
    targets = torch.empty(tokens, dtype=torch.long) if labelled else None
    theirs = head_t = None
    if widths[1] is not None and vocabularies[1] is not None:
        theirs = torch.empty(tokens, widths[1], dtype=dtypes[1])
        head_t = torch.empty(vocabularies[1], widths[1], dtype=weights[1])
    if fused:
        with LiveBytes() as live:
            fused_linear_losses(hidden, head, targets, theirs, head_t)
        return int(live.peak)
    with LiveBytes() as live:
        logits = torch.empty(positions, vocabularies[0], dtype=dtypes[0]).requires_grad_()
        logits_t = None
        if vocabularies[1] is not None:
            logits_t = torch.empty(positions, vocabularies[1], dtype=dtypes[1])
        total = logits[:tokens].sum() * 0
        if targets is not None:
            total = total + lm_sum(logits[torch.empty(tokens, dtype=torch.long)], targets)
        if logits_t is not None:
            at = torch.empty(tokens, dtype=torch.long)
            total = total + kd_sum(logits[at], logits_t[at])
        total.backward()
    return int(live.peak)


def _decoder(model: Any) -> nn.Module:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder: nn.Module = inner.get_decoder()
    return decoder


def _checkpoint(model: Any) -> None:
    """Under the name that this release of transformers has for it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    arguments = {"use_reentrant": False}
    if hasattr(inner, "activation_checkpointing_enable"):
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def _forget(parameter: Tensor) -> None:
    """Gradients are a line of their own."""
    parameter.grad = None


@contextmanager
def without_warnings() -> Iterator[None]:
    """Models built for their shapes warn about weights that nobody initialised."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
