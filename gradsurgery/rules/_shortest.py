"""The shortest vector in a convex hull, for all surgery groups at once: ``w >= 0`` with ``sum w = 1``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._complementarity import by_pivoting, longest, supports
from ._solvers import looks


def shortest(gram: Tensor, there: Tensor, tolerance: float, iterations: int) -> tuple[Tensor, Tensor]:
    """``argmin 1/2 w^T G w`` over the simplex, by pivoting, and where that fails by interior points.

    Args:
        gram: ``[G, K, K]``, of which the largest element is about 1; rows and columns of absent tasks are zero.
        there: ``[G, K]``, which tasks take part. The others' weights are 1.
        tolerance: for the duality gap ``w^T G w - min_i (G w)_i``.
        iterations: at most so many Newton steps.

    Returns:
        The weights ``w``, ``[G, K]``, and the duality gaps, ``[G, 1]``.
    """
    if not looks(gram):
        return on_simplex(gram, there, tolerance, iterations)
    w, gap = _by_pivoting(gram, there)
    rest = (gap <= tolerance).logical_not_().nonzero()[:, 0]
    if len(rest):
        w[rest], gap[rest] = on_simplex(gram[rest], there[rest], tolerance, iterations)
    return w, gap


def _by_pivoting(gram: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The solution of ``x >= 0``, ``G x >= 1`` with one of the two tight, where there is one, divided by its sum."""
    square = gram.diagonal(dim1=-2, dim2=-1)
    inverse = torch.where(square > 0, square, 1.0).rsqrt()
    cosines = (gram * inverse.unsqueeze(-1)).mul_(inverse.unsqueeze(-2))
    cosines.diagonal(dim1=-2, dim2=-1).fill_(1)
    linear = -inverse * there
    allowed = 1e-12 * inverse.amax(-1, keepdim=True)
    w = by_pivoting(cosines, linear, there, allowed) * inverse
    w = w / w.sum(-1, keepdim=True)
    slope = torch.bmm(gram, w.unsqueeze(-1)).squeeze(-1)
    gap = (w * slope).sum(-1, keepdim=True) - slope.masked_fill(~there, torch.inf).amin(-1, keepdim=True)
    return torch.where(there, w, 1.0), gap


def on_simplex(gram: Tensor, there: Tensor, tolerance: float, iterations: int) -> tuple[Tensor, Tensor]:
    """As :func:`shortest`, by a primal-dual interior-point method.

    With multipliers ``z >= 0`` of ``w >= 0``, the solution has ``G w - l = z`` for some number ``l``, and ``w z = 0``.
    From a point inside we take Newton steps on these equations, and let ``w z`` go to zero.
    """
    absent, inside = ~there, there.to(gram.dtype)
    count = inside.sum(-1, keepdim=True).clamp_min(1)
    # An absent task has w = z = 1, which no step changes and no sum counts.
    w = torch.where(absent, 1.0, 1 / count)
    slope = (gram @ (w * inside)[..., None]).squeeze(-1)
    z = torch.where(absent, 1.0, slope - slope.masked_fill(absent, torch.inf).amin(-1, keepdim=True) + 1)
    for _ in range(iterations):
        gap = (w * z * inside).sum(-1, keepdim=True)
        unfinished = gap > tolerance
        if looks(gram) and not bool(unfinished.any()):
            break
        newton = _SimplexNewton(gram, w, z, inside)
        # Where a step would lead that aims at w z = 0 at once tells how far to aim (Mehrotra).
        dw, dz = newton.step(torch.zeros_like(w))
        length = longest(w, dw, z, dz)
        ahead = ((w + length * dw) * (z + length * dz) * inside).sum(-1, keepdim=True)
        dw, dz = newton.step((ahead / gap) ** 3 * gap / count - dw * dz)
        length = torch.where(unfinished, 0.995 * longest(w, dw, z, dz), 0.0)
        fine = (dw.isfinite() & dz.isfinite()).all(-1, keepdim=True)  # else precision is exhausted: stay
        w, z = torch.where(fine, w + length * dw, w), torch.where(fine, z + length * dz, z)
    return w, (w * z * inside).sum(-1, keepdim=True)


class _SimplexNewton:
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


def shortest_by_enumeration(gram: Tensor, there: Tensor) -> Tensor:
    """As :func:`on_simplex`, for a few tasks: for each support the solution that has it; of these the one of least gap.

    A negative weight is made zero before the gap is measured. So what a support without a solution leads to can do no harm.
    """
    square = torch.where(there, gram.diagonal(dim1=-2, dim2=-1), 1.0).clamp_min(1e-60)  # of a largest of 1
    inverse = square.rsqrt()
    cosines = gram * inverse[:, :, None] * inverse[:, None, :]
    cosines.diagonal(dim1=-2, dim2=-1).fill_(1)
    masks, pairs = supports(gram.shape[-1], gram.dtype, gram.device)
    inverse = (inverse * there)[:, None, :, None]
    x = torch.linalg.solve_ex(cosines[:, None] * pairs, inverse * masks)[0]
    w = (x * inverse).clamp_(min=0).squeeze(-1)
    w = w / w.sum(-1, keepdim=True)  # [G, S, K]
    slope = w @ gram
    least = torch.where(there[:, None], slope, torch.inf).amin(-1)
    best = ((w * slope).sum(-1) - least).nan_to_num_(torch.inf).argmin(1)
    found: Tensor = w.gather(1, best[:, None, None].expand(-1, 1, w.shape[-1]))
    return found.squeeze(1)
