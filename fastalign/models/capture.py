"""The attention function that sees q and k where they are final, and then runs the model's own.

transformers calls ``fn(module, query, key, value, attention_mask, ...)`` for the name that the
configuration holds, with q and k after their norms and after rotary embedding. One function is
registered per base (sdpa, eager, flash_attention_2, ...), with the base's own mask function,
without which the mask would silently be None. Outside a step, and for modules without a tap, it
only delegates: results are the base's, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One attention call, as seen by a tap.

    Attributes:
        query: [B, H, T, D], key: [B, K, T, D], any strides; keys are not repeated.
        mask: what the model's mask function made: bool or float [B or 1, 1, T, T], [B, T], or None.
        scaling, softcap, window, causal: as the module passes them (None: not passed).
        sinks: [H] or None.
        grad: whether gradients were enabled where the masks were made, outside any checkpoint.
    """

    query: Tensor
    key: Tensor
    mask: Any
    scaling: float | None
    softcap: float | None
    window: int | None
    causal: bool
    sinks: Tensor | None
    grad: bool


Tap = Callable[[Call], None]

_taps: dict[nn.Module, Tap] = {}
_grad_outside: dict[int, bool] = {}  # id of a text configuration -> grad mode of its forward


@contextmanager
def tapped(taps: Mapping[nn.Module, Tap]) -> Iterator[None]:
    """``taps`` see the calls of their modules inside.

    Raises:
        RuntimeError: a module is tapped already (steps do not nest).
    """
    for module in taps:
        if module in _taps:
            raise RuntimeError(
                f"layer {getattr(module, 'layer_idx', '?')} is captured already: a step inside a "
                "step; allowed: one step at a time for a model"
            )
    _taps.update(taps)
    try:
        yield
    finally:
        for module in taps:
            del _taps[module]


def capture_name(base: str) -> str:
    """The name under which the capture delegates to ``base``; registers it on its first use.

    The names avoid "sdpa", "flash", "flex_attention" and "/", on which transformers branches. A
    base that is a capture already (a nested step) stays what it is.
    """
    if base.startswith("fastalign_"):
        return base
    return _register(base)


@cache
def _register(base: str) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if base != "eager" and base not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        raise ValueError(
            f"the model's attention implementation is {base!r}; allowed: 'eager', "
            f"{', '.join(sorted(map(repr, ALL_ATTENTION_FUNCTIONS.valid_keys())))}"
        )
    short = {"sdpa": "s", "eager": "e", "flash_attention_2": "f2", "flash_attention_3": "f3"}
    name = f"fastalign_{short.get(base) or 'x' + base.encode().hex()}"
    if base not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        raise ValueError(
            f"the attention implementation {base!r} has no mask function of its own, so that the "
            "model runs without a mask; allowed: implementations registered with "
            "AttentionMaskInterface too"
        )
    AttentionInterface.register(name, _attention_function(base))
    AttentionMaskInterface.register(name, _mask_function(ALL_MASK_ATTENTION_FUNCTIONS[base]))
    return name


def _mask_function(base: Callable[..., Any]) -> Callable[..., Any]:
    """The base's mask; it notes the grad mode, which a reentrant checkpoint hides later."""

    def make_mask(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        if config is not None and not torch.compiler.is_compiling():
            _grad_outside[id(config)] = torch.is_grad_enabled()
        return base(*args, **kwargs)

    return make_mask


def _attention_function(base: str) -> Callable[..., Any]:
    # made here, not by a decorator: it imports torch._dynamo, and with it triton
    show: Callable[..., None] = torch.compiler.disable(_show)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Any:
        show(module, query, key, attention_mask, kwargs)
        return _base_function(base, module)(
            _as_base(module, base), query, key, value, attention_mask, **kwargs
        )

    return attention


def _show(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]
) -> None:
    """Let the module's tap see the call, if it has one.

    A compiled layer has a graph break here. The look-up is on this side of it: layers share compiled
    code, and a tap found while one is traced would be called for all of them. A checkpoint runs the
    layer again during backward; its first run was the one that counts.
    """
    tap = _taps.get(module)
    if tap is not None and torch._C._current_graph_task_id() == -1:
        tap(_call(module, query, key, mask, kwargs))


def _call(module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]) -> Call:
    causal = kwargs.get("is_causal")
    return Call(
        query=query,
        key=key,
        mask=mask,
        scaling=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        window=kwargs.get("sliding_window"),
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        sinks=kwargs.get("s_aux"),
        grad=_grad_outside.get(id(module.config), torch.is_grad_enabled()),
    )


def _base_function(base: str, module: nn.Module) -> Callable[..., Any]:
    """The base's function; "eager" lives in each modeling file, with its softcap and sinks."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if base == "eager":
        for cls in type(module).__mro__:
            function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
            if function is not None:
                return cast(Callable[..., Any], function)
        raise RuntimeError(
            f"{type(module).__name__} has no eager_attention_forward beside it; allowed: a model "
            "whose modeling file follows transformers' attention interface, or another base (sdpa, "
            "flash)"
        )
    return cast(Callable[..., Any], ALL_ATTENTION_FUNCTIONS[base])


class _Renamed:
    """A module whose configuration names the base again: the flash functions read it from there."""

    def __init__(self, inner: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _inner=inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _as_base(module: Any, base: str) -> Any:
    if base in ("sdpa", "eager"):
        return module
    return _Renamed(module, config=_Renamed(module.config, _attn_implementation=base))
