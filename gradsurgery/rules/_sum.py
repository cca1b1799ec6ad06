"""The plain sum and mean of the tasks' gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State


@dataclass(frozen=True)
class Sum(Rule):
    r"""The sum of the tasks' gradients, ``g'_i = g_i``: plain joint training.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), gs.Sum())
        tensor([0., 1.])
    """

    scale_equivariant: ClassVar[bool] = True


@dataclass(frozen=True)
class Mean(Rule):
    r"""The mean of the gradients of the tasks that are there: ``g'_i = g_i / n`` for ``n`` active tasks.

    In a :class:`Chain` it turns the sum of another rule into a mean: ``Chain(PCGrad(), Mean())``.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), gs.Chain(gs.PCGrad(), gs.Mean()))
        tensor([-0.2500,  0.7500])

    Note:
        Parameters that one task alone reaches are never operated on. They get that task's gradient, not its ``1/K``.
    """

    scale_equivariant: ClassVar[bool] = True

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
        if active is None:
            return eye / gram.shape[-1], state
        # An absent task keeps its identity row, so its weight is 1.
        weights = torch.where(active, 1 / active.sum(-1, keepdim=True).clamp(min=1).to(gram.dtype), 1.0)
        return eye * weights[:, :, None], state
