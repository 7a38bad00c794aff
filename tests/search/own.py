"""A user's own model and loop, as small as can be: for tests that run `mutune.search.run`."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mutune

SPACE: dict[str, Any] = {"learning_rate": {"low": 1e-3, "high": 0.1}}


class Net(nn.Module):
    """(B, 4) → (B, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.scale = mutune.Multiplier("output")

    def forward(self, x: Tensor) -> Tensor:
        """Two hidden layers."""
        return self.last(self.scale(F.relu(self.hidden(F.relu(self.first(x))))))


def build(width: int) -> nn.Module:
    """The model at a width."""
    return Net(width)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """A task that is learnt in a few steps."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :1].tanh() + x[:, 1:2].abs()


def train(model: nn.Module, optimizer: Any, seed: int, report: Callable[[int, float], None], steps: int = 8) -> float:
    """An ordinary loop with a linear decay to zero."""
    x, y = batch(seed)
    for step in range(1, steps + 1):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mutune.set_rates(optimizer, 1 - step / steps)
        report(step, loss.item())
    x, y = batch(1000)
    return F.mse_loss(model(x), y).item()


def slowly(model: nn.Module, optimizer: Any, seed: int, report: Callable[[int, float], None]) -> float:
    """The same, with time to be killed in."""
    for step in range(10):
        report(step, 1.0)
        time.sleep(0.1)
    return train(model, optimizer, seed, report)


def search(out: Path, build: Any = build, train: Any = train, space: Any = SPACE, **arguments: Any) -> Any:
    """A search of four trials in this process, without a ladder."""
    given = {"base": 16, "n_trials": 4, "workers": 0, "name": "mine", "out": out, **arguments}
    return mutune.search.run(build, train, space, **given)


def best_of(losses: list[float]) -> float:
    """The lowest finite one."""
    return min(loss for loss in losses if math.isfinite(loss))
