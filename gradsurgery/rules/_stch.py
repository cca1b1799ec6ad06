"""STCH: smooth Tchebycheff scalarization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._weighing import check_positive, softmax, who_is_there


@dataclass(frozen=True)
class STCH(Rule):
    r"""Minimises a smooth maximum of the losses above their ideal values, each times a preference:

    ``mu log sum_i exp(p_i (L_i - z_i) / mu)``,

    whose gradient weighs each loss by ``w_i = p_i softmax(p (L - z) / mu)_i``. Unlike a weighted sum, it reaches every
    Pareto optimal solution by some preference, also where the Pareto front is not convex.

    Args:
        mu: smoothness. As it goes to zero, only the worst task counts; where it is large, all do alike.
        preference: ``p``, a positive number for each task, in their order; None means equal ones. It is divided by its sum
            over the tasks that are there.
        ideal: ``z``, a number for each task, in their order, at most the best loss that can be reached; None means zeros.

    State:
        ``"preference"`` and ``"ideal"``, ``[K]``, where they are given.

    Raises:
        ValueError: for settings out of range, or of another number than there are tasks.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.STCH(mu=1.0).weigh(torch.tensor([1.0, 1.0]), {})[0]
        tensor([0.2500, 0.2500])
        >>> gs.STCH(mu=0.1).weigh(torch.tensor([1.0, 2.0]), {})[0]
        tensor([0.0033, 0.4967])

    Reference:
        Lin et al., *Smooth Tchebycheff Scalarization for Multi-Objective Optimization*, ICML 2024 (arXiv:2402.19078),
        there STCH.

    Note:
        It compares losses with each other: they should be of one scale. The authors' multi-task experiments take the log of
        each loss over its value after some warm-up epochs, and multiply by the number of tasks; divide your losses so, and
        choose ``mu`` to match.
    """

    scale_equivariant: ClassVar[bool] = True

    mu: float = 1.0
    preference: Sequence[float] | None = None
    ideal: Sequence[float] | None = None

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.preference is None and self.ideal is None

    def __post_init__(self) -> None:
        check_positive(mu=self.mu)
        for name in ("preference", "ideal"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(float(x) for x in value))
        if self.preference is not None and not all(0 < p < float("inf") for p in self.preference):
            raise ValueError(f"`preference` must be positive numbers. Found {self.preference!r}.")
        if self.ideal is not None and not all(abs(z) < float("inf") for z in self.ideal):
            raise ValueError(f"`ideal` must be finite numbers. Found {self.ideal!r}.")

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        state: State = {}
        for name, values in (("preference", self.preference), ("ideal", self.ideal)):
            if values is not None:
                if len(values) != len(tasks):
                    raise ValueError(
                        f"STCH's `{name}` must have one number for each of the {len(tasks)} tasks {list(tasks)}. "
                        f"Found {len(values)}: {values!r}."
                    )
                state[name] = torch.tensor(values, device=device, dtype=dtype)
        return state

    def weigh(
        self, losses: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        there = who_is_there(losses, active)
        preference = torch.where(there, state.get("preference", torch.ones_like(losses)), 0.0)
        preference = preference / preference.sum().clamp_min(torch.finfo(losses.dtype).tiny)
        above = losses - state.get("ideal", torch.zeros_like(losses))
        weights = preference * softmax(preference * above / self.mu, there)
        return torch.where(there, weights, 1.0).to(losses.dtype), state
