"""DAN: the maximum mean discrepancy of features, by five Gaussian kernels.

Reference:
    Long, Cao, Wang, Jordan, *Learning Transferable Features with Deep Adaptation Networks*, ICML 2015.

Note:
    On the features that the classifier sees; the paper matches three layers. The kernels weigh the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._deep import Deep, Seen


class DAN(Deep):
    """Adds the squared discrepancy to the loss."""

    matches = True

    def distance(self, seen: Seen) -> Tensor:
        """See :func:`mmd`."""
        return mmd(seen.source, seen.unlabelled)


def mmd(a: Tensor, b: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of ``[n, D]`` and ``[m, D]``, biased, by the sum of five Gaussian kernels.

    ``exp(-|a-b|² / σ²)`` with ``σ² = 2^k mean |·|²``, k = -3 … 1, the mean over all pairs of different samples, detached.
    """
    both = torch.cat([a, b])
    squares = both.square().sum(1)
    apart = (squares[:, None] + squares - 2 * both @ both.T).clamp_min(0)
    count = len(both)
    width = apart.detach().sum() / (count * (count - 1))
    kernel = sum(torch.exp(-apart / (width * 2.0**k).clamp_min(1e-12)) for k in range(-3, 2))
    assert isinstance(kernel, Tensor)
    n = len(a)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
