"""DWA: dynamic weight average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._weighing import check_positive, softmax, who_is_there


@dataclass(frozen=True)
class DWA(Rule):
    r"""Weighs each loss by how slowly it falls.

    With the mean losses ``L_i(t-1)`` and ``L_i(t-2)`` of the last two epochs, and ``r_i = L_i(t-1) / L_i(t-2)``,

    ``w_i = n exp(r_i / T) / sum_j exp(r_j / T)``

    for the ``n`` tasks that are there. Until a task has seen two epochs, its ``r_i`` is 1.

    Args:
        temperature: ``T``; the larger, the more even the weights.
        epoch: number of steps over which losses are averaged: those of an epoch. A task counts the steps that held it.

    State:
        All ``[K]``: ``"total"`` and ``"count"`` of the epoch under way, ``"last"`` and ``"before"``, the means of the two
        epochs ahead of it, and ``"epochs"``, how many there have been.

    Raises:
        ValueError: for settings outside these ranges.

    Example:
        >>> import torch, gradsurgery as gs
        >>> rule = gs.DWA()
        >>> state = rule.init(["slow", "fast"], ["model"])
        >>> for losses in ([1.0, 1.0], [0.9, 0.1], [0.8, 0.05]):
        ...     weights, state = rule.weigh(torch.tensor(losses), state)
        >>> weights
        tensor([1.1974, 0.8026])

    Reference:
        Liu, Johns, Davison, *End-to-End Multi-Task Learning with Attention*, CVPR 2019 (Dynamic Weight Average;
        arXiv:1803.10704).

    Note:
        ``epoch=1`` compares single steps, whose losses differ by their batches too: set the steps of an epoch, as the paper
        does. A loss whose mean was zero has no ratio, and counts as 1.
    """

    scale_equivariant: ClassVar[bool] = True

    temperature: float = 2.0
    epoch: int = 1

    def __post_init__(self) -> None:
        check_positive(temperature=self.temperature)
        if isinstance(self.epoch, bool) or not isinstance(self.epoch, int) or self.epoch < 1:
            raise ValueError(f"`epoch` must be a number of steps, at least 1. Found epoch={self.epoch!r}.")

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        keys = ("total", "count", "last", "before", "epochs")
        return {key: torch.zeros(len(tasks), device=device, dtype=dtype) for key in keys}

    def weigh(
        self, losses: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        there = who_is_there(losses, active)
        total, count = state["total"], state["count"]
        over = there & (count >= self.epoch)
        before = torch.where(over, state["last"], state["before"])
        last = torch.where(over, total / count.clamp_min(1), state["last"])
        epochs = state["epochs"] + over
        known = (epochs >= 2) & (before != 0)
        ratio = torch.where(known, last / torch.where(known, before, 1.0), 1.0)
        weights = softmax(ratio / self.temperature, there) * there.sum()
        new = {
            "total": torch.where(over, 0.0, total) + torch.where(there, losses, 0.0),
            "count": torch.where(over, 0.0, count) + there,
            "last": last,
            "before": before,
            "epochs": epochs,
        }
        return torch.where(there, weights, 1.0).to(losses.dtype), new
