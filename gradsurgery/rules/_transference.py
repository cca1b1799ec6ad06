"""Transference: what each task's gradient does for the other tasks' losses, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from .._rule import Rule, State

if TYPE_CHECKING:
    from .._optimizer import SurgeryOptimizer
    from .._step import Step

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TransferMatrix:
    """What :class:`Transference` has measured: ``[g, j, i]`` is what source ``j`` does for target ``i`` in group ``g``.

    Positive is help: so much of ``i``'s loss goes away.

    Attributes:
        tasks: names of the ``K`` tasks.
        groups: names of the ``G`` surgery groups.
        mean: ``[G, K, K]``, the moving average of single steps; nan for pairs that never met in the group.
        total: ``[G, K, K]``, the sum over all steps.
        steps: ``[G, K, K]``, in how many steps the pair met.
    """

    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    mean: Floats
    total: Floats
    steps: Floats

    @property
    def matrix(self) -> Floats:
        """``[K, K]``, source by target, the sum over all steps and groups; nan for pairs that never met."""
        return np.where(self.steps.any(0), self.total.sum(0), np.nan)

    def of(self, source: str, target: str) -> float:
        """What ``source`` has done for ``target``, over all steps and groups.

        Raises:
            ValueError: for names that are no tasks.
        """
        return float(self.matrix[self._index(source), self._index(target)])

    def ranked(self, target: str) -> list[tuple[str, float]]:
        """The other tasks, most helpful first, and what they have done for ``target``; without those that never met it.

        Raises:
            ValueError: for a name that is no task.
        """
        column = self.matrix[:, self._index(target)]
        found = [(task, float(value)) for task, value in zip(self.tasks, column, strict=True) if task != target]
        return sorted((pair for pair in found if pair[1] == pair[1]), key=lambda pair: -pair[1])

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise ValueError(f"There is no task {task!r}: the tasks are {list(self.tasks)}.")
        return self.tasks.index(task)

    def __str__(self) -> str:
        cells = [["source \\ target", *self.tasks]]
        cells += [[task, *(f"{value:+.3g}" for value in row)] for task, row in zip(self.tasks, self.matrix, strict=True)]
        first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
        lines = ([row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in cells)
        return "\n".join("  ".join(line) for line in lines)


@dataclass(frozen=True)
class Transference(Rule):
    r"""Observes how much each task's gradient lowers the other tasks' losses, at the price of the Gram matrices alone.

    A step of SGD on ``j``'s loss alone, ``x <- x - lr w_j g_j``, changes the loss of ``i`` by ``-lr w_j <g_i, g_j>`` to
    first order, so that the lookahead ratio of the losses before and after it is

    ``Z_ji = 1 - L_i(after) / L_i(before) = lr w_j <g_i, g_j> / L_i``,

    with the rule's weights of losses ``w``. For each surgery group it keeps the moving average of single steps,
    ``m <- (1 - beta) m + beta Z``, and their sum. Gradients are left as they are.

    Args:
        lr: learning rate; what is measured is in proportion to it.
        relative: divide by the loss, as the lookahead ratio does; or not, for losses that may be zero or negative.
        beta: how much of each step comes into the moving average.

    State:
        All ``[G, K, K]``, source by target: ``"mean"``, ``"total"`` and ``"steps"``, in how many steps the pair met.

    Raises:
        ValueError: for settings out of range.

    Example:
        >>> import torch, gradsurgery as gs
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> rule = gs.Transference(lr=0.1)
        >>> opt = gs.SurgeryOptimizer(torch.optim.SGD([x], lr=0.1), gs.Chain(rule, gs.PCGrad()))
        >>> opt.backward({"a": x.square().sum(), "b": x[0].square(), "c": -x[1] + 3})
        >>> opt.step()
        >>> print(rule.read(opt))
        source \ target     a     b     c
        a                +0.4  +0.4  -0.1
        b                +0.2  +0.4    +0
        c                -0.1    +0 +0.05

    Reference:
        Fifty et al., *Efficiently Identifying Task Groupings for Multi-Task Learning*, NeurIPS 2021, Section 3
        (arXiv:2109.04617).

    Note:
        TAG evaluates the losses after each lookahead step; this is its first order, at no extra pass. It does not see
        curvature; what the optimizer inside makes of a gradient (momentum, Adam's preconditioner); what the rule makes of
        it; nor what a source does by way of parameters that the target does not reach. Heads add nothing to a pair. With
        ``every=n``, only the steps with surgery are seen. A pair whose ratio is not finite, as where the target's loss is
        zero, is left out of that step.
    """

    scale_equivariant: ClassVar[bool] = True

    lr: float = 1.0
    relative: bool = True
    beta: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"`lr` must be positive. Found lr={self.lr!r}.")
        if not 0 < self.beta <= 1:
            raise ValueError(f"`beta` must be in (0, 1]. Found beta={self.beta!r}.")

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        shape = (len(groups), len(tasks), len(tasks))
        return {key: torch.zeros(shape, device=device, dtype=dtype) for key in ("mean", "total", "steps")}

    def observe(self, step: Step, state: State) -> State:
        mean = state["mean"]
        ratio = self.lr * step.gram
        if step.loss_weights is not None:  # gram has both tasks' weights; the target's loss is measured without its own
            ratio = ratio / step.loss_weights
        if self.relative:
            ratio = ratio / step.losses
        met = step.active[:, :, None] & step.active[:, None, :] & ratio.isfinite()
        ratio = torch.where(met, ratio, 0.0).to(mean.dtype)
        if step.group_of is not None:  # a group of several cells: inner products add up
            index = step.group_of
            ratio = torch.zeros_like(mean).index_add(0, index, ratio)
            met = torch.zeros_like(mean).index_add(0, index, met.to(mean.dtype)) > 0
        old, new = state["steps"], torch.lerp(mean, ratio, self.beta)
        return {
            "mean": torch.where(met, torch.where(old > 0, new, ratio), mean),
            "total": torch.where(met, state["total"] + ratio, state["total"]),
            "steps": torch.where(met, old + 1, old),
        }

    def read(self, optimizer: SurgeryOptimizer) -> TransferMatrix:
        """What was measured so far. Waits for the device.

        Args:
            optimizer: made with this rule, or with a chain that holds it.

        Raises:
            ValueError: if it was not, and before its tasks are known.
        """
        state: Any = optimizer.rule_state
        for i, part in enumerate(getattr(optimizer.rule, "rules", ())):
            if part == self:
                state = state.get(str(i), {})
                break
        else:
            if optimizer.rule != self:
                raise ValueError(f"The optimizer's rule is {optimizer.rule}, without {self}.")
        if optimizer.tasks is None:
            raise ValueError("The optimizer does not know its tasks yet: take a step first, or make it with tasks=[...].")
        values = {key: value.double().cpu().numpy() for key, value in state.items()}
        mean = np.where(values["steps"] > 0, values["mean"], np.nan)
        return TransferMatrix(optimizer.tasks, tuple(optimizer.groups), mean, values["total"], values["steps"])
