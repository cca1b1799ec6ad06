"""MoDo: multi-objective gradient with double sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._rule import Rule, State
from ._simplex_steps import conditional, projected
from ._solvers import precise
from ._weights import diagonal


@dataclass(frozen=True)
class MoDo(Rule):
    r"""A slowly moving MGDA: ``g'_i = w_i g_i``, where ``w`` makes one projected gradient step in each step of training,

    ``w <- P(w - lr (G w + rho w))``, with the projection ``P`` onto the simplex.

    Args:
        lr: learning rate of ``w`` (the paper's ``gamma``). Not scale-free: gradients that are twice as long move it
            four times as fast.
        rho: regularisation towards equal weights, at least 0.

    State:
        ``"w"``: ``[G, K]``.

    Raises:
        ValueError: for settings outside these ranges.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), gs.MoDo(lr=0.1, rho=0.0))  # w = (0.425, 0.575)
        tensor([0.8500, 0.5750])

    Reference:
        Chen, Fernando, Ying and Chen, *Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
        Conflict-Avoidance*, NeurIPS 2023 (arXiv:2305.20057), Algorithm 2.

    Note:
        The paper's ``G`` is from two independent batches, ``J_1 J_2^T``, so that it is unbiased; ours is from the one batch
        of the step.
    """

    lr: float = 0.1
    rho: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"`lr` must be positive. Found lr={self.lr!r}.")
        if not 0 <= self.rho < float("inf"):
            raise ValueError(f"`rho` must be at least 0. Found rho={self.rho!r}.")

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        return {"w": torch.full((len(groups), len(tasks)), 1 / max(len(tasks), 1), device=device, dtype=dtype)}

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        matrix, old = precise(gram), state["w"]
        here = torch.ones_like(old, dtype=torch.bool) if active is None else active
        matrix = torch.where(here[:, :, None] & here[:, None, :], matrix, 0.0)
        w, total = conditional(old.to(matrix.dtype), here)
        slope = (matrix @ w[..., None]).squeeze(-1) + self.rho * w
        w = projected(w - self.lr * slope, here)
        return diagonal(w, gram, active), {"w": torch.where(here, (w * total).to(old), old)}
