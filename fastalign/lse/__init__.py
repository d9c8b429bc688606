"""The log-sum-exp that an attention kernel computed anyway, as ``lse_s`` and ``lse_t`` take it.

With it the joint softmax needs no sweep of its own over the keys. ``dense`` and ``packed`` bring what a
kernel returned into this project's layout, ``attend`` runs a kernel and returns output and log-sum-exp,
``sdpa_lse`` catches that of ``scaled_dot_product_attention`` wherever it is called. docs/lse.md has the
conventions of each kernel.
"""

from .convert import add_sink, dense, packed
from .kernels import KERNELS, attend
from .watch import sdpa_lse

__all__ = ["KERNELS", "add_sink", "attend", "dense", "packed", "sdpa_lse"]
