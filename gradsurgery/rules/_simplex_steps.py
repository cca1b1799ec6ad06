"""What SDMGrad and MoDo share: weights on the simplex that are kept from step to step."""

from __future__ import annotations

import torch
from torch import Tensor


def projected(point: Tensor, active: Tensor) -> Tensor:
    """The nearest points of the simplex, ``[G, K]``; absent tasks have weight zero.

    Held, Wolfe and Crowder 1974; see Duchi et al., ICML 2008, Figure 1.
    """
    # What all have in common changes nothing, and would take the digits of the rest.
    point = point - point.masked_fill(~active, -torch.inf).amax(-1, keepdim=True) if point.numel() else point
    ranked = point.masked_fill(~active, -torch.inf).sort(-1, descending=True).values
    ranks = torch.arange(1, point.shape[-1] + 1, dtype=point.dtype, device=point.device)
    excess = (ranked.cumsum(-1) - 1) / ranks
    last = ((ranked > excess).sum(-1, keepdim=True) - 1).clamp(min=0)
    return torch.where(active, (point - excess.gather(-1, last)).clamp_min(0), 0.0)


def conditional(weights: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[G, K]`` of the tasks that are there, adding up to 1, and what they added up to before ``[G, 1]``."""
    part = torch.where(active, weights, 0.0)
    total = part.sum(-1, keepdim=True)
    equal = active / active.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(total > 0, part / total, equal), total
