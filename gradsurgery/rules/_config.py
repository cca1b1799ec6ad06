"""ConFIG: conflict-free inverse gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._solvers import directions, least_squares
from ._weights import Weighted, Weights, diagonal


@dataclass(frozen=True)
class ConFIG(Weighted, Rule):
    r"""The direction whose cosines with all tasks' gradients are equal, as long as the tasks' gradients along it together:

    ``u = normalise(U^+ 1)``,  ``sum_i g'_i = (sum_i <g_i, u>) u``,

    where ``U^+`` is the pseudo-inverse of the matrix of unit gradients.

    Args:
        weights: by task, to which the cosines are proportional, instead of equal; 1 for tasks that are not named.

    Raises:
        ValueError: for weights that are negative, and for names that are no tasks.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), gs.ConFIG())
        tensor([2., 2.])

    Reference:
        Liu, Chu and Thuerey, *ConFIG: Towards Conflict-Free Training of Physics Informed Neural Networks*, ICLR 2025
        (arXiv:2408.11104), Equations 2 and 3.

    Note:
        Zero gradients take no part. Of gradients that depend on each other, directions whose squared length is below 5e-7
        of the longest count as none: Gram matrices may be from products in float32. TorchJD's are as
        exact as its dtype, and so is what it makes of them. Where the gradients cancel, such as two
        opposite ones, there is no such direction, and the result is zero.
    """

    scale_equivariant: ClassVar[bool] = True

    weights: Weights | None = None

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        cosines, norms, there = directions(gram, active)
        wanted = there.to(cosines.dtype)
        if "weights" in state:
            wanted = wanted * state["weights"]
        x = least_squares(cosines, wanted)  # u = sum_i x_i g_i / ||g_i||, not normalised yet
        along = torch.bmm(cosines, x.unsqueeze(-1)).squeeze(-1) * there  # <u, g_i> / ||g_i||
        square = (x * along).sum(-1, keepdim=True)
        length = (along * norms).sum(-1, keepdim=True) / square
        x = torch.where(square > 1e-12 * x.square().sum(-1, keepdim=True), length * x, 0.0)
        return diagonal(x / norms, gram, active), state
