"""The log-sum-exp of ``scaled_dot_product_attention``, which returns the output alone.

torch's fused kernels compute it all the same, for their backward. A dispatch mode sees the kernel run and
keeps its second result; what the caller gets is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Fused kernels whose second result is the log-sum-exp of the scores.
_FUSED = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
#: What attention consists of where no fused kernel takes it.
_PLAIN = (torch.ops.aten._safe_softmax.default, torch.ops.aten._softmax.default)


@dataclass
class Caught:
    """What the kernel of the last ``scaled_dot_product_attention`` kept.

    Attributes:
        lse: the kernel's own layout, to be read with ``dense``; None: no fused kernel ran, it had
            dropout, or it kept none (efficient attention without gradients).
    """

    lse: Tensor | None = None


@contextmanager
def sdpa_lse() -> Iterator[Caught]:
    """Inside, the log-sum-exp of every ``scaled_dot_product_attention`` is kept until the next one.

    Not for code that is being compiled: the mode would break the graph.

    Example:
        with sdpa_lse() as caught:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        lse = dense(caught.lse, q)
    """
    caught = Caught()
    with _Watch(caught):
        yield caught


class _Watch(TorchDispatchMode):
    def __init__(self, caught: Caught) -> None:
        super().__init__()
        self.caught = caught

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            # in inference mode it comes here whole, and elsewhere in the parts that it is made of
            self.caught.lse = None
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if func.namespace == "aten" and func._opname in _FUSED:
            lse = result[1]
            whole = lse is not None and lse.numel() > 0 and not _dropout(func, args, kwargs)
            self.caught.lse = lse.detach() if whole else None
        elif func in _PLAIN:
            self.caught.lse = None
        return result


def _dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The dropout of a call, by the schema's own order of arguments."""
    names = [argument.name for argument in func._schema.arguments]
    place = names.index("dropout_p")
    value = args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)
    return float(value)
