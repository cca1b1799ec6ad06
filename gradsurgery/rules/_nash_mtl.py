"""Nash-MTL: multi-task learning as a bargaining game."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._rule import Rule, State
from ._solvers import balanced, directions, looks
from ._weights import diagonal


@dataclass(frozen=True)
class NashMTL(Rule):
    r"""The Nash bargaining solution of the tasks: ``g'_i = a_i g_i``, where ``a > 0`` solves

    ``G a = 1 / a``.

    No task's length makes a difference. For two tasks ``a_i = 1 / (||g_i|| sqrt(1 + cos))``.

    Args:
        update_every: the weights of a group are found anew at each so many of its steps, and kept in between.

    State:
        Only with ``update_every > 1``. ``"weights"``: ``[G, K]``, the weights ``a``. ``"age"``: ``[G, K]``, for how many
        steps they have served; zero for a task that has none yet.

    Raises:
        ValueError: if ``update_every`` is not a positive number of steps.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), gs.NashMTL())
        tensor([1., 1.])

    Reference:
        Navon et al., *Multi-Task Learning as a Bargaining Game*, ICML 2022 (arXiv:2202.01017), Claim 3.1 and Algorithm 1.

    Note:
        The paper approaches ``a`` by a sequence of convex problems for a general solver. ``a`` is the minimum of
        ``1/2 a^T G a - sum_i log a_i``, which we find by Newton steps. TorchJD does as the paper; its result, with
        ``max_norm=0``, is the same within 1e-5 unless the solver fails on one of these problems: the sequence ends there,
        and if it is the first, with the plain sum. The combined gradient has length ``sqrt(K)``, whatever the gradients:
        much published code cuts it to length 1 (``max_norm``), which we leave to the clipping of your choice. At a
        Pareto-stationary point there is no solution; we take that of ``G + 1e-6 I`` for unit gradients. A zero gradient
        takes no part.

        With ``update_every > 1`` the weights of a group's parameters that different sets of tasks reach are shared. Time is
        saved on the CPU only: elsewhere, looking whether they are due would wait for the device
        (``SurgeryOptimizer(every=...)`` saves more).
    """

    update_every: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.update_every, bool) or not isinstance(self.update_every, int) or self.update_every < 1:
            raise ValueError(f"`update_every` must be a number of steps, at least 1. Found {self.update_every!r}.")

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        if self.update_every == 1:
            return {}
        weights = torch.ones(len(groups), len(tasks), device=device, dtype=dtype)
        return {"weights": weights, "age": torch.zeros_like(weights, dtype=torch.int64)}

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        if self.update_every == 1:
            return diagonal(_weights(gram, active), gram, active), state
        old, age = state["weights"], state["age"]
        here = torch.ones_like(age, dtype=torch.bool) if active is None else active
        due = ((age % self.update_every == 0) & here).any(-1, keepdim=True)
        weights = old
        if not looks(gram) or bool(due.any()):
            weights = torch.where(due & here, _weights(gram, active).to(old.dtype), old)
        age = torch.where(here, torch.where(due, 1, age + 1), age)
        return diagonal(weights, gram, active), {"weights": weights, "age": age}


def _weights(gram: Tensor, active: Tensor | None) -> Tensor:
    cosines, norms, _ = directions(gram, active)
    return balanced(cosines, torch.zeros_like(norms), 1.0, "NashMTL") / norms
