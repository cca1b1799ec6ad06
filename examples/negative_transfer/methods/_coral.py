"""Deep CORAL: covariances of features.

Reference:
    Sun, Saenko, *Deep CORAL: Correlation Alignment for Deep Domain Adaptation*, ECCV 2016 workshops.
"""

from __future__ import annotations

from torch import Tensor

from ._deep import Deep, Seen


class DeepCORAL(Deep):
    """Adds the squared distance of covariances to the loss."""

    matches = True

    def distance(self, seen: Seen) -> Tensor:
        """See :func:`coral`."""
        return coral(seen.source, seen.unlabelled)


def coral(a: Tensor, b: Tensor) -> Tensor:
    """``‖C_a − C_b‖² / (4 D²)`` of the covariances of ``[n, D]`` and ``[m, D]``."""
    return (a.T.cov() - b.T.cov()).square().sum() / (4 * a.shape[1] ** 2)
