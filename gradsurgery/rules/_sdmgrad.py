"""SDMGrad: direction-oriented multi-objective learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._simplex_steps import conditional, projected
from ._solvers import precise
from ._weights import Weighted, Weights, diagonal, shares


@dataclass(frozen=True)
class SDMGrad(Weighted, Rule):
    r"""A common direction of descent that is drawn towards the average gradient,

    ``g'_i = (w_i + lam a_i) / (1 + lam) g_i``,

    where ``w`` minimises ``|| sum_i w_i g_i + lam g_0 ||^2`` over the simplex, with the average ``g_0 = sum_i a_i g_i``.

    ``w`` is kept from step to step, and each step makes some projected gradient steps towards the minimum, on a Gram matrix
    divided by the square of the tasks' mean norm.

    Args:
        lam: how strongly the average draws, at least 0. 0 is MGDA.
        lr: learning rate of ``w``. None: the inverse of the largest absolute row sum of that matrix, with which the steps
            converge where gradients stay the same.
        momentum: of the steps, in [0, 1).
        iterations: steps on ``w`` in each step of training.
        weights: preferences ``a`` by task, in proportion to which gradients are averaged; 1 for tasks that are not named.

    State:
        ``"w"``: ``[G, K]``, and ``"weights"``: ``[G, K]`` if there are any.

    Raises:
        ValueError: for settings outside these ranges.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), gs.SDMGrad())
        tensor([0.5000, 0.5000])

    Reference:
        Xiao, Ban and Ji, *Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms*, NeurIPS
        2023 (arXiv:2305.18409), Algorithm 1; for the scale of the Gram matrix, Section 6.1 and the authors' code.

    Note:
        The paper's gradient of the objective is from two independent batches, ``J_1 J_2^T``, so that it is unbiased; ours
        is from the one batch of the step, as in most uses of MGDA.

        The authors' code has ``lr=10``, and so do LibMTL and TorchJD (which adds 1e-8 to the square that it divides by).
        That is several times what such steps bear: ``w`` jumps between corners of the simplex, on the same gradients too,
        and what is rounding in one step decides the next.
    """

    scale_equivariant: ClassVar[bool] = True

    lam: float = 0.3
    lr: float | None = None
    momentum: float = 0.5
    iterations: int = 20
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.lam < float("inf"):
            raise ValueError(f"`lam` must be at least 0. Found lam={self.lam!r}.")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"`lr` must be positive, or None. Found lr={self.lr!r}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1). Found momentum={self.momentum!r}.")
        if not self.iterations >= 1:
            raise ValueError(f"`iterations` must be at least 1. Found iterations={self.iterations!r}.")
        super().__post_init__()

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        w = torch.full((len(groups), len(tasks)), 1 / max(len(tasks), 1), device=device, dtype=dtype)
        return {"w": w, **super().init(tasks, groups, device=device, dtype=dtype)}

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        matrix, average = precise(gram), shares(gram, state, active)
        here = torch.ones_like(average, dtype=torch.bool) if active is None else active
        matrix = torch.where(here[:, :, None] & here[:, None, :], matrix, 0.0)
        norm = matrix.diagonal(dim1=-2, dim2=-1).sqrt().sum(-1) / here.sum(-1).clamp(min=1)
        norm = torch.where(norm > 0, norm, 1.0)[:, None, None]
        matrix = matrix / norm / norm
        w, total = conditional(state["w"].to(matrix.dtype), here)
        # The largest row sum is at least the largest eigenvalue, of which the inverse is small enough.
        lr = self.lr or 1 / matrix.abs().sum(-1).amax(-1, keepdim=True).clamp_min(1e-30)
        velocity = torch.zeros_like(w)
        for _ in range(self.iterations):
            velocity = self.momentum * velocity + (matrix @ (w + self.lam * average)[..., None]).squeeze(-1)
            w = projected(w - lr * velocity, here)
        kept = torch.where(here, (w * total).to(state["w"]), state["w"])
        return diagonal((w + self.lam * average) / (1 + self.lam), gram, active), {**state, "w": kept}
