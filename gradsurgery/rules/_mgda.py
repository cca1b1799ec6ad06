"""MGDA: the multiple-gradient descent algorithm."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State


@dataclass(frozen=True)
class MGDA(Rule):
    r"""The shortest vector in the convex hull of the tasks' gradients: ``g'_i = w_i g_i`` with

    ``w = argmin || sum_i w_i g_i ||^2``  subject to  ``w >= 0``, ``sum_i w_i = 1``.

    Its negative is a direction of descent for all tasks, and zero at a Pareto-stationary point. For two tasks
    ``w_1 = clip((G_22 - G_12) / (G_11 + G_22 - 2 G_12), 0, 1)``.

    Args:
        tolerance: the solver stops where the duality gap, which bounds the excess of the squared norm, is below
            ``tolerance`` times the largest squared norm of a gradient, or at the precision of the Gram matrix.
        iterations: at most this many Newton steps. On the CPU the solver stops once all groups are done, and warns if one
            is far from it; elsewhere it makes all of them without looking, since looking would wait for the device.

    Raises:
        ValueError: for settings that are not positive.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), gs.MGDA())
        tensor([0.4000, 0.8000])

    Reference:
        Désidéri, *Multiple-Gradient Descent Algorithm*, C. R. Math. 2012; Sener and Koltun, *Multi-Task Learning as
        Multi-Objective Optimization*, NeurIPS 2018, Algorithm 2.

    Note:
        The 2018 paper solves this with Frank-Wolfe steps, of which a fixed number may end far from the solution. We use a
        primal-dual interior-point method (Nocedal and Wright, *Numerical Optimization*, Algorithm 16.4), whose
        convergence does not suffer from many tasks or from gradients that depend on each other.
    """

    scale_equivariant: ClassVar[bool] = True
    non_conflicting: ClassVar[bool] = True

    tolerance: float = 1e-14
    iterations: int = 32

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(f"`tolerance` must be positive. Found tolerance={self.tolerance!r}.")
        if not self.iterations >= 1:
            raise ValueError(f"`iterations` must be at least 1. Found iterations={self.iterations!r}.")

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return torch.diag_embed(self._solve(gram, active)).to(gram.dtype), state

    def _solve(self, gram: Tensor, active: Tensor | None) -> Tensor:
        """The weights ``[G, K]``; 1 for absent tasks.

        With multipliers ``z >= 0`` of ``w >= 0``, the solution has ``G w - l = z`` for some number ``l``, and ``w z = 0``.
        From a point inside we take Newton steps on these equations, and let ``w z`` go to zero.
        """
        if active is None:
            active = torch.ones(gram.shape[:2], dtype=torch.bool, device=gram.device)
        tolerance = max(self.tolerance, 8 * torch.finfo(gram.dtype).eps)  # of the precision that it came in
        if gram.device.type != "mps":  # which has no float64
            gram = gram.double()
        there = active.to(gram.dtype)
        gram = gram * there[:, :, None] * there[:, None, :]
        largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
        gram = gram / torch.where(largest > 0, largest, 1.0)[..., None]  # scale does not matter, range does
        count = there.sum(-1, keepdim=True).clamp_min(1)

        # An absent task has w = z = 1, which no step changes and no sum counts.
        w = torch.where(active, 1 / count, 1.0)
        slope = (gram @ (w * there)[..., None]).squeeze(-1)
        z = torch.where(active, slope - slope.masked_fill(~active, torch.inf).amin(-1, keepdim=True) + 1, 1.0)
        for _ in range(self.iterations):
            gap = (w * z * there).sum(-1, keepdim=True)
            open_ = gap > tolerance
            if gram.device.type == "cpu" and not bool(open_.any()):
                return w
            newton = _Newton(gram, w, z, there)
            # Where a step would lead that aims at w z = 0 at once tells how far to aim (Mehrotra).
            dw, dz = newton.step(torch.zeros_like(w))
            length = _longest(w, dw, z, dz)
            ahead = ((w + length * dw) * (z + length * dz) * there).sum(-1, keepdim=True)
            aim = (ahead / gap) ** 3 * gap / count
            dw, dz = newton.step(aim - dw * dz)
            length = torch.where(open_, 0.995 * _longest(w, dw, z, dz), 0.0)
            fine = (dw.isfinite() & dz.isfinite()).all(-1, keepdim=True)  # else precision is exhausted: stay
            w, z = torch.where(fine, w + length * dw, w), torch.where(fine, z + length * dz, z)
        if gram.device.type == "cpu" and (gap := (w * z * there).sum(-1)).max() > 100 * tolerance:
            warnings.warn(
                f"MGDA stopped after {self.iterations} iterations with a relative duality gap of {gap.max().item():.1e} "
                f"(tolerance {tolerance:.1e}): raise `iterations` or `tolerance`.",
                RuntimeWarning,
                stacklevel=3,
            )
        return w


class _Newton:
    """Newton steps from one point: ``G dw - dl = dz``, ``w dz + z dw = aim - w z`` and ``sum dw = 0``."""

    def __init__(self, gram: Tensor, w: Tensor, z: Tensor, there: Tensor) -> None:
        self._w, self._z, self._there = w, z, there
        self._factors = torch.linalg.lu_factor_ex(gram + torch.diag_embed(z / w))[:2]
        self._ones = self._solved(there)
        self._sum = self._ones.sum(-1, keepdim=True)

    def step(self, aim: Tensor) -> tuple[Tensor, Tensor]:
        """``dw`` and ``dz``, all ``[G, K]``."""
        right = (aim / self._w - self._z) * self._there
        free = self._solved(right)
        dw = free - free.sum(-1, keepdim=True) / self._sum * self._ones
        return dw, right - self._z / self._w * dw

    def _solved(self, right: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.lu_solve(*self._factors, right[..., None])
        return solution.squeeze(-1)


def _longest(w: Tensor, dw: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    """The largest step, at most 1, that keeps both from becoming negative."""
    limits = (torch.where(d < 0, -x / d, 1.0).amin(-1, keepdim=True) for x, d in ((w, dw), (z, dz)))
    return torch.minimum(*limits).clamp_max(1)
