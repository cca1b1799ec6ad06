"""TCA: a few directions of a kernel's feature space in which the domains are close and the data spread.

Reference:
    Pan, Tsang, Kwok, Yang, *Domain Adaptation via Transfer Component Analysis*, IEEE Transactions on Neural Networks 2011,
    Eq. 8 and Section III-B.

Note:
    Components are found from at most 400 samples of each domain; all others are mapped by their kernel with these.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from sklearn.linear_model import LogisticRegression

from ..protocol import Problem
from ._kmm import Array, Constant, classify, gaussian, median_distance


class TCA:
    """A logistic regression on transfer components of source and labelled target samples.

    Args:
        problem: the data.
        seed: of the samples that the components are found from, ``at_most`` of each domain.
        components: how many.
        mu: what the components' length costs.
    """

    def __init__(self, problem: Problem, seed: int, *, components: int = 50, mu: float = 1.0, at_most: int = 400) -> None:
        random = np.random.default_rng(seed)
        self.problem, self.components, self.mu = problem, components, mu
        self.source, self.target = (
            x[random.permutation(len(x))[:at_most]].double().numpy() for x in (problem.x, problem.x_unlabelled)
        )

    def fit(self) -> TCA:
        """Finds the components, and then learns the labels."""
        problem = self.problem
        self.model: LogisticRegression | Constant = Constant(0)
        if len(self.source) and len(self.target):
            self.anchors = np.concatenate([self.source, self.target])
            self.width = median_distance(self.anchors)
            kernel = gaussian(self.anchors, self.anchors, self.width)
            self.directions = components(kernel, len(self.source), self.mu, self.components)
            self.directions /= self.map(self.anchors).std()
            x, y = torch.cat([problem.x, problem.x_labelled]), torch.cat([problem.y, problem.y_labelled])
            self.model = classify(self.map(x.double().numpy()), y.numpy(), np.ones(len(x)))
        return self

    def map(self, x: Array) -> Array:
        """Components ``[n, components]`` of images ``[n, 256]``."""
        return gaussian(x, self.anchors, self.width) @ self.directions

    def predict(self, x: Array) -> NDArray[np.int64]:
        """Labels ``[n]`` of images ``[n, 256]``."""
        found: NDArray[np.int64] = self.model.predict(x if isinstance(self.model, Constant) else self.map(x))
        return found


def components(kernel: Array, sources: int, mu: float, count: int) -> Array:
    """Directions ``W`` ``[n, count]`` with ``Wᵀ(KLK + μI)W = I`` and the largest ``tr WᵀKHKW``, largest first.

    ``L = ℓℓᵀ`` with ``ℓ = 1/n_s`` for source and ``−1/n_t`` for target samples measures how far apart the domains' means
    are; ``H`` centres.

    Args:
        kernel: ``K`` ``[n, n]``, source samples first.
        sources: how many of these, ``n_s``.
        mu: what the directions' length costs; above 0.
        count: how many directions; at most ``n``.
    """
    n = len(kernel)
    sign = np.where(np.arange(n) < sources, 1 / sources, -1 / (n - sources))
    means = kernel @ sign
    centred = kernel - kernel.mean(0)  # HK, so that KHK = (HK)ᵀ(HK)
    count = min(count, n)
    _, found = eigh(centred.T @ centred, np.outer(means, means) + mu * np.eye(n), subset_by_index=(n - count, n - 1))
    result: Array = found[:, ::-1]
    return result
