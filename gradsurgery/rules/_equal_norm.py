"""Gradients of equal length, to be chained with other rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._solvers import directions
from ._weights import diagonal


@dataclass(frozen=True)
class EqualNorm(Rule):
    r"""Makes the tasks' gradients equally long: ``g'_i = s g_i / ||g_i||``.

    For rules that depend on lengths, or whose sum does: ``Chain(EqualNorm(), PCGrad())``.

    Args:
        to: the common length ``s``: the ``"mean"``, ``"min"`` or ``"max"`` of the tasks' norms, or ``"one"``.

    Raises:
        ValueError: for another ``to``.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), gs.EqualNorm())
        tensor([2., 2.])

    Reference:
        Sener and Koltun, *Multi-Task Learning as Multi-Objective Optimization*, NeurIPS 2018 (arXiv:1810.04650), whose
        published code normalises gradients ahead of MGDA.

    Note:
        Zero gradients stay zero and do not count.
    """

    scale_equivariant: ClassVar[bool] = True

    to: str = "mean"

    def __post_init__(self) -> None:
        if self.to not in ("mean", "min", "max", "one"):
            raise ValueError(f"`to` must be 'mean', 'min', 'max' or 'one'. Found to={self.to!r}.")

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        _, norms, there = directions(gram, active)
        if self.to == "one" or not norms.numel():
            common = torch.ones_like(norms)
        elif self.to == "mean":
            common = torch.where(there, norms, 0.0).sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
        elif self.to == "min":
            common = torch.where(there, norms, torch.inf).amin(-1, keepdim=True)
        else:
            common = torch.where(there, norms, 0.0).amax(-1, keepdim=True)
        return diagonal(torch.where(there, common / norms, 1.0), gram, active), state
