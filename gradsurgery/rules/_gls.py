"""GLS: the geometric mean of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._weighing import positive, who_is_there


@dataclass(frozen=True)
class GLS(Rule):
    r"""Minimises the geometric mean of the losses: ``L = (prod_i L_i)^(1/n)`` for the ``n`` tasks that are there.

    Its gradient weighs each loss by ``w_i = L / (n L_i)``: what is small already counts as much as what is large.

    Raises:
        ValueError: when weighing negative losses, on the CPU.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.GLS().weigh(torch.tensor([4.0, 1.0]), {})[0]
        tensor([0.2500, 1.0000])

    Reference:
        Chennupati, Sistu, Yogamani, Rawashdeh, *MultiNet++*, CVPR Workshops 2019 (arXiv:1904.08492; geometric loss
        strategy, without focus).

    Note:
        A loss below ``1e-20`` counts as that. On other devices than the CPU, negative losses give nan.
    """

    scale_equivariant: ClassVar[bool] = True

    def weigh(
        self, losses: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        there = who_is_there(losses, active)
        logs = positive(self, losses, there).log()  # zero for absent tasks
        count = there.sum()
        weights = (logs.sum() / count - logs).exp() / count
        return torch.where(there, weights, 1.0), state
