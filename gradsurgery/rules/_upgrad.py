"""UPGrad: unconflicting projection of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._complementarity import complementary
from ._solvers import directions
from ._weights import Weighted, Weights, operated, shares


@dataclass(frozen=True)
class UPGrad(Weighted, Rule):
    r"""Projects each task's gradient onto the cone of directions that conflict with no task, and averages the results.

    ``g'_i = w_i pi(g_i)``, where ``pi(g) = argmin ||d - g||^2`` subject to ``<d, g_j> >= 0`` for all tasks ``j``.

    The combined gradient conflicts with no task, and grows in proportion to each task's gradient.

    Args:
        weights: preferences ``w`` by task, in proportion to which the projections are averaged; 1 for tasks that are not
            named. None: equal ones.

    Raises:
        ValueError: for weights that are negative, and for names that are no tasks.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), gs.UPGrad())
        tensor([-0.2500,  0.7500])

    Reference:
        Quinton and Rey, *Jacobian Descent for Multi-Objective Optimization*, 2024 (arXiv:2406.16232), Equation 4;
        Proposition 1 for the dual.

    Note:
        The dual problem ``min v^T G v`` subject to ``v >= u`` is solved for unit gradients, without changing it. TorchJD
        adds 1e-4 to the diagonal of the normalised Gram matrix by default, so that its result may conflict a little with
        tasks whose gradients are short.
    """

    scale_equivariant: ClassVar[bool] = True
    non_conflicting: ClassVar[bool] = True

    weights: Weights | None = None

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        cosines, norms, _ = directions(gram, active)
        weights = shares(gram, state, active)
        # pi(g_i) = g_i + sum_j x_j g_j, with x >= 0 that is zero unless <pi(g_i), g_j> is.
        mixing = complementary(cosines, cosines, "UPGrad")
        mixing.mul_((weights * norms).unsqueeze(-1)).mul_(norms.reciprocal().unsqueeze(-2))
        mixing.diagonal(dim1=-2, dim2=-1).add_(weights)
        return operated(mixing, gram, active), state
