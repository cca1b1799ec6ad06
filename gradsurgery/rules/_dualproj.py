"""DualProj: the average gradient, projected so that it conflicts with no task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._complementarity import complementary
from ._solvers import directions
from ._weights import Weighted, Weights, diagonal, shares


@dataclass(frozen=True)
class DualProj(Weighted, Rule):
    r"""Projects the average of the tasks' gradients onto the cone of directions that conflict with no task.

    ``sum_i g'_i = argmin ||d - sum_i w_i g_i||^2`` subject to ``<d, g_j> >= 0`` for all tasks ``j``; this is
    ``g'_i = (w_i + x_i) g_i`` with multipliers ``x >= 0``.

    Args:
        weights: preferences ``w`` by task, in proportion to which the gradients are averaged; 1 for tasks that are not
            named. None: equal ones.

    Raises:
        ValueError: for weights that are negative, and for names that are no tasks.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[1.0, 1.0], [-3.0, 0.0]]), gs.DualProj())
        tensor([-0.7500,  0.7500])

    Reference:
        Lopez-Paz and Ranzato, *Gradient Episodic Memory for Continual Learning*, NeurIPS 2017 (arXiv:1706.08840), Equation
        11; named and put to this use by Quinton and Rey, *Jacobian Descent for Multi-Objective Optimization*, 2024
        (arXiv:2406.16232), Section 3.

    Note:
        TorchJD adds 1e-4 to the diagonal of the normalised Gram matrix by default; we change nothing.
    """

    scale_equivariant: ClassVar[bool] = True
    non_conflicting: ClassVar[bool] = True

    weights: Weights | None = None

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        cosines, norms, there = directions(gram, active)
        weights = shares(gram, state, active)
        average = (weights * norms * there).unsqueeze(1)
        added = complementary(cosines, torch.bmm(average, cosines), "DualProj").squeeze(1)
        return diagonal(weights + added / norms, gram, active), state
