"""Random inputs for the tests: one call's tensors and masks, of any shape and difficulty."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastalign import AlignSpec, fused_attn_align_loss


@dataclass
class Inputs:
    """The arguments of one call, so that a test can run it on several backends and dtypes."""

    q_s: Tensor
    k_s: Tensor
    q_t: Tensor | None
    k_t: Tensor | None
    keywords: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another floating-point type."""

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return Inputs(
            cast(self.q_s),
            cast(self.k_s),
            cast(self.q_t),
            cast(self.k_t),
            {name: cast(value) for name, value in self.keywords.items()},
        )

    def run(self, spec: AlignSpec | str, backend: str, **more: Any) -> list[Tensor]:
        """[loss, dq_s, dk_s, (dmix), (dsink_s)]: one forward and backward on fresh leaves."""
        q = self.q_s.detach().clone().requires_grad_()
        k = self.k_s.detach().clone().requires_grad_()
        keywords = {**self.keywords, **more}
        leaves = [q, k]
        for name in ("mix", "sink_s"):
            if keywords.get(name) is not None:
                keywords[name] = keywords[name].detach().clone().requires_grad_()
                leaves.append(keywords[name])
        loss = fused_attn_align_loss(
            q, k, self.q_t, self.k_t, spec=spec, backend=backend, **keywords
        )
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def random_inputs(
    spec: AlignSpec,
    *,
    batch: int = 2,
    length: int = 37,
    heads: tuple[int, int] = (4, 6),
    key_heads: tuple[int, int] = (2, 3),
    sizes: tuple[int, int] = (8, 5),
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    extras: bool = True,
) -> Inputs:
    """A batch with two images, an image, padding on both ends, weights, blocks, sinks and caps."""
    h_s, h_t = heads
    k_s, k_t = key_heads
    if spec.heads == "each":
        h_t, k_t = h_s, 1
    visual = torch.zeros(batch, length, dtype=torch.bool)
    valid = torch.ones(batch, length, dtype=torch.bool)
    for b in range(batch):
        start = 3 + 5 * (b % 2)
        visual[b, start : start + length // 3] = True
        if b % 2 == 0:
            visual[b, -7:-3] = True
            valid[b, :2] = False
        else:
            valid[b, -3:] = False
    keywords: dict[str, Any] = {"visual_mask": visual, "attention_mask": valid}
    if spec.rows == "given":
        query = torch.zeros_like(visual)
        query[:, length // 2 :] = True
        keywords["query_mask"] = query
    if spec.heads == "mix":
        keywords["mix"] = torch.randn(h_s, h_t, dtype=dtype)
    if extras:
        keywords["row_weight"] = torch.rand(batch, length, dtype=dtype)
        keywords["row_weight"][:, length // 2 + 1] = 0
        keywords["block_ids"] = torch.where(visual, 0, -1)
        keywords["softcap_s"], keywords["softcap_t"] = 3.0, 5.0
        if spec.normalize != "none":
            keywords["sink_s"] = torch.randn(h_s, dtype=dtype)
            keywords["sink_t"] = torch.randn(h_t, dtype=dtype)
    return Inputs(
        scale * torch.randn(batch, h_s, length, sizes[0], dtype=dtype),
        scale * torch.randn(batch, k_s, length, sizes[0], dtype=dtype),
        scale * torch.randn(batch, h_t, length, sizes[1], dtype=dtype),
        scale * torch.randn(batch, k_t, length, sizes[1], dtype=dtype),
        keywords,
    )


def every_spec(sinks: tuple[float | None, ...] = (None, 0.5)) -> list[AlignSpec]:
    """Every combination of the fields that a spec allows."""
    return list(_every_spec(sinks))


def _every_spec(sinks: tuple[float | None, ...]) -> Iterator[AlignSpec]:
    for heads, normalize, compare, divergence, sink in itertools.product(
        ("mean", "each", "mix"),
        ("joint", "visual", "visual_per_head", "none"),
        ("map", "row", "pooled"),
        ("cosine", "kl", "reverse_kl", "js", "mse"),
        sinks,
    ):
        try:
            yield AlignSpec(
                heads=heads,
                normalize=normalize,
                compare=compare,
                divergence=divergence,
                sink_sigma=sink,
            )
        except ValueError:
            continue


def spec_id(spec: AlignSpec) -> str:
    """A short name for a test's id."""
    sink = "" if spec.sink_sigma is None else "-sink"
    return f"{spec.heads}-{spec.normalize}-{spec.compare}-{spec.divergence}{sink}"


def relative_error(x: Tensor, exact: Tensor, size: float = 0.0) -> float:
    """max |x - exact| over max |exact| or ``size``, the larger; absolute where all is below 1e-300."""
    if not x.numel():
        return 0.0
    size = max(size, exact.abs().max().item(), 1e-300)
    return (x.double() - exact.double()).abs().max().item() / size


def relative_errors(result: list[Tensor], exact: list[Tensor]) -> list[float]:
    """``relative_error`` of everything that ``Inputs.run`` returns.

    A sink's gradient is a sum over rows that may cancel (to exactly 0 for single heads that are
    renormalised): what counts is the size of its terms, for which the rows of dq stand.
    """
    rows = exact[1].abs().amax(-1).sum((0, 2)).max().item() if exact[1].numel() else 0.0
    return [
        relative_error(x, y, rows if y.dim() == 1 else 0.0)
        for x, y in zip(result, exact, strict=True)
    ]
