"""RLW: random loss weighting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._weighing import softmax, who_is_there


@dataclass(frozen=True)
class RLW(Rule):
    r"""Weighs the losses at random, anew in each step: the baseline that a weighting has to beat.

    ``w = softmax(z)`` with ``z`` standard normal, or ``w`` from the flat Dirichlet distribution; either sums to 1.

    Args:
        distribution: ``"normal"`` or ``"dirichlet"``.

    Raises:
        ValueError: for another distribution.

    Example:
        >>> import torch, gradsurgery as gs
        >>> generator = torch.Generator().manual_seed(0)
        >>> weights, _ = gs.RLW().weigh(torch.ones(3), {}, generator=generator)
        >>> again, _ = gs.RLW().weigh(torch.ones(3), {}, generator=generator)
        >>> weights, again
        (tensor([0.8446, 0.1349, 0.0205]), tensor([0.7511, 0.1438, 0.1051]))

    Reference:
        Lin, Ye, Zhang, Tsang, *Reasonable Effectiveness of Random Weighting*, TMLR 2022 (RLW; arXiv:2111.10603).

    Note:
        Weights that sum to 1 shorten the step by about the number of tasks, compared with the plain sum.
    """

    random: ClassVar[bool] = True
    scale_equivariant: ClassVar[bool] = True

    distribution: str = "normal"

    def __post_init__(self) -> None:
        if self.distribution not in ("normal", "dirichlet"):
            raise ValueError(f"`distribution` must be 'normal' or 'dirichlet'. Found {self.distribution!r}.")

    def weigh(
        self, losses: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        there = who_is_there(losses, active)
        if self.distribution == "normal":
            weights = softmax(torch.empty_like(losses).normal_(generator=generator), there)
        else:  # independent exponential variables, over their sum; and so is any subset of them
            drawn = torch.empty_like(losses).exponential_(generator=generator) * there
            weights = drawn / drawn.sum().clamp_min(torch.finfo(losses.dtype).tiny)
        return torch.where(there, weights, 1.0), state
