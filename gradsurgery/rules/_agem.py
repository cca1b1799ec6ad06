"""A-GEM: averaged gradient episodic memory."""

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
class AGEM(Rule):
    r"""Keeps the gradient from undoing what memory tasks, the *anchors*, stand for; these constrain and are not summed.

    With the sum ``g`` of the other tasks' gradients and the mean ``r`` of the anchors': if ``<g, r> < 0``, the result is
    ``g - <g, r> / ||r||^2  r``, otherwise ``g``.

    Args:
        anchors: names of the tasks that hold losses on an episodic memory.

    Raises:
        ValueError: without a name, and for names that are no tasks.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[1.0, 1.0], [-2.0, 0.0]]), gs.AGEM(anchors=("1",)))
        tensor([0., 1.])

    Reference:
        Chaudhry, Ranzato, Rohrbach and Elhoseiny, *Efficient Lifelong Learning with A-GEM*, ICLR 2019 (arXiv:1812.00420),
        Equation 11.

    Note:
        A parameter that a single task reaches gets that task's gradient, since no rule operates on it: freeze heads that
        an anchor alone reaches. In the paper ``r`` is from one batch drawn from all memories; the mean of the anchors is
        that in expectation, if they are drawn equally often. If ``r`` is zero there is no constraint.
    """

    scale_equivariant: ClassVar[bool] = True

    anchors: Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchors", task_names("anchors", self.anchors))

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        check_names("anchors", self.anchors, tasks, self)
        return {"anchors": marked(self.anchors, tasks, groups, device)}

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        matrix, anchors = precise(gram), state["anchors"]
        if active is not None:
            matrix = torch.where(active[:, :, None] & active[:, None, :], matrix, 0.0)
            anchors = anchors & active
        # With the anchors' sum in place of their mean, the projection is the same.
        products = torch.where(anchors[:, None], matrix, 0.0).sum(-1)
        square = torch.where(anchors, products, 0.0).sum(-1, keepdim=True)
        product = torch.where(anchors, 0.0, products).sum(-1, keepdim=True)
        size = torch.where(anchors, matrix.diagonal(dim1=-2, dim2=-1), 0.0).sum(-1, keepdim=True)
        fine = square > 1e-14 * size  # of anchors that cancel, rounding is left
        multiple = torch.where(fine, -product / square, 0.0).clamp_min(0)
        return diagonal(torch.where(anchors, multiple, 1.0), gram, active), state
