"""PCGrad: project conflicting gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._walk import Walk, random_order
from ._weights import Weighted, Weights, weighted


@dataclass(frozen=True)
class PCGrad(Weighted, Rule):
    r"""Projects each task's gradient onto the normal plane of every gradient that it conflicts with.

    Starting from ``g'_i = g_i``, for ``j != i`` in random order: if ``<g'_i, g_j> < 0``,

    ``g'_i <- g'_i - <g'_i, g_j> / ||g_j||^2  g_j``.

    The ``g_j`` are the original gradients; each task of each group draws an order of its own.

    Args:
        weights: by task, what its projected gradient is multiplied with; 1 for tasks that are not named.

    Raises:
        ValueError: for weights that are negative, and for names that are no tasks.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), gs.PCGrad())
        tensor([-0.5000,  1.5000])

    Reference:
        Yu et al., *Gradient Surgery for Multi-Task Learning*, NeurIPS 2020 (arXiv:2001.06782), Algorithm 1.

    Note:
        As in the paper the result is the *sum* of the ``g'_i``; much published code takes the mean, which is
        ``Chain(PCGrad(), Mean())``. The paper has no weights: ours change no projection, where a weighted loss would
        lengthen ``g_i`` before others meet it. A zero gradient is neither projected nor projected on.
    """

    random: ClassVar[bool] = True
    scale_equivariant: ClassVar[bool] = True

    weights: Weights | None = None

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        square = gram.diagonal(dim1=-2, dim2=-1)
        # Minus one over the squares. <g'_i, g_j> is zero where g_j is, so that any finite value will do there.
        scale = square.neg().clamp_max_(-torch.finfo(gram.dtype).tiny).reciprocal_()
        if active is not None:
            scale *= active
        walk = Walk(gram.shape, random_order(gram, generator))
        conflicts = walk.run(gram, gram * scale[:, :, None], lambda s, product: product.clamp_max_(0))
        mixing = walk.by_pair(conflicts, torch.zeros_like(gram)).mul_(scale[:, None, :])
        if active is not None:
            mixing *= active[:, :, None]
        mixing.diagonal(dim1=-2, dim2=-1).fill_(1)
        return weighted(mixing, state, active), state
