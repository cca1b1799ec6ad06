"""FairGrad: fair resource allocation among tasks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._rule import Rule, State
from ._solvers import balanced, directions
from ._weights import diagonal


@dataclass(frozen=True)
class FairGrad(Rule):
    r"""An ``alpha``-fair share of the step for each task: ``g'_i = w_i g_i``, where ``w > 0`` solves

    ``G w = w^(-1 / alpha)``.

    ``alpha = 1`` is Nash-MTL (proportional fairness); as ``alpha`` grows, all tasks improve at the same rate (max-min
    fairness); as it goes to zero, ``w`` becomes constant (the plain sum).

    Args:
        alpha: the kind of fairness, positive. In the paper's experiments 1, 2, 5 and 10.

    Raises:
        ValueError: if ``alpha`` is not positive and finite.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[8.0, 0.0], [0.0, 1.0]]), gs.FairGrad(alpha=2.0))  # w = (1/16, 1)
        tensor([0.5000, 1.0000])

    Reference:
        Ban and Ji, *Fair Resource Allocation in Multi-Task Learning*, ICML 2024 (arXiv:2402.15638), Equations 4 and 5,
        Algorithm 1.

    Note:
        The paper gives the equations to a general least-squares solver with bounds, and so does TorchJD, which starts at
        equal weights: for gradients shorter than 1e-3, or of very different lengths, it stops far from the solution. We
        take Newton steps, of which a dozen will do whatever the lengths. At a Pareto-stationary point there is no solution,
        and ours is that of ``G + 1e-6 I`` for unit gradients. A zero gradient takes no part. The combined gradient does not
        grow in proportion to the tasks' gradients, as the equations say.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"`alpha` must be positive and finite. Found alpha={self.alpha!r}.")

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        cosines, norms, there = directions(gram, active)
        power = 1 / self.alpha
        # With w = v / ||g||:  C v = ||g||^(p - 1) v^-p. Tasks that are not there are alone, and must not set the scale.
        length = norms.log()
        largest = torch.where(there, (power - 1) * length, -torch.inf).amax(-1, keepdim=True) if norms.numel() else length
        target = torch.where(there, (power - 1) * length, largest.clamp_min(-1e3))
        return diagonal(balanced(cosines, target, power, "FairGrad") / norms, gram, active), state
