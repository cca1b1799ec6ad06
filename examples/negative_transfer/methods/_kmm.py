"""KMM: weights of source samples by which their mean, in a kernel's feature space, is the target's.

Reference:
    Huang, Smola, Gretton, Borgwardt, Schölkopf, *Correcting Sample Selection Bias by Unlabeled Data*, NIPS 2007, Eq. 5.
"""

from __future__ import annotations

import numpy as np
import osqp
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial.distance import cdist, pdist
from sklearn.linear_model import LogisticRegression

from ..protocol import Problem

Array = NDArray[np.float64]


class KMM:
    """A weighted logistic regression of source and labelled target samples.

    Args:
        problem: the data.
        seed: of which source samples are used, ``at_most`` of them: the quadratic program has a variable for each.
    """

    def __init__(self, problem: Problem, seed: int, at_most: int = 800) -> None:
        order = np.random.default_rng(seed).permutation(len(problem.x))[:at_most]
        self.order = np.sort(order)
        self.problem = problem
        self.weights = np.ones(len(self.order))

    def fit(self) -> KMM:
        """Weighs the source, and then learns the labels."""
        problem = self.problem
        x, y = problem.x[self.order].double().numpy(), problem.y[self.order].numpy()
        target, few = problem.x_unlabelled.double().numpy(), problem.x_labelled.double().numpy()
        if len(x) and len(target):
            width = median_distance(np.concatenate([x, target]))
            self.weights = weights(gaussian(x, x, width), gaussian(x, target, width))
        self.model = classify(
            np.concatenate([x, few]),
            np.concatenate([y, problem.y_labelled.numpy()]),
            np.concatenate([self.weights, np.ones(len(few))]),
        )
        return self

    def predict(self, x: Array) -> NDArray[np.int64]:
        """Labels ``[n]`` of images ``[n, 256]``."""
        found: NDArray[np.int64] = self.model.predict(x)
        return found


def weights(source: Array, cross: Array, bound: float = 1000.0) -> Array:
    """The weights ``β`` ``[n]`` that make ``½ βᵀKβ − κᵀβ`` small, with ``0 ≤ β ≤ B`` and ``|Σβ − n| ≤ n ε``.

    Args:
        source: kernel of source samples, ``K`` ``[n, n]``.
        cross: kernel of source and target samples, ``[n, m]``; ``κ = n/m Σ_j cross_ij``.
        bound: ``B``; ``ε = (√n − 1) / √n``.

    Raises:
        RuntimeError: if the solver finds no solution.
    """
    n, m = cross.shape
    slack = (np.sqrt(n) - 1) / np.sqrt(n)
    solver = osqp.OSQP()
    solver.setup(
        sparse.csc_matrix(np.triu(source + 1e-8 * np.eye(n))),
        -n / m * cross.sum(1),
        sparse.vstack([sparse.csc_matrix(np.ones((1, n))), sparse.eye(n)], format="csc"),
        np.concatenate([[n * (1 - slack)], np.zeros(n)]),
        np.concatenate([[n * (1 + slack)], np.full(n, bound)]),
        verbose=False,
        eps_abs=1e-5,
        eps_rel=1e-5,
        max_iter=20_000,
    )
    found = solver.solve(raise_error=False)
    if found.info.status not in ("solved", "solved inaccurate"):
        raise RuntimeError(f"The quadratic program of {n} weights was not solved: {found.info.status}.")
    return np.clip(np.asarray(found.x), 0, bound)


def gaussian(a: Array, b: Array, width: float) -> Array:
    """``exp(−|a−b|² / 2σ²)``, ``[n, m]``, of samples ``[n, D]`` and ``[m, D]``; ``width`` is σ."""
    result: Array = np.exp(cdist(a, b, "sqeuclidean") / (-2 * width**2))
    return result


def median_distance(x: Array) -> float:
    """The median distance of pairs of different samples ``[n, D]``; 1 if there are none."""
    apart = pdist(x)
    return float(np.median(apart)) if apart.any() else 1.0


def classify(x: Array, y: NDArray[np.int64], weight: Array) -> LogisticRegression | Constant:
    """A logistic regression of samples with positive weights."""
    own = weight > 1e-6
    x, y, weight = x[own], y[own], weight[own]
    if len(np.unique(y)) < 2:
        return Constant(int(y[0]) if len(y) else 0)
    return LogisticRegression(max_iter=300).fit(x, y, weight)


class Constant:
    """Always the same label: what can be learned from no labels, or from those of one class."""

    def __init__(self, label: int) -> None:
        self.label = label

    def predict(self, x: Array) -> NDArray[np.int64]:
        """Labels ``[n]``."""
        return np.full(len(x), self.label)
