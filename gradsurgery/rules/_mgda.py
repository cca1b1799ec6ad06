"""MGDA: the multiple-gradient descent algorithm."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .._rule import Rule, State

_CHECK_EVERY = 8


@dataclass(frozen=True)
class MGDA(Rule):
    r"""The shortest vector in the convex hull of the tasks' gradients: ``g'_i = w_i g_i`` with

    ``w = argmin || sum_i w_i g_i ||^2``  subject to  ``w >= 0``, ``sum_i w_i = 1``.

    Its negative is a direction of descent for all tasks, and zero at a Pareto-stationary point. For two tasks
    ``w_1 = clip((G_22 - G_12) / (G_11 + G_22 - 2 G_12), 0, 1)``.

    Args:
        tolerance: the solver stops once no exchange between two weights lowers the objective at a rate above
            ``tolerance`` times the largest squared norm.
        iterations: at most this many exchanges. On the CPU the solver stops early, elsewhere it runs ``iterations``
            exchanges without looking, since looking would wait for the device.

    Raises:
        ValueError: for settings that are not positive.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), gs.MGDA())
        tensor([0.4000, 0.8000])

    Reference:
        Désidéri, *Multiple-Gradient Descent Algorithm*, C. R. Math. 2012; Sener and Koltun, *Multi-Task Learning as
        Multi-Objective Optimization*, NeurIPS 2018, Algorithm 2.

    Note:
        The 2018 paper solves this with Frank-Wolfe steps towards one vertex, which converge slowly near a face. We move
        weight between the pair of tasks that violates optimality most, with the same exact line search: the solution is
        the same, and convergence is linear. For two tasks the first exchange is exact.
    """

    tolerance: float = 1e-10
    iterations: int = 512

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(f"`tolerance` must be positive. Found tolerance={self.tolerance!r}.")
        if not self.iterations >= 1:
            raise ValueError(f"`iterations` must be at least 1. Found iterations={self.iterations!r}.")

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        weights = self._solve(gram, active)
        if active is not None:
            weights = torch.where(active, weights, 1.0)
        return torch.diag_embed(weights), state

    def _solve(self, gram: Tensor, active: Tensor | None) -> Tensor:
        if active is None:
            active = torch.ones(gram.shape[:2], dtype=torch.bool, device=gram.device)
        largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
        gram = gram / torch.where(largest > 0, largest, 1.0)[..., None]  # scale does not matter, range does
        weights = active / active.sum(-1, keepdim=True).clamp(min=1).to(gram.dtype)
        slope = (gram @ weights[..., None]).squeeze(-1)  # half the gradient of the objective in w
        tolerance = max(self.tolerance, 4 * torch.finfo(gram.dtype).eps)
        for iteration in range(self.iterations):
            low, to = slope.masked_fill(~active, torch.inf).min(-1, keepdim=True)
            high, source = slope.masked_fill(weights <= 0, -torch.inf).max(-1, keepdim=True)
            gap = high - low  # -inf or nan where a group has no active task
            if gram.device.type == "cpu" and iteration % _CHECK_EVERY == 1 and not (gap > tolerance).any():
                break
            row_to, row_source = (gram.take_along_dim(i[..., None], 1).squeeze(1) for i in (to, source))
            curvature = row_to.gather(1, to) + row_source.gather(1, source) - 2 * row_to.gather(1, source)
            available = weights.gather(1, source)
            step = torch.where(gap > curvature * available, available, gap / curvature)
            step = torch.where(gap > 0, step, 0.0)
            weights = weights.scatter_add(1, to, step).scatter_add(1, source, -step)
            slope = slope + step * (row_to - row_source)
        else:
            if gram.device.type == "cpu":
                warnings.warn(
                    f"MGDA stopped after {self.iterations} iterations with an optimality gap of {gap.max().item():.1e} "
                    f"(tolerance {tolerance:.1e}): raise `iterations` or `tolerance`.",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return weights
