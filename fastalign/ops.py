"""The torch operators: one schema per direction, fake kernels, autograd, dispatch to a backend.

``fastalign::align`` and ``fastalign::align_backward`` take a ``Problem`` field by field. They run
whatever ``backend`` names, on any device; ``torch.compile``, FakeTensor and opcheck see shapes that
follow from the inputs' shapes alone. Gradients exist for q_s, k_s, mix and sink_s; the teacher has none.

``fastalign::align_with_gradients`` is for backends that compute the gradients along with the loss, while
the maps are still in their workspace: the loss is a scalar, so that its backward is a multiplication.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .backends import cpu
from .backends.contract import Forward, Gradients, empty_forward
from .problem import Problem
from .registry import backend_for, gradients_together
from .spec import spec_from_key

_PROBLEM = (
    "Tensor q_s, Tensor k_s, Tensor? q_t, Tensor? k_t, Tensor? target, Tensor? target_index, "
    "Tensor? mix, Tensor? lse_s, Tensor? lse_t, Tensor positions, Tensor columns, "
    "Tensor? row_weight, Tensor segments, Tensor? blocks, Tensor? sink_s, Tensor? sink_t, "
    "bool causal, int window, float scale_s, float scale_t, float softcap_s, float softcap_t, "
    "str spec"
)
_NAMES = tuple(field.name for field in fields(Problem))  # in the order of _PROBLEM
_FIELDS = len(_NAMES)
_LEAVES = Gradients._fields  # what has a gradient
_AT = tuple(_NAMES.index(name) for name in _LEAVES)
_SAVED = (
    "Tensor saved_lse_s, Tensor saved_lse_t, Tensor statistics, Tensor entries, Tensor pooled, "
    "Tensor thresholds"
)

torch.library.define(
    "fastalign::align",
    f"({_PROBLEM}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastalign::align_backward",
    f"({_PROBLEM}, str backend, Tensor grad, {_SAVED}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastalign::align_with_gradients",
    f"({_PROBLEM}, str backend, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    # of the leaves only the types are read; they are here so that a second derivative is refused
    "fastalign::scale_gradients",
    "(Tensor q_s, Tensor k_s, Tensor? mix, Tensor? sink_s, Tensor d_q, Tensor d_k, Tensor d_mix, "
    "Tensor d_sink, Tensor grad) -> (Tensor, Tensor, Tensor, Tensor)",
)


def run(problem: Problem, backend: str) -> Tensor:
    """The loss of a problem on a streaming backend, differentiable in its leaves."""
    arguments, wanted = _arguments(problem), _wanted(problem)
    loss: Tensor
    if wanted and gradients_together(backend, problem.q_s.device):
        if torch.compiler.is_compiling():
            loss = torch.ops.fastalign.align_with_gradients(*arguments, backend, wanted)[0]
        else:
            loss = _Together.apply(*_leaves(problem), (*arguments, backend, wanted))
    else:
        loss = torch.ops.fastalign.align(*arguments, backend)[0]
    return loss


def _leaves(problem: Problem) -> tuple[Tensor | None, ...]:
    return tuple(getattr(problem, name) for name in _LEAVES)


def _wanted(problem: Problem) -> int:
    """Which gradients autograd will ask for: bits 1 (q_s), 2 (k_s), 4 (mix), 8 (sink_s)."""
    if not torch.is_grad_enabled():
        return 0
    return sum(1 << i for i, x in enumerate(_leaves(problem)) if x is not None and x.requires_grad)


def _arguments(problem: Problem) -> tuple[Any, ...]:
    return (*(getattr(problem, name) for name in _NAMES[:-1]), problem.spec.key)


def _problem(arguments: tuple[Any, ...]) -> Problem:
    values = dict(zip(_NAMES, arguments, strict=False))
    return Problem(**{**values, "spec": spec_from_key(values["spec"])})


@torch.library.impl("fastalign::align", "default")
def _align(*arguments: Any) -> Forward:
    problem = _problem(arguments)
    out: Forward = backend_for(arguments[_FIELDS], problem).forward(problem)
    return out


@torch.library.impl("fastalign::align_backward", "default")
def _align_backward(*arguments: Any) -> Gradients:
    grad, *saved = arguments[_FIELDS + 1 :]
    # the loss itself is of no use to a backward; the upstream gradient stands in its place
    forward = Forward(grad, *saved)
    problem = _problem(arguments)
    module = backend_for(arguments[_FIELDS], problem)
    gradients: Gradients = module.backward(problem, forward, grad)
    return gradients


@torch.library.register_fake("fastalign::align")
def _align_fake(*arguments: Any) -> Forward:
    return empty_forward(_problem(arguments))


@torch.library.register_fake("fastalign::align_backward")
def _align_backward_fake(*arguments: Any) -> Gradients:
    p = _problem(arguments)
    return Gradients(*(
        p.q_s.new_empty((0,), dtype=p.dtype) if x is None else x.new_empty(x.shape)
        for x in _leaves(p)
    ))  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.layout = [isinstance(x, Tensor) for x in inputs]
    ctx.scalars = [x for x in inputs if not isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """d loss / d (leaves that ask); None for everything else, the teacher included."""
    if grad is None or not any(ctx.needs_input_grad[i] for i in _AT):
        return (None,) * len(ctx.layout)
    count = sum(ctx.layout)
    tensors, scalars = iter(ctx.saved_tensors[:count]), iter(ctx.scalars)
    arguments = [next(tensors if is_tensor else scalars) for is_tensor in ctx.layout]
    gradients = torch.ops.fastalign.align_backward(*arguments, grad, *ctx.saved_tensors[count:])
    return _by_argument(ctx, gradients, len(ctx.layout))


def _by_argument(ctx: Any, gradients: tuple[Tensor, ...], count: int) -> tuple[Tensor | None, ...]:
    """The leaves' gradients where autograd wants them, among None for all other of ``count`` arguments."""
    out: list[Tensor | None] = [None] * count
    for at, gradient in zip(_AT, gradients, strict=True):
        out[at] = gradient if ctx.needs_input_grad[at] else None
    return tuple(out)


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "fused_attn_align_loss has no second derivative (create_graph=True, or a penalty on its "
        "gradient); allowed: first derivatives, or backend='reference', which torch differentiates "
        "as often as asked"
    )


torch.library.register_autograd("fastalign::align", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("fastalign::align_backward", _no_double_backward)


# ------------------------------------------------------------- loss and gradients together


@torch.library.impl("fastalign::align_with_gradients", "default")
def _together(*arguments: Any) -> tuple[Tensor, ...]:
    """(loss, *gradients) for an upstream gradient of 1; what is not wanted is empty."""
    problem, (backend, wanted) = _problem(arguments), arguments[_FIELDS:]
    module = backend_for(backend, problem)
    if hasattr(module, "align"):
        out, gradients = module.align(problem, wanted)
        return (out.loss, *gradients)
    out = module.forward(problem)
    gradients = module.backward(problem, out, torch.ones_like(out.loss))
    return (out.loss, *(
        x.to(problem.dtype) if wanted >> i & 1 else x.new_zeros((0,), dtype=problem.dtype)
        for i, x in enumerate(gradients)
    ))  # fmt: skip


@torch.library.register_fake("fastalign::align_with_gradients")
def _together_fake(*arguments: Any) -> tuple[Tensor, ...]:
    p, wanted = _problem(arguments), arguments[_FIELDS + 1]
    shapes = [
        x.shape if x is not None and wanted >> i & 1 else (0,) for i, x in enumerate(_leaves(p))
    ]
    return tuple(p.q_s.new_empty(shape, dtype=p.dtype) for shape in ((), *shapes))


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.inputs = len(inputs)
    ctx.save_for_backward(*(inputs[at] for at in _AT), *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _multiply(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * int(ctx.inputs)
    scaled = torch.ops.fastalign.scale_gradients(*ctx.saved_tensors, grad)
    return _by_argument(ctx, scaled, ctx.inputs)


def _scale(*arguments: Any, last: bool = False) -> tuple[Tensor, ...]:
    """Kept gradients times the upstream one, in the leaves' types; ``last``: nobody needs them again.

    Args:
        arguments: the leaves, their gradients, the upstream gradient.
    """
    leaves, gradients, grad = arguments[: len(_AT)], arguments[len(_AT) : -1], arguments[-1]
    return tuple(
        x.mul_(grad.to(x.dtype)) if last and x.dtype == dtype else cpu.scaled(x, grad, dtype)
        for x, dtype in zip(gradients, _dtypes(leaves, gradients), strict=True)
    )


def _dtypes(leaves: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...]) -> list[torch.dtype]:
    return [(x if leaf is None else leaf).dtype for leaf, x in zip(leaves, gradients, strict=True)]


def _is_last() -> bool:
    """Whether the backward that runs now frees the graph (no retain_graph), as torch.compile asks it, too.

    A torch without this question gets the answer that costs a copy.
    """
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


torch.library.impl("fastalign::scale_gradients", "default", _scale)


@torch.library.register_fake("fastalign::scale_gradients")
def _scale_fake(*arguments: Any) -> tuple[Tensor, ...]:
    leaves, gradients = arguments[: len(_AT)], arguments[len(_AT) : -1]
    return tuple(
        x.new_empty(x.shape, dtype=dtype)
        for x, dtype in zip(gradients, _dtypes(leaves, gradients), strict=True)
    )


torch.library.register_autograd(
    "fastalign::align_with_gradients", _multiply, setup_context=_keep_gradients
)
torch.library.register_autograd("fastalign::scale_gradients", _no_double_backward)


class _Together(torch.autograd.Function):
    """``align_with_gradients`` in eager mode, with the same derivative.

    torch fills in the defaults of every argument of an operator that is differentiated through its own
    registration; with this many arguments that costs a tenth of a millisecond a call.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *leaves, arguments = inputs
        loss: Tensor
        loss, *gradients = torch.ops.fastalign.align_with_gradients(*arguments)
        ctx.save_for_backward(*leaves, *gradients)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * (len(_AT) + 1)
        if torch.is_grad_enabled():  # create_graph: through the operator that has no derivative
            scaled = torch.ops.fastalign.scale_gradients(*ctx.saved_tensors, grad)
        else:
            scaled = _scale(*ctx.saved_tensors, grad, last=_is_last())
        wanted = ctx.needs_input_grad[: len(_AT)]
        return (*(x if asked else None for x, asked in zip(scaled, wanted, strict=True)), None)
