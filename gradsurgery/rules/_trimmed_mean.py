"""TrimmedMean: the mean without the extremes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._coordinates import CoordinateRule, added


@dataclass(frozen=True)
class TrimmedMean(CoordinateRule):
    r"""The mean of the tasks' gradients without the ``trim`` largest and the ``trim`` smallest, in each coordinate.

    ``g = sum_i x_i / (k - 2 t)``, over the values ``x_i`` of a coordinate that are neither among the ``t`` largest of the
    ``k`` gradients nor among the ``t`` smallest.

    Args:
        trim: ``t``, how many are left out on either side, at least 0, which is the plain mean. The result is near the mean
            of the others if up to ``t`` tasks are anything at all.

    Raises:
        ValueError: for a negative ``trim``; and, when the tasks are known, for fewer than ``2 trim + 1`` of them.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[1.0, -9.0], [2.0, 1.0], [3.0, 2.0], [90.0, 3.0]]), gs.TrimmedMean(1))
        tensor([2.5000, 1.5000])

    Reference:
        Yin, Chen, Ramchandran and Bartlett, *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*,
        ICML 2018, Definition 2, of ``k`` workers, ``t = beta k`` (arXiv:1803.01498).

    Note:
        Of parameters that fewer tasks reached, as many are left out as leave one or two: their median.
    """

    scale_equivariant: ClassVar[bool] = True

    trim: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.trim, bool) or not isinstance(self.trim, int) or self.trim < 0:
            raise ValueError(f"`trim` must be a number of tasks, at least 0. Found trim={self.trim!r}.")

    def check(self, tasks: Sequence[str]) -> None:
        if len(tasks) < 2 * self.trim + 1:
            raise ValueError(
                f"`trim={self.trim}` needs at least {2 * self.trim + 1} tasks. Found {len(tasks)}; lower `trim`."
            )

    def combine(self, rows: Tensor, *, tasks: Sequence[str], noise: Tensor | None) -> Tensor:
        left = list(rows)
        # Rounds of bubble sort are whole rows at a time, where sorting each column takes ten times as long.
        for _ in range(min(self.trim, (len(left) - 1) // 2)):
            for smaller, larger in ((torch.minimum, torch.maximum), (torch.maximum, torch.minimum)):
                extreme, *others = left
                left = []
                for row in others:
                    left.append(smaller(extreme, row))
                    extreme = larger(extreme, row)
        return added(left) / len(left)
