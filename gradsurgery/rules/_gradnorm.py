"""GradNorm: gradient normalization for adaptive loss balancing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._rule import Rule, State

if TYPE_CHECKING:
    from .._step import Step


@dataclass(frozen=True)
class GradNorm(Rule):
    r"""Learns weights of the losses, so that tasks train at similar rates: ``sum_k w_k L_k``.

    With the norms ``n_k = ||w_k g_k||`` of the gradients of the shared parameters, and the rates ``r_k``, which are
    ``L_k / L_k(0)`` divided by their mean over the tasks, each step descends

    ``sum_k | n_k - mean(n) r_k^alpha |``

    with respect to ``w``, where ``mean(n) r_k^alpha`` counts as constant: ``w_k <- w_k - lr sign(...) ||g_k||``; and
    makes the ``w`` add up to the number of tasks again.

    Args:
        alpha: strength of the pull back to a common rate, at least 0. In the paper 1.5, 0.12 where tasks are alike.
        lr: learning rate of the weights.
        smallest: weights stay above this.

    State:
        ``"weight"``: ``[K]``, the weights ``w``. ``"initial"``: ``[K]``, the losses ``L(0)`` of each task's first step;
        zero before that.

    Raises:
        ValueError: for settings outside these ranges.

    Example:
        >>> import torch, gradsurgery as gs
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.GradNorm(), model=model)
        >>> out = model(torch.ones(1, 2)).sum()
        >>> opt.backward({"steep": 2 * out + 10, "flat": out + 20})
        >>> opt.step(); opt.zero_grad()
        >>> opt.rule_state["weight"]
        tensor([0.9336, 1.0664], dtype=torch.float64)

    Reference:
        Chen, Badrinarayanan, Lee and Rabinovich, *GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
        Multitask Networks*, ICML 2018 (arXiv:1711.02257), Equations 1 and 2, Algorithm 1.

    Note:
        The weights multiply the losses, so that heads are weighted too, as in the paper. Norms are over all parameters that
        two tasks or more reach, rather than the last shared layer only. The paper lets a weight become negative; ours stop
        at ``smallest``. Absent tasks keep their weight, and the others' add up to what they had. Losses should be positive.
    """

    alpha: float = 1.5
    lr: float = 0.025
    smallest: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"`alpha` must be at least 0. Found alpha={self.alpha!r}.")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"`lr` must be positive. Found lr={self.lr!r}.")
        if not 0 < self.smallest < 1:
            raise ValueError(f"`smallest` must be in (0, 1). Found smallest={self.smallest!r}.")

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        weight = torch.ones(len(tasks), device=device, dtype=dtype)
        return {"weight": weight, "initial": torch.zeros_like(weight)}

    def weigh(
        self, losses: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        weight = state["weight"].to(losses)
        return weight if active is None else torch.where(active, weight, 1.0), state

    def observe(self, step: Step, state: State) -> State:
        weight, losses = state["weight"], step.losses.to(state["weight"])
        seen = losses.isfinite()
        initial = torch.where(seen & (state["initial"] == 0), losses, state["initial"])
        # Gradients are those of the weighted losses.
        square = torch.where(step.active, step.gram.diagonal(dim1=-2, dim2=-1), 0.0).sum(0).to(weight)
        norm = square.sqrt()
        here = seen & (square > 0) & square.isfinite()
        count = here.sum()
        rate = torch.where(initial != 0, losses / initial, 1.0).clamp_min(0)
        mean_rate = torch.where(here, rate, 0.0).sum() / count
        target = torch.where(here, norm, 0.0).sum() / count * (rate / mean_rate.clamp_min(1e-30)) ** self.alpha
        new = (weight - self.lr * (norm - target).sign() * norm / weight).clamp_min(self.smallest)
        total = torch.where(here, weight, 0.0).sum() / torch.where(here, new, 0.0).sum()
        return {"weight": torch.where(here, new * total, weight), "initial": initial}
