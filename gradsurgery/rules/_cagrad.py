"""CAGrad: conflict-averse gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._complementarity import complementary, lifted
from ._solvers import UNSOLVED, directions, looks, warn
from ._weights import diagonal, shares

_STEPS = 20  # far more than are needed, unless a step is limited by rounding


@dataclass(frozen=True)
class CAGrad(Rule):
    r"""Near the average gradient, the direction that is best for the task that gains least by it:

    ``max_d min_i <g_i, d>``  subject to  ``||d - g_0|| <= c ||g_0||``, with the average ``g_0`` of the gradients.

    Its solution is ``d = g_0 + c ||g_0|| / ||g_w|| g_w``, where ``g_w = sum_i w_i g_i`` has the weights, not negative and
    of sum 1, that minimise ``<g_w, g_0> + c ||g_0|| ||g_w||``.

    Args:
        c: how far to go from the average, in [0, 1): 0 is the mean; as ``c`` grows, conflicts are avoided more.

    Raises:
        ValueError: for another ``c``.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), gs.CAGrad(c=0.5))
        tensor([1.5000, 1.5000])

    Reference:
        Liu, Liu, Jin, Stone and Liu, *Conflict-Averse Gradient Descent for Multi-Task Learning*, NeurIPS 2021
        (arXiv:2110.14048), Algorithm 1.

    Note:
        The authors' code divides the result by ``1 + c^2``; the paper does not, and neither do we. They leave the problem
        to a general solver, and so does TorchJD: within 1e-8 of the best objective, which is up to 1e-4 of the result's
        length away from the solution. Ours is less than 1e-8 away. We look for the gain ``m = min_i <g_i, d>`` by Newton
        steps: the nearest ``d`` to ``g_0`` with ``<g_i, d> >= m`` is further away the larger ``m`` is, in a convex way.
        Where ``g_w`` is zero its direction is not defined: each gradient gets a common part, of 1e-5 of its length. TorchJD
        returns zero there, and where ``g_w`` is short (``norm_eps``).
    """

    scale_equivariant: ClassVar[bool] = True

    c: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.c < 1:
            raise ValueError(f"`c` must be in [0, 1). Found c={self.c!r}.")

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        average = shares(gram, state, active)
        if not self.c or not gram.numel():
            return diagonal(average, gram, active), state
        cosines, norms, there = directions(gram, active)
        norms = norms * there
        longest = norms.amax(-1, keepdim=True)
        norms = norms / torch.where(there.any(-1, keepdim=True), longest, 1.0)
        inverse = torch.where(there, 1 / norms, 0.0)
        both = there[:, :, None] & there[:, None, :]
        cosines = cosines + 1e-10 * both
        cosines = lifted(cosines) if looks(gram) else cosines
        products = (cosines @ (average * norms)[..., None]).squeeze(-1)  # <g_i, g_0> / ||g_i||
        radius = self.c * (average * norms * products).sum(-1, keepdim=True).clamp_min(0).sqrt()
        # A zero gradient gains nothing, so that the least gain is zero at most. Else it is at most that of one g_w = g_i.
        zero = ~there if active is None else active & ~there
        cap = torch.where(zero.any(-1, keepdim=True), 0.0, torch.inf).to(norms)
        gain = torch.where(there, norms * (products + radius), cap).amin(-1, keepdim=True)
        multiples = None
        for _ in range(_STEPS):
            multiples = complementary(cosines, (products - gain * inverse).unsqueeze(1), "CAGrad", start=multiples)
            distance = (torch.bmm(multiples, cosines) * multiples).sum(-1).clamp_min(0).sqrt()
            x = multiples.squeeze(1)
            total = (x * inverse).sum(-1, keepdim=True)
            change = torch.where(total > 0, (radius - distance) * distance / torch.where(total > 0, total, 1.0), 0.0)
            change = torch.minimum(change, cap - gain)
            error = change.abs() * total
            unfinished = error > 1e-10 * radius.square()
            if looks(gram) and not bool(unfinished.any()):
                break
            gain = torch.where(unfinished, gain + change, gain)  # so that no group depends on how long another takes
        if looks(gram) and bool((error > 1e-5 * radius.square()).any()):
            warn("CAGrad", f"stopped after {_STEPS} Newton steps", UNSOLVED)
        return diagonal(average + x * inverse, gram, active), state
