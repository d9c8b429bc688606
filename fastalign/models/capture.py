"""The attention function that sees q and k where they are final, and then runs the model's own.

transformers calls ``fn(module, query, key, value, attention_mask, ...)`` for the name that the
configuration holds, with q and k after their norms and after rotary embedding. One function is
registered per base (sdpa, eager, flash_attention_2, ...), with the base's own mask function,
without which the mask would silently be None. Outside a step, and for modules without a tap, it
only delegates: results are the base's, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..lse import sdpa_lse
from .calls import Call, is_causal, sequence_starts, usable_lse
from .links import grad_outside, note_grad, show_compiled
from .taps import is_watched, show


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
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
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
    flash = ALL_MASK_ATTENTION_FUNCTIONS[base] is flash_attention_mask
    AttentionInterface.register(name, _attention_function(base, flash))
    AttentionMaskInterface.register(name, _mask_function(ALL_MASK_ATTENTION_FUNCTIONS[base]))
    return name


def _mask_function(base: Callable[..., Any]) -> Callable[..., Any]:
    """The base's mask; it notes the grad mode, which a reentrant checkpoint hides later."""

    def make_mask(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        if config is not None and not torch.compiler.is_compiling():
            note_grad(config)
        return base(*args, **kwargs)

    return make_mask


def _attention_function(base: str, flash: bool) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Any:
        compiling = torch.compiler.is_compiling()
        watched = not compiling and is_watched(module)
        run = partial(_base_function(base, module), _as_base(module, base))
        found = None
        if watched and base == "sdpa":  # its kernel's log-sum-exp is not among its results
            with sdpa_lse() as caught:
                result = run(query, key, value, attention_mask, **kwargs)
            found = caught.lse
        else:
            result = run(query, key, value, attention_mask, **kwargs)
            if base == "flex_attention":
                found = result[1]
        if not compiling and not watched:
            return result
        call = Call(
            query=query,
            key=key,
            mask=attention_mask,
            scaling=kwargs.get("scaling"),
            softcap=kwargs.get("softcap"),
            window=kwargs.get("sliding_window"),
            causal=is_causal(module, kwargs),
            sinks=kwargs.get("s_aux"),
            flash=flash,
            positions=kwargs.get("position_ids") if flash else None,
            starts=sequence_starts(kwargs) if flash else None,
            lse=usable_lse(query, found),
            grad=torch.is_grad_enabled() if compiling else grad_outside(module),
        )
        if compiling:
            show_compiled(module, call)
        else:
            show(module, call)
        return result

    return attention


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
