"""Muon in float32: momentum whose matrix update is orthogonalised (Jordan et al., 2024).

torch.optim.Muon runs its Newton-Schulz iteration in bfloat16, which a CPU without bfloat16
instructions emulates: for the shapes teacher the optimiser step then takes as long as forward and
backward together. This one iterates in float32 and on all matrices of one shape at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For 2-D parameters only. ``lr`` is on AdamW's scale: updates get AdamW's typical size."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            same_shape: defaultdict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[parameter.shape].append(parameter)
            for shape, parameters in same_shape.items():
                updates = orthogonalise(
                    torch.stack([self._nesterov(p, group["momentum"]) for p in parameters])
                )
                # 0.2 sqrt(longest side) gives the entries the root mean square of AdamW's steps.
                size = 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * size)

    def _nesterov(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["average"] = torch.zeros_like(parameter)
        average = state["average"].lerp_(parameter.grad, 1 - momentum)
        ahead: Tensor = parameter.grad.lerp(average, momentum)
        return ahead


def orthogonalise(matrices: Tensor) -> Tensor:
    """[N, rows, columns] -> each near U V^T of its singular value decomposition."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x: Tensor = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide else x.mT
