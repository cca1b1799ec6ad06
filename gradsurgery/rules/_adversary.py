"""Adversarial training as surgery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._weights import check_names, diagonal, marked, task_names

if TYPE_CHECKING:
    from .._step import Step


@dataclass(frozen=True)
class Adversary(Rule):
    r"""Reverses the gradients of adversarial tasks, in the parameters that other tasks reach too.

    ``g'_a = -mu g_a`` for an adversary ``a`` where a task that is none is also there; ``g'_a = g_a`` elsewhere, and all
    other tasks keep their gradients. So a discriminator descends its loss, and the encoder that it shares with a classifier
    ascends it. With ``steps``, the strength rises from 0 to ``mu`` over the training,

    ``mu(p) = mu (2 / (1 + e^(-10 p)) - 1)``, ``p = step / steps``, at most 1.

    Args:
        tasks: name of the adversary, or names of several.
        mu: how strongly features are driven against the adversaries.
        steps: of the whole training; None means the full strength from the start.

    State:
        ``"adversary"``: ``[G, K]``, which tasks are adversaries; ``"step"``: how many steps there have been.

    Raises:
        ValueError: without a name, for names that are no tasks, and for settings out of range.

    Example:
        >>> import torch, gradsurgery as gs
        >>> jacobian = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # of "0", a class loss, and "1", a discriminator's
        >>> gs.operate(jacobian, gs.Adversary("1", mu=0.5))
        tensor([ 0.5000, -0.5000])
        >>> gs.operate(jacobian, gs.Chain(gs.Adversary("1"), gs.PCGrad()))  # the reversed gradient is what conflicts
        tensor([ 0.5000, -1.5000])

    Reference:
        Ganin et al., *Domain-Adversarial Training of Neural Networks*, JMLR 2016, Equations 13 to 15
        (arXiv:1505.07818); Z. Wang's thesis, Equation 3.5.

    Note:
        It equals a gradient reversal layer between the encoder and the discriminators, where each adversary has
        discriminators of its own, or all of them the same. What tells encoder and discriminator apart is who reached a
        parameter in this step: in a step without any other task, the adversaries' gradients are not reversed. With
        ``backward(..., features=z)``, what several tasks reach past the features is combined as the features are: there,
        give each adversary a discriminator of its own, or else it is reversed too. Steps count those with surgery: with
        ``every=n``, divide ``steps`` by ``n``. A step whose Gram matrix is not finite does not count.
    """

    scale_equivariant: ClassVar[bool] = True

    tasks: str | Sequence[str]
    mu: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        names = (self.tasks,) if isinstance(self.tasks, str) else self.tasks
        object.__setattr__(self, "tasks", task_names("tasks", names))
        if not 0 <= self.mu < float("inf"):
            raise ValueError(f"`mu` must be finite and not negative. Found mu={self.mu!r}.")
        if self.steps is not None and (isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1):
            raise ValueError(f"`steps` must be the number of steps of the training, or None. Found steps={self.steps!r}.")

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        check_names("tasks", self.tasks, tasks, self)
        step = torch.zeros((), device=device, dtype=dtype)
        return {"adversary": marked(self.tasks, tasks, groups, device), "step": step}

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        adversary = state["adversary"]
        others = ~adversary if active is None else ~adversary & active
        reverse = adversary & others.any(-1, keepdim=True)
        return diagonal(torch.where(reverse, -self._strength(state["step"]).to(gram.dtype), 1.0), gram, active), state

    def observe(self, step: Step, state: State) -> State:
        counted = step.gram.isfinite().all()
        return {**state, "step": state["step"] + counted.to(state["step"])}

    def _strength(self, step: Tensor) -> Tensor:
        if self.steps is None:
            return torch.full_like(step, self.mu)
        return self.mu * torch.tanh(5 * (step / self.steps).clamp_max(1))  # tanh(x) = 2 / (1 + e^(-2x)) - 1
