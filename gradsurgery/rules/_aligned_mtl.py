"""Aligned-MTL: independent component alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._solvers import looks, precise
from ._weights import Weighted, Weights, operated, shares


@dataclass(frozen=True)
class AlignedMTL(Weighted, Rule):
    r"""Makes the tasks' gradients orthogonal and equally long, by as small a change as possible, and averages them.

    With the eigenvectors ``V`` and eigenvalues ``l`` of the Gram matrix that are not zero,

    ``g'_i = w_i sum_j B_ij g_j``,  ``B = sqrt(s) V diag(l^-1/2) V^T``,

    where ``s`` is the smallest of the eigenvalues, or their median or mean.

    Args:
        scale: ``s``: ``"min"``, for which convergence is proven; ``"median"``; or ``"rmse"``, their mean.
        weights: preferences ``w`` by task, in proportion to which the aligned gradients are averaged; 1 for tasks that are
            not named. None: equal ones.

    Raises:
        ValueError: for another scale, weights that are negative, and names that are no tasks.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), gs.AlignedMTL())
        tensor([0.5000, 0.5000])

    Reference:
        Senushkin et al., *Independent Component Alignment for Multi-Task Learning*, CVPR 2023 (arXiv:2305.19000), Algorithm
        1.

    Note:
        Eigenvalues below ``K eps`` times the largest count as zero, with the ``eps`` of float32, as in the authors' code:
        Gram matrices may be from products in float32. TorchJD's ``eps`` is that of the dtype, so that it differs for
        gradients in float64 that are nearly dependent. If all are zero, the gradients stay as they are. The decomposition
        waits for the device where PyTorch's eigensolver does.
    """

    scale_equivariant: ClassVar[bool] = True

    scale: str = "min"
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if self.scale not in ("min", "median", "rmse"):
            raise ValueError(f"`scale` must be 'min', 'median' or 'rmse'. Found scale={self.scale!r}.")
        super().__post_init__()

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        matrix, tasks = precise(gram), gram.shape[-1]
        if active is not None:
            matrix = torch.where(active[:, :, None] & active[:, None, :], matrix, 0.0)
        matrix = matrix / matrix.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
        # The eigensolver must not see what is not finite: the rows are not either, and so neither is the result.
        usable = matrix.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        everywhere = looks(gram) and bool(usable.all())
        values, vectors = torch.linalg.eigh(matrix if everywhere else torch.where(usable, matrix, 0.0))
        kept = values > tasks * torch.finfo(torch.float32).eps * values[:, -1:]
        rank = kept.sum(-1, keepdim=True)
        if self.scale == "rmse":
            scale = torch.where(kept, values, 0.0).sum(-1, keepdim=True) / rank.clamp(min=1)
        else:  # eigenvalues increase, and the kept ones are the last; of an even number, the lower median
            place = tasks - rank + (0 if self.scale == "min" else (rank - 1).div(2, rounding_mode="floor"))
            scale = values.gather(-1, place.clamp(0, tasks - 1))
        factors = torch.where(kept, (scale / values).sqrt(), 0.0)
        balance = torch.bmm(vectors * factors.unsqueeze(-2), vectors.mT)
        if not everywhere:
            eye = torch.eye(tasks, dtype=balance.dtype, device=gram.device)
            balance = torch.where(rank.unsqueeze(-1) > 0, balance, eye)
        return operated(shares(gram, state, active).unsqueeze(-1) * balance, gram, active), state
