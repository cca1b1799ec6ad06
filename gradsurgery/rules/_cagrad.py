"""CAGrad: conflict-averse gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._solvers import ENUMERATED, UNSOLVED, Cone, looks, on_simplex, precise, supports, warn
from ._weights import diagonal, shares


@dataclass(frozen=True)
class CAGrad(Rule):
    r"""Near the average gradient, the direction that is best for the task that gains least by it:

    ``max_d min_i <g_i, d>``  subject to  ``||d - g_0|| <= c ||g_0||``, with the average ``g_0`` of the gradients.

    Its solution is ``d = g_0 + c ||g_0|| / ||g_w|| g_w``, where ``g_w = sum_i w_i g_i`` has the weights, not negative and
    of sum 1, that minimise ``<g_w, g_0> + c ||g_0|| ||g_w||``.

    Args:
        c: how far to go from the average, in [0, 1): 0 is the mean; as ``c`` grows, conflicts are avoided more.

    Raises:
        ValueError: for another ``c``.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), gs.CAGrad(c=0.5))
        tensor([1.5000, 1.5000])

    Reference:
        Liu, Liu, Jin, Stone and Liu, *Conflict-Averse Gradient Descent for Multi-Task Learning*, NeurIPS 2021, Algorithm 1.

    Note:
        The authors' code divides the result by ``1 + c^2``; the paper does not, and neither do we. They leave the problem
        to a general solver. We solve it in closed form for each of several supports of ``w``: for all of them up to five
        tasks, and else for those that Newton steps lead to. Where ``g_w`` is zero its direction is not defined: ``||g_w||``
        is rounded off there, below 1e-7 of the largest norm. TorchJD returns zero there.
    """

    scale_equivariant: ClassVar[bool] = True

    c: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.c < 1:
            raise ValueError(f"`c` must be in [0, 1). Found c={self.c!r}.")

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        matrix, average = precise(gram), shares(gram, state, active)
        if active is not None:
            matrix = torch.where(active[:, :, None] & active[:, None, :], matrix, 0.0)
        if not self.c or not matrix.numel():
            return diagonal(average, gram, active), state
        largest = matrix.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
        problem = _Problem(matrix / torch.where(largest > 0, largest, 1.0)[..., None], average, self.c)
        if gram.shape[-1] <= ENUMERATED:
            masks = supports(gram.shape[-1], matrix.dtype, gram.device)[0].squeeze(-1) > 0
            w, gap = problem.best(masks & problem.there[:, None])
        else:
            w, gap = problem.search()
        usable = problem.there.any(-1, keepdim=True) & (largest < torch.inf)
        w = torch.where(usable, w, average)
        if looks(gram) and bool(((gap > 1e-5) & usable).any()):
            warn("CAGrad", f"stopped at a relative duality gap of {float(gap[usable].max()):.1e}", UNSOLVED)
        square = (w[:, None] @ problem.gram @ w[..., None]).squeeze(-1)
        added = self.c * problem.length / torch.where(square > 0, square, 1.0).sqrt() * w
        return diagonal(average + added, gram, active), state


class _Problem:
    """``min <b, w> + c sqrt(w^T G w)`` over the simplex, where ``b = G a / ||g_0||`` for the average's weights ``a``."""

    def __init__(self, gram: Tensor, average: Tensor, c: float) -> None:
        self.there = average > 0
        linear = (gram @ average[..., None]).squeeze(-1)
        self.length = (average * linear).sum(-1, keepdim=True).clamp_min(0).sqrt()  # ||g_0||
        self.cone = Cone(linear / self.length.clamp_min(1e-30), c)
        square = torch.where(self.there, gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-60), 1.0)  # of a largest of 1
        self._inverse, norms = square.rsqrt(), square.sqrt() * self.there
        # g_w gets a part of its own, of 1e-7 of the lengths that went into it: so its direction is always defined.
        self.gram = gram + 1e-14 * norms[:, :, None] * norms[:, None, :]
        cosines = self.gram * self._inverse[:, :, None] * self._inverse[:, None, :]
        cosines.diagonal(dim1=-2, dim2=-1).fill_(1 + 2e-14)
        self._cosines = cosines

    def solved(self, support: Tensor) -> tuple[Tensor, Tensor]:
        """For supports ``[G, S, K]``: multiples of the unit gradients, and by how much each task gains more than the least.

        On a support the solution has ``C x + b' = m e`` with ``x^T C x = c^2``, where ``e`` and ``b'`` are one and ``b``
        over the gradients' lengths: so ``x`` is linear in ``m``, for which a quadratic equation is left.
        """
        eye = torch.eye(support.shape[-1], dtype=self.gram.dtype, device=self.gram.device)
        inside = support[..., :, None] & support[..., None, :]
        sides = torch.stack([self._inverse, self._inverse * self.cone.linear], -1)[:, None]  # [G, 1, K, 2]
        right = sides * support[..., None]
        left = torch.linalg.solve_ex(torch.where(inside, self._cosines[:, None], eye), right)[0]
        (one, mixed), (_, other) = (left.mT @ right).unbind(-2)[0].unbind(-1), (left.mT @ right).unbind(-2)[1].unbind(-1)
        m = ((mixed + (mixed.square() - one * (other - self.cone.radius**2)).clamp_min(0).sqrt()) / one)[..., None]
        x = m * left[..., 0] - left[..., 1]
        return x, (x[..., None, :] @ self._cosines[:, None]).squeeze(-2) + sides[..., 1] - m * sides[..., 0]

    def best(self, support: Tensor) -> tuple[Tensor, Tensor]:
        """Of the solutions on supports ``[G, S, K]``, the weights of that with the least duality gap; that gap."""
        x = self.solved(support)[0]
        w = (x * self._inverse[:, None]).clamp(min=0)
        w = w / w.sum(-1, keepdim=True)
        gap, index = self._gap(w).nan_to_num(torch.inf).min(1)
        return w.gather(1, index[..., None].expand(-1, 1, w.shape[-1])).squeeze(1), gap

    def search(self) -> tuple[Tensor, Tensor]:
        """The same, for supports that are pivoted to from the one that interior points suggest."""
        start, _ = on_simplex(self.gram, self.there, 1e-6, 30, self.cone)
        support = self.there & (start > 1e-3 * torch.where(self.there, start, 0.0).amax(-1, keepdim=True))
        tried = []
        for _ in range(8):
            tried.append(support)
            x, gain = (values.squeeze(1) for values in self.solved(support[:, None]))
            support = support ^ (self.there & (torch.where(support, x, gain) < -1e-13))
        w, gap = self.best(torch.stack(tried, 1))
        start = torch.where(self.there, start, 0.0)
        rough = self._gap(start[:, None]).squeeze(1)
        return torch.where(gap <= rough, w, start), torch.minimum(gap, rough)

    def _gap(self, w: Tensor) -> Tensor:
        """``[G, S, K]`` → duality gaps ``[G, S, 1]``."""
        slope = w @ self.gram
        slope = slope * self.cone.radius * (w * slope).sum(-1, keepdim=True).rsqrt()
        slope = slope + self.cone.linear[:, None]
        least = torch.where(self.there[:, None], slope, torch.inf).amin(-1, keepdim=True)
        return (w * slope).sum(-1, keepdim=True) - least
