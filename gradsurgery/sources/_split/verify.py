"""A check of the single pass against a plain backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..._buffer import Rows


def precision(nodes: Sequence[Node]) -> float:
    """The machine precision of the coarsest gradients of a graph."""
    dtypes = {output.dtype for node in nodes for output in node._input_metadata}
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)


@torch.no_grad()
def differences(rows: Sequence[Rows], weights: Tensor, plain: Sequence[Tensor | None]) -> Tensor:
    """How far each parameter's rows are from a plain gradient of the losses, weighted by task.

    Args:
        rows: of each parameter.
        weights: of the tasks, ``[K]``.
        plain: for each parameter, ``sum_k w_k dL_k/dp``.

    Returns:
        For each parameter, the norm of the difference of ``sum_k w_k row_k`` and ``plain``, in units of
        ``sum_k w_k ||row_k||`` or of ``||plain||``, whichever is larger; or of a hundredth of that of all parameters
        together, since a gradient that ought to be zero is rounding.
    """
    off, scales = [], []
    for own, expected in zip(rows, plain, strict=True):
        difference = torch.zeros((), device=weights.device, dtype=torch.float64)
        scale = difference
        total: Tensor | None = None
        for task, row in own.of.items():
            dense = (row.to_dense() if row.is_sparse else row).to(_wide(row))
            weighted = dense * weights[task].to(dense.device, dense.real.dtype)
            total = weighted if total is None else total + weighted
            scale = scale + weighted.norm().to(scale)
        if expected is not None:
            dense = (expected.to_dense() if expected.is_sparse else expected).to(_wide(expected))
            total = -dense if total is None else total - dense
            scale = torch.maximum(scale, dense.norm().to(scale))
        if total is not None:
            difference = total.norm().to(scale)
            if expected is not None:  # where that is not finite, nothing can be said
                difference = torch.where(dense.isfinite().all().to(scale.device), difference, 0.0)
        off.append(difference)
        scales.append(torch.where(scale.isfinite(), scale, 0.0))
    each = torch.stack(scales)
    return torch.stack(off) / torch.maximum(each, each.norm() / 100).clamp_min(torch.finfo(each.dtype).tiny)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
