"""IMTL-G: impartial multi-task learning, by gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._solvers import directions, least_squares
from ._weights import diagonal


@dataclass(frozen=True)
class IMTLG(Rule):
    r"""Weights with which the combined gradient has equal projections on all tasks' gradients: ``g'_i = w_i g_i``,

    ``<d, g_i> / ||g_i||`` is the same for all ``i``, with ``d = sum_i w_i g_i`` and ``sum_i w_i = 1``.

    Weights may be negative, where one gradient is long and others turn away from it.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), gs.IMTLG())  # w = (1/4, 3/4)
        tensor([0.7500, 0.7500])

    Reference:
        Liu et al., *Towards Impartial Multi-Task Learning*, ICLR 2021 (https://openreview.net/forum?id=IMPnRXEWpvr),
        Equation 5.

    Note:
        The paper's formula is for independent gradients. For others, we take the least-squares solution that is shortest in
        units of the gradients' lengths; TorchJD's is shortest by itself, which gives long gradients other weights. Zero
        gradients take no part. Where the weights cancel, so that no multiple of them adds up to 1, all are zero.
    """

    scale_equivariant: ClassVar[bool] = True

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        cosines, norms, there = directions(gram, active)
        weights = least_squares(cosines, there.to(cosines.dtype)) / norms
        weights = weights / weights.sum(-1, keepdim=True)
        return diagonal(torch.where(weights.abs().sum(-1, keepdim=True) < 1e12, weights, 0.0), gram, active), state
