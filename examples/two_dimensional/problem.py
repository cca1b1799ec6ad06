"""Two losses on the plane with a deep valley each, and a Pareto set between the minima of two bowls below.

With ``x = (x1, x2)``, ``c1 = max(tanh(x2 / 2), 0)`` and ``c2 = max(tanh(-x2 / 2), 0)``:

``f1 = log max(|(-x1 - 7) / 2 - tanh(-x2)|, 5e-6) + 6``,  ``f2 = log max(|(-x1 + 3) / 2 + tanh(-x2) + 2|, 5e-6) + 6``,
``q1 = ((-x1 + 7)^2 + (-x2 - 8)^2 / 10) / 10 - 20``,      ``q2 = ((-x1 - 7)^2 + (-x2 - 8)^2 / 10) / 10 - 20``,

``L1 = f1 c1 + q1 c2``,  ``L2 = f2 c1 + q2 c2``.

Reference:
    Liu et al., *Conflict-Averse Gradient Descent for Multi-Task Learning*, NeurIPS 2021, Figure 1 and Appendix B; the
    starts are those of Navon et al., *Multi-Task Learning as a Bargaining Game*, ICML 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))

Pair = tuple[float, float]


def losses(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """``L1`` and ``L2``, elementwise."""
    floor = torch.tensor(5e-6, dtype=x1.dtype)
    f1 = torch.log(torch.maximum((0.5 * (-x1 - 7) - torch.tanh(-x2)).abs(), floor)) + 6
    f2 = torch.log(torch.maximum((0.5 * (-x1 + 3) + torch.tanh(-x2) + 2).abs(), floor)) + 6
    q1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    q2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    c1, c2 = torch.tanh(x2 / 2).clamp(min=0), torch.tanh(-x2 / 2).clamp(min=0)
    return f1 * c1 + q1 * c2, f2 * c1 + q2 * c2


def by_hand(x1: float, x2: float) -> tuple[Pair, tuple[Pair, Pair]]:
    """The same at one point, and both gradients: several times faster than some thirty operations on tensors.

    Where ``x2 = 0`` the losses have a kink, and these are the slopes from below; ``losses`` and autograd add up both sides.
    """
    t, slope = math.tanh(-x2), math.tanh(x2) ** 2 - 1
    a1, a2 = 0.5 * (-x1 - 7) - t, 0.5 * (-x1 + 3) + t + 2
    f1, f2 = math.log(max(abs(a1), 5e-6)) + 6, math.log(max(abs(a2), 5e-6)) + 6
    df1 = (-0.5 / a1, -slope / a1) if abs(a1) > 5e-6 else (0.0, 0.0)
    df2 = (-0.5 / a2, slope / a2) if abs(a2) > 5e-6 else (0.0, 0.0)
    bowl = 0.1 * (x2 + 8) ** 2
    q1, q2 = ((x1 - 7) ** 2 + bowl) / 10 - 20, ((x1 + 7) ** 2 + bowl) / 10 - 20
    dq1, dq2 = ((x1 - 7) / 5, (x2 + 8) / 50), ((x1 + 7) / 5, (x2 + 8) / 50)
    c = math.tanh(x2 / 2)
    dc = (1 - c**2) / 2
    if x2 > 0:
        return (f1 * c, f2 * c), ((df1[0] * c, df1[1] * c + f1 * dc), (df2[0] * c, df2[1] * c + f2 * dc))
    return (-q1 * c, -q2 * c), ((-dq1[0] * c, -dq1[1] * c - q1 * dc), (-dq2[0] * c, -dq2[1] * c - q2 * dc))


def pareto_set(count: int = 201) -> NDArray[np.float64]:
    """``[count, 2]``: the minima of ``w L1 + (1 - w) L2`` below, for ``w`` from 0 to 1."""

    def weighted(point: NDArray[np.float64], w: float) -> tuple[float, NDArray[np.float64]]:
        values, gradients = by_hand(*point)
        weights = np.array([w, 1 - w])
        return float(weights @ np.array(values)), weights @ np.array(gradients)

    found = [minimize(weighted, (14 * w - 7, -8.4), (w,), jac=True, tol=1e-12).x for w in np.linspace(0, 1, count)]
    return np.stack(found)


def valleys(count: int = 101, top: float = 11.0) -> NDArray[np.float64]:
    """``[2, count, 2]``: the bottoms of ``f1`` and ``f2`` above, where the arguments of their logarithms are zero."""
    x2 = np.linspace(0, top, count)
    return np.stack([np.stack([side * (7 - 2 * np.tanh(x2)), x2], -1) for side in (-1, 1)])


def distances(points: Sequence[Pair] | NDArray[np.float64], curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """From each of ``n`` points to a curve given by many of its points, ``[n]``."""
    apart = np.asarray(points)[:, None] - curve[None]
    least: NDArray[np.float64] = np.hypot(apart[..., 0], apart[..., 1]).min(1)
    return least
