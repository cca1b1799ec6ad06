"""One run: a small model, trained on all targets with a rule, or on one alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import gradsurgery as gs

from .data import TARGETS, Data, Part


@dataclass(frozen=True)
class Settings:
    """What all runs have in common; nothing of it was chosen by looking at a result."""

    steps: int = 2000
    batch: int = 256
    width: int = 256
    lr: float = 1e-3
    train: int = 40_000
    valid: int = 5_000
    test: int = 10_000

    def quick(self) -> Settings:
        """A tenth of it."""
        return replace(self, steps=200, train=8_000, valid=1_000, test=2_000)


class Model(nn.Module):
    """A trunk of three layers, and a linear head for each target."""

    def __init__(self, inputs: int, width: int, targets: int) -> None:
        super().__init__()
        sizes = [inputs, width, width, width]
        self.trunk = nn.Sequential(*(part for i, o in itertools.pairwise(sizes) for part in (nn.Linear(i, o), nn.SiLU())))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(targets))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, F]`` → ``[n, K]``."""
        hidden = self.trunk(x)
        return torch.cat([head(hidden) for head in self.heads], 1)


class Training:
    """A model in training.

    Args:
        data: the molecules.
        rule: what operates on the gradients of all targets; the index of one target, to train on that alone; or None, to
            train on the mean of all without anything of this library.
        settings: of the run.
        seed: of the weights, batches and random rules: the same batches for all rules.
    """

    def __init__(self, data: Data, rule: gs.Rule | int | None, settings: Settings, seed: int) -> None:
        torch.manual_seed(seed)
        self.data, self.settings = data, settings
        self.targets = [rule] if isinstance(rule, int) else list(range(len(TARGETS)))
        self.model = Model(data.train.x.shape[1], settings.width, len(self.targets))
        self._generator = torch.Generator().manual_seed(seed)
        adam = torch.optim.Adam(self.model.parameters(), lr=settings.lr)
        self._opt: torch.optim.Optimizer = adam
        if isinstance(rule, gs.Rule):
            mixes = type(rule).mix is not gs.Rule.mix  # otherwise, a step is one backward pass
            # Every target has a head of its own: only the trunk is operated on.
            self._opt = gs.SurgeryOptimizer(
                adam, rule, model=self.model, tasks=list(TARGETS), source="batched", measure=mixes, seed=seed
            )
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._opt, settings.steps)

    def step(self) -> None:
        """One batch."""
        train = self.data.train
        chosen = torch.randint(len(train.x), (self.settings.batch,), generator=self._generator)
        found, wanted = self.model(train.x[chosen]), train.y[chosen][:, self.targets]
        losses = (found - wanted).square().mean(0)
        if isinstance(self._opt, gs.SurgeryOptimizer):
            self._opt.backward(list(losses.unbind()))
        else:
            losses.mean().backward()
        self._opt.step()
        self._opt.zero_grad()
        self._schedule.step()

    @torch.no_grad()
    def errors(self, part: Part) -> list[float]:
        """The mean absolute error of each target, in its unit."""
        apart = (self.model(part.x) - part.y[:, self.targets]).abs().mean(0)
        result: list[float] = (apart * self.data.unit[self.targets]).tolist()
        return result


def train(
    data: Data, rule: gs.Rule | int | None, settings: Settings, seed: int, tick: Callable[[], None] | None = None
) -> dict[str, list[float] | float]:
    """The errors of a run's end on the validation and test sets, and how long it took."""
    training = Training(data, rule, settings, seed)
    start = time.perf_counter()
    for _ in range(settings.steps):
        training.step()
        if tick is not None:
            tick()
    seconds = time.perf_counter() - start
    return {"valid": training.errors(data.valid), "test": training.errors(data.test), "seconds": seconds}
