"""IMTL-G: impartial multi-task learning, by gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._solvers import directions, least_squares, looks, precise
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
        weights = _impartial(gram, active)
        weights = weights / weights.sum(-1, keepdim=True)
        if not (looks(gram) and weights.numel() and gram.shape[-1] * float(weights.abs().amax()) < 1e12):  # a quicker test
            weights = torch.where(weights.abs().sum(-1, keepdim=True) < 1e12, weights, 0.0)
        return diagonal(weights, gram, active), state


def _impartial(gram: Tensor, active: Tensor | None) -> Tensor:
    """Weights ``[G, K]`` that do not add up to 1 yet."""
    if not looks(gram):
        return _by_directions(gram, active)
    # Of independent gradients, without a detour by their cosines. Both tests are those of least_squares.
    gram = precise(gram)
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    factor, info = torch.linalg.cholesky_ex(gram)
    half = torch.linalg.solve_triangular(factor, norms.unsqueeze(-1), upper=False)  # quicker than cholesky_solve
    weights: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(-1)
    fine = (factor.diagonal(dim1=-2, dim2=-1) > 1e-2 * norms).logical_and_((weights * norms).abs_() <= 1e3)
    if active is not None:
        fine &= active
    if not bool(fine.all()) or bool(info.any()):
        index = (fine.all(-1) & (info == 0)).logical_not_().nonzero().squeeze(1)
        weights[index] = _by_directions(gram[index], None if active is None else active[index])
    return weights


def _by_directions(gram: Tensor, active: Tensor | None) -> Tensor:
    cosines, norms, there = directions(gram, active)
    return least_squares(cosines, there.to(cosines.dtype)) / norms
