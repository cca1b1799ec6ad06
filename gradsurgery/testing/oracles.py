"""Rules as their papers write them: one vector at a time, in float64, without a Gram matrix.

Slow and plain on purpose, to compare fast ones with. A Jacobian is ``[K, D]``; each function returns the modified gradients
``[K, D]``, whose sum is the gradient that is stepped on, or that gradient ``[D]`` itself.

>>> import numpy as np, gradsurgery as gs
>>> gs.testing.oracles.mgda(np.array([[2.0, 0.0], [0.0, 1.0]]))
array([0.4, 0.8])
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["mean", "mgda", "pcgrad"]

Array: TypeAlias = npt.NDArray[np.float64]


def mean(jacobian: Array) -> Array:
    """The modified gradients ``g_i / K``."""
    return np.asarray(jacobian / len(jacobian))


def pcgrad(jacobian: Array, orders: Sequence[Sequence[int]] | npt.NDArray[np.int64]) -> Array:
    """The modified gradients of Yu et al. 2020, Algorithm 1.

    Args:
        jacobian: ``[K, D]``.
        orders: ``[K, K - 1]``, for each task the order in which it meets the others.
    """
    modified: Array = np.array(jacobian)
    for i in range(len(jacobian)):
        for j in orders[i]:
            g_j = jacobian[j]
            product = modified[i] @ g_j
            if product < 0:
                modified[i] = modified[i] - product / (g_j @ g_j) * g_j
    return modified


def mgda(jacobian: Array) -> Array:
    """The combined gradient of Désidéri 2012: the shortest vector in the convex hull of the rows, by a look at every face.

    The shortest vector lies inside some face whose corners are affinely independent; there it is the shortest vector of the
    face's affine hull. So the shortest of those candidates whose weights are not negative is the answer.
    """
    scale = max(float(np.linalg.norm(jacobian, axis=1).max()), float(np.finfo(float).tiny))
    rows: Array = jacobian / scale
    best: Array | None = None
    for size in range(1, len(rows) + 1):
        for face in combinations(range(len(rows)), size):
            origin, edges = rows[face[0]], rows[list(face[1:])] - rows[face[0]]
            steps = np.linalg.lstsq(edges.T, -origin, rcond=None)[0] if size > 1 else np.zeros(0)
            weights = np.array([1 - steps.sum(), *steps])
            if (weights >= 0).all():
                candidate = weights @ rows[list(face)]
                if best is None or candidate @ candidate < best @ best:
                    best = candidate
    assert best is not None
    return best * scale
