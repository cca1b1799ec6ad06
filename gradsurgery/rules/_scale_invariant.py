"""Scale-invariant weighting: the sum of the logs of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._weighing import positive, who_is_there


@dataclass(frozen=True)
class ScaleInvariant(Rule):
    r"""Minimises ``sum_i log L_i``, which weighs each loss by ``w_i = 1 / L_i``: the units of a loss make no difference.

    Raises:
        ValueError: when weighing negative losses, on the CPU.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.ScaleInvariant().weigh(torch.tensor([4.0, 0.5]), {})[0]
        tensor([0.2500, 2.0000])

    Reference:
        Navon et al., *Multi-Task Learning as a Bargaining Game*, ICML 2022 (arXiv:2202.01017), the baseline SI.

    Note:
        A loss below ``1e-20`` counts as that. On other devices than the CPU, negative losses give nan. Dividing a loss by
        the number of accumulated backward passes makes no difference either: the weights are those of the summed losses.
    """

    scale_equivariant: ClassVar[bool] = True

    def weigh(
        self, losses: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        there = who_is_there(losses, active)
        return torch.where(there, 1 / positive(self, losses, there), 1.0), state
