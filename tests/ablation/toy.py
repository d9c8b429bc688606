"""A task of milliseconds: a linear model on random data, with noise that is a function of the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    steps: int = 12
    lr: float = 0.1
    noise: float = 0.0


class ToyTask:
    Settings: ClassVar[type] = Settings
    SOURCES: ClassVar[tuple[str, ...]] = ("tests.ablation.toy",)

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings, self.seed, self.steps = settings, seed, settings.steps
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Linear(4, 1, bias=False)
        self.model.weight.data.copy_(torch.randn(1, 4, generator=generator))
        self.truth = torch.ones(4, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr)

    def step(self, number: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        x = torch.randn(8, 4, generator=generator)
        y = x @ self.truth + self.settings.noise * torch.randn(8, 1, generator=generator)
        loss = (self.model(x) - y).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"mse": loss.item()}

    def score(self, *, final: bool) -> dict[str, float]:
        error = (self.model.weight.detach() - self.truth.T).square().mean().item()
        return {"closeness": 1 / (1 + error), **({"extra": error} if final else {})}

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def weights(self) -> Mapping[str, Tensor]:
        return self.model.state_dict()
