"""Krum: the gradient that is closest to its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._solvers import precise
from ._weights import diagonal


@dataclass(frozen=True)
class Krum(Rule):
    r"""Steps on the mean of the gradients that are closest to others, and leaves the rest out.

    Of ``n`` tasks, up to ``f`` may be anything at all. A task's score is the sum of ``||g_i - g_j||^2`` over the
    ``n - f - 2`` tasks that are nearest to it; the ``m`` tasks with the lowest scores have ``g'_i = g_i / m``, the others
    zero.

    Args:
        byzantine: ``f``, at least 0. The paper's guarantee needs ``n > 2 f + 2``.
        selected: ``m``, at least 1. The paper's Krum is 1; more is Multi-Krum.

    Raises:
        ValueError: for settings outside these ranges; and, if ``f > 0``, for too few tasks.

    Example:
        >>> import torch, gradsurgery as gs
        >>> jacobian = torch.tensor([[1.0, 0.0], [1.0, 0.2], [1.0, 0.3], [1.1, 0.1], [-9.0, 9.0]])
        >>> gs.operate(jacobian, gs.Krum(byzantine=1, selected=2))
        tensor([1.0500, 0.1500])

    Reference:
        Blanchard, El Mhamdi, Guerraoui and Stainer, *Machine Learning with Adversaries: Byzantine Tolerant Gradient
        Descent*, NeurIPS 2017 (arXiv:1703.02757), Section 4.

    Note:
        TorchJD adds up distances that are not squared, and so may choose other tasks. Of equal scores the first is chosen,
        as in the paper. Where so many tasks are absent that ``n - f - 2`` is below 1, the nearest one counts.
    """

    scale_equivariant: ClassVar[bool] = True

    byzantine: int = 0
    selected: int = 1

    def __post_init__(self) -> None:
        for name, least in (("byzantine", 0), ("selected", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be a number of tasks, at least {least}. Found {name}={value!r}.")

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        if self.byzantine and len(tasks) < 2 * self.byzantine + 3:
            raise ValueError(
                f"`byzantine={self.byzantine}` needs at least {2 * self.byzantine + 3} tasks. Found {len(tasks)}; "
                "lower `byzantine`."
            )
        return {}

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        matrix, tasks = precise(gram), gram.shape[-1]
        here = torch.ones_like(matrix[..., 0], dtype=torch.bool) if active is None else active
        square = matrix.diagonal(dim1=-2, dim2=-1)
        distances = (square[:, :, None] + square[:, None, :] - 2 * matrix).clamp_min(0)
        other = here[:, None, :] & ~torch.eye(tasks, dtype=torch.bool, device=gram.device)
        nearest = torch.where(other, distances, torch.inf).sort(-1).values
        count = here.sum(-1, keepdim=True)
        neighbours = (count - self.byzantine - 2).clamp(min=1).minimum((count - 1).clamp(min=0))[..., None]
        ranks = torch.arange(tasks, device=gram.device)
        scores = torch.where(ranks < neighbours, nearest, 0.0).sum(-1)
        order = torch.where(here, scores, torch.inf).argsort(dim=-1, stable=True)
        chosen = count.clamp(max=self.selected)
        weights = torch.zeros_like(scores).scatter(-1, order, (ranks < chosen) / chosen.clamp(min=1).to(scores.dtype))
        return diagonal(weights, gram, active), state
