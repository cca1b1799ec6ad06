"""GEM: gradient episodic memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._complementarity import complementary
from ._solvers import directions
from ._weights import check_names, diagonal, marked, task_names


@dataclass(frozen=True)
class GEM(Rule):
    r"""Keeps the gradient from undoing what memory tasks, the *anchors*, stand for; these constrain and are not summed.

    With the sum ``g`` of the other tasks' gradients, the result is the nearest direction that conflicts with no anchor:

    ``argmin ||d - g||^2``  subject to  ``<d, g_k> >= 0`` for all anchors ``k``;

    this is ``d = g + sum_k v_k g_k`` with multipliers ``v >= 0``.

    Args:
        anchors: names of the tasks that hold losses on an episodic memory.
        margin: is added to the multipliers, which favours the memory (the paper's ``gamma``), at least 0. As in the paper
            where a constraint is violated only.

    Raises:
        ValueError: without a name, for names that are no tasks, and for a negative margin.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[1.0, 1.0], [-2.0, 0.0], [0.0, -1.0]]), gs.GEM(anchors=("1", "2")))
        tensor([0., 0.])

    Reference:
        Lopez-Paz and Ranzato, *Gradient Episodic Memory for Continual Learning*, NeurIPS 2017 (arXiv:1706.08840), Equations
        8 to 11 and Algorithm 1.

    Note:
        The authors' code adds 1e-3 to the diagonal of the Gram matrix; we change nothing. A parameter that a single task
        reaches gets that task's gradient, since no rule operates on it: freeze heads that an anchor alone reaches.
    """

    scale_equivariant: ClassVar[bool] = True

    anchors: Sequence[str]
    margin: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchors", task_names("anchors", self.anchors))
        if not 0 <= self.margin < float("inf"):
            raise ValueError(f"`margin` must be at least 0. Found margin={self.margin!r}.")

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
        cosines, norms, there = directions(gram, active)
        anchors = state["anchors"] & there
        summed = torch.where(there & ~state["anchors"], norms, 0.0)[:, None]
        products = (summed @ cosines).squeeze(1)  # <g, g_k> / ||g_k||
        # Seen by a task that is no anchor, there is nothing to do.
        linear = torch.where(anchors, products, 0.0)[:, None]
        both = anchors[:, :, None] & anchors[:, None, :]
        eye = torch.eye(gram.shape[-1], dtype=cosines.dtype, device=gram.device)
        multiples = complementary(torch.where(both, cosines, eye), linear, "GEM").squeeze(1) / norms
        if self.margin:
            violated = (anchors & (products < 0)).any(-1, keepdim=True)
            multiples = multiples + self.margin * violated
        return diagonal(torch.where(state["anchors"], multiples * anchors, 1.0), gram, active), state
