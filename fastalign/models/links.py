"""The operator through which a compiled layer reaches its tap, at run time.

A tap is Python: it may not be traced, and a graph break would end ``fullgraph=True``. A compiled layer
therefore calls ``fastalign::see``, an operator of q, k, the sinks and the number of the layer's link, whose
result is the layer's loss. Its kernel calls the tap, forms the loss and its gradients on the spot, as an
eager layer does, and files the gradients under the link's number; its backward multiplies them by the
upstream gradient. The number is a tensor: layers share compiled code, and constants in it.

The loss leaves the compiled code as an attribute of the link. Under gradient checkpointing the operator
runs again, finds no tap, and its backward finds the filed gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .calls import Call

#: The attribute of an attention module that holds its link, inside a step.
ATTRIBUTE = "_fastalign_link"

_numbers = count(1)


class Link:
    """What compiled code reads of a tap, and where it leaves the loss.

    Attributes:
        number: 0-dim int64 on the CPU. parameter: of the loss itself, or None.
        loss: what the last run of the layer left here.
    """

    def __init__(
        self, module: nn.Module, see: Callable[[Call], Tensor | None], parameter: Tensor | None
    ) -> None:
        self.number = torch.tensor(next(_numbers))
        self.parameter = parameter
        self.loss: Tensor | None = None
        self.filed = _Filed(module, see, parameter)

    def collect(self) -> Tensor | None:
        """The loss that a compiled layer left, with its gradients kept alive by its graph."""
        loss, self.loss = self.loss, None
        if loss is None or not self.filed.seen:
            return None
        if loss.grad_fn is not None:
            kept: Any = loss.grad_fn.metadata
            kept["fastalign"] = self.filed
        return loss


class _Filed:
    """The tap of a link, and the gradients that it formed: by query, key, parameter and sinks."""

    def __init__(
        self, module: nn.Module, see: Callable[[Call], Tensor | None], parameter: Tensor | None
    ) -> None:
        self.module = module
        self.parameter = parameter
        self.see: Callable[[Call], Tensor | None] | None = see
        self.seen = False
        self.gradients: tuple[Tensor | None, ...] = ()


_files: WeakValueDictionary[int, _Filed] = WeakValueDictionary()


@contextmanager
def linked(links: Mapping[nn.Module, Link]) -> Iterator[None]:
    """Compiled code of these modules finds their links inside."""
    for module, link in links.items():
        setattr(module, ATTRIBUTE, link)
        _files[int(link.number)] = link.filed
    try:
        with _side_effects_once():
            yield
    finally:
        for module, link in links.items():
            delattr(module, ATTRIBUTE)
            link.filed.see = None


def _side_effects_once() -> AbstractContextManager[object]:
    """Compiled checkpoints leave the loss in the first run only; torch asks whether that is meant."""
    option = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    dynamo = sys.modules.get("torch._dynamo")  # not imported: nothing is compiled
    if dynamo is None or not hasattr(dynamo.config, option):
        return nullcontext()
    patched: AbstractContextManager[object] = dynamo.config.patch({option: True})
    return patched


def show_compiled(module: nn.Module, call: Call) -> None:
    """Traced into a compiled layer in the tap's place."""
    link = getattr(module, ATTRIBUTE, None)
    if link is None:
        return
    mask = call.mask if isinstance(call.mask, Tensor) else None
    link.loss = torch.ops.fastalign.see(
        call.query,
        call.key,
        link.parameter,
        call.sinks,
        link.number,
        mask,
        call.positions,
        call.starts,
        call.lse,
        call.scaling,
        call.softcap,
        call.window,
        call.causal,
        call.flash,
        call.mask is not None,
        call.grad,
        call.query.requires_grad or call.key.requires_grad,
        call.sinks is not None and call.sinks.requires_grad,
    )


torch.library.define(
    "fastalign::see",
    "(Tensor query, Tensor key, Tensor? parameter, Tensor? sinks, Tensor number, Tensor? mask, "
    "Tensor? positions, Tensor? starts, Tensor? lse, float? scaling, float? softcap, int? window, "
    "bool causal, bool flash, bool masked, bool grad, bool wanted, bool sinks_wanted) -> Tensor",
)
torch.library.define(
    "fastalign::see_backward",
    "(Tensor upstream, Tensor number, Tensor query, Tensor key, Tensor? parameter, Tensor? sinks) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("fastalign::see", "default")
def _see(
    query: Tensor,
    key: Tensor,
    parameter: Tensor | None,
    sinks: Tensor | None,
    number: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    starts: Tensor | None,
    lse: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    window: int | None,
    causal: bool,
    flash: bool,
    masked: bool,
    grad: bool,
    wanted: bool,
    sinks_wanted: bool,
) -> Tensor:
    """The loss of the layer, 0 where nobody asked.

    Beyond what ``Call`` says: ``masked``, whether there was a mask, of whatever kind; ``grad``, whether
    gradients are enabled at the call; ``wanted``, whether query or key need them; ``sinks_wanted``,
    whether the sinks do.
    """
    loss = _scalar(query).zero_()
    filed = _files.get(int(number))
    if filed is None or filed.see is None or torch._C._current_graph_task_id() != -1:
        return loss
    query, key = (x.detach().requires_grad_(grad and wanted) for x in (query, key))
    if sinks is not None:
        sinks = sinks.detach().requires_grad_(grad and sinks_wanted)
    with _autograd(grad):
        result = filed.see(
            Call(
                query=query,
                key=key,
                mask=mask if mask is not None or not masked else ...,
                scaling=scaling,
                softcap=softcap,
                window=window,
                causal=causal,
                sinks=sinks,
                flash=flash,
                positions=positions,
                starts=starts,
                lse=lse,
                grad=grad_outside(filed.module),
                borrowed=True,  # the compiler's code may write over them as soon as this returns
            )
        )
        filed.seen = True
        if result is None:
            return loss
        if result.requires_grad:
            inputs = (query, key, filed.parameter, sinks)
            needs = [x is not None and x.requires_grad for x in inputs]
            leaves = [x for x, need in zip(inputs, needs, strict=True) if need and x is not None]
            found = iter(torch.autograd.grad(result, leaves))
            filed.gradients = tuple(next(found) if need else None for need in needs)
    return loss.copy_(result.detach())


def _scalar(query: Tensor, *_: Any) -> Tensor:
    """The loss of a layer, not yet written."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.empty((), dtype=dtype, device=query.device)


torch.library.register_fake("fastalign::see", _scalar)


@torch.library.impl("fastalign::see_backward", "default")
def _see_backward(upstream: Tensor, number: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    filed = _files.get(int(number))
    if filed is None and bool(upstream != 0):
        raise RuntimeError(
            "the gradients of a compiled layer's alignment are gone: its step was let go of before "
            "the backward; allowed: backward while the step's loss is alive"
        )
    found = () if filed is None else filed.gradients
    given: list[Tensor | None] = [*found, *[None] * (len(inputs) - len(found))]
    outputs = _like(upstream, number, *inputs)
    for out, gradient in zip(outputs, given, strict=True):
        if gradient is None:
            out.zero_()
        else:
            out.copy_(gradient).mul_(upstream)
    return outputs


def _like(upstream: Tensor, number: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients by query, key, parameter and sinks, not yet written, contiguous whatever the inputs are.

    Those by what does not exist are there, too, and have one element.
    """
    like = (upstream if x is None else x for x in inputs)
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like)


torch.library.register_fake("fastalign::see_backward", _like)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, parameter, sinks, number = inputs[:5]
    ctx.count = len(inputs)
    ctx.save_for_backward(number, query, key, parameter, sinks)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    number, *inputs = ctx.saved_tensors
    found = torch.ops.fastalign.see_backward(upstream, number, *inputs)
    gradients = (g if x is not None else None for g, x in zip(found, inputs, strict=True))
    return (*gradients, *(None,) * (ctx.count - len(inputs)))


torch.library.register_autograd("fastalign::see", _differentiate, setup_context=_setup_context)


@contextmanager
def _autograd(enabled: bool) -> Iterator[None]:
    """Autograd works inside, though an operator's kernel runs below it."""
    if not enabled:
        with torch.no_grad():
            yield
        return
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for name in _AUTOGRAD_KEYS:
        exclude = exclude.remove(getattr(torch._C.DispatchKey, name))
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


_AUTOGRAD_KEYS: Sequence[str] = (
    *("AutogradOther", "AutogradCPU", "AutogradCUDA", "AutogradXPU", "AutogradMPS"),
    *("AutogradHPU", "AutogradPrivateUse1", "AutogradFunctionality"),
)

# ------------------------------------------------------------- what a checkpoint would hide

_grad_outside: dict[int, bool] = {}  # id of a text configuration -> grad mode of its forward


def note_grad(config: Any) -> None:
    """Keep the grad mode of a forward where its masks are made: a reentrant checkpoint hides it later."""
    _grad_outside[id(config)] = torch.is_grad_enabled()


def grad_outside(module: Any) -> bool:
    """The grad mode that was noted for the module's model."""
    return _grad_outside.get(id(module.config), torch.is_grad_enabled())
