"""Auxiliary losses, gated by the cosine of their gradients with the main one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._solvers import precise
from ._weights import check_names, diagonal, marked, task_names


@dataclass(frozen=True)
class CosineGate(Rule):
    r"""Lets an auxiliary task's gradient pass where it does not turn away from the main one.

    With ``c_i = cos(g_i, g_main)``, an auxiliary task has ``g'_i = max(0, c_i) g_i``; unweighted, ``g'_i = g_i`` if
    ``c_i >= 0`` and zero otherwise. Main tasks keep their gradients; of several, ``g_main`` is the sum.

    Args:
        main: names of the main tasks; the others are auxiliary.
        weighted: by the cosine, or all or nothing.

    Raises:
        ValueError: without a name, and for names that are no tasks.

    Example:
        >>> import torch, gradsurgery as gs
        >>> jacobian = torch.tensor([[1.0, 0.0], [3.0, 4.0], [-1.0, 1.0]])
        >>> gs.operate(jacobian, gs.CosineGate(main=("0",)))  # cosines 0.6, and a negative one
        tensor([2.8000, 2.4000])
        >>> gs.operate(jacobian, gs.CosineGate(main=("0",), weighted=False))
        tensor([4., 4.])

    Reference:
        Du et al., *Adapting Auxiliary Losses Using Gradient Similarity*, 2018 (arXiv:1812.02224), Equation 4 (weighted) and
        Algorithm 1 (unweighted).

    Note:
        The paper has one main task. Where none of the main tasks is there, or their gradients cancel, nothing can be told,
        and all gradients pass.
    """

    scale_equivariant: ClassVar[bool] = True

    main: Sequence[str]
    weighted: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "main", task_names("main", self.main))

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        check_names("main", self.main, tasks, self)
        return {"main": marked(self.main, tasks, groups, device)}

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        matrix, main = precise(gram), state["main"]
        if active is not None:
            matrix = torch.where(active[:, :, None] & active[:, None, :], matrix, 0.0)
            main = main & active
        products = torch.where(main[:, None], matrix, 0.0).sum(-1)  # <g_i, g_main>
        square = torch.where(main, products, 0.0).sum(-1, keepdim=True)
        own = matrix.diagonal(dim1=-2, dim2=-1)
        # Of main gradients that cancel, rounding is left.
        known = square > 1e-14 * torch.where(main, own, 0.0).sum(-1, keepdim=True)
        gate = (products >= 0).to(matrix.dtype)
        if self.weighted:
            lengths = own.sqrt() * square.clamp_min(0).sqrt()
            gate = torch.where(lengths > 0, products / torch.where(lengths > 0, lengths, 1.0), 0.0).clamp(0, 1)
        return diagonal(torch.where(main | ~known, 1.0, gate), gram, active), state
