"""The discriminator gate on whole tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from .._transfer import DiscriminatorGate
from ._weighing import who_is_there
from ._weights import check_names


@dataclass(frozen=True, repr=False)
class TaskGate(Rule):
    r"""Weighs each task's loss by how much its samples resemble those of the target task, as a gate sees it.

    With the gate's density ratios ``omega``, and the mean over the samples of task ``k`` in :meth:`DiscriminatorGate.see`,

    ``w_k = scale E_k[omega]``, or with ``mean="geometric"``, ``w_k = scale e^(E_k[log omega])``,

    and ``w_target = 1``. The means are averaged over steps: ``m <- (1 - beta) m + beta E_k``.

    Args:
        gate: the gate, made with ``tasks=[...]``.
        target: name of the target task.
        beta: how much of each step's mean comes into the average; 1 for that of the last step alone.
        mean: ``"arithmetic"`` or ``"geometric"``.

    State:
        All ``[K]``: ``"slot"``, the task's index in the gate; ``"mean"``, of ratios or of their logs; ``"seen"``, whether
        there is one.

    Raises:
        TypeError: if ``gate`` is no gate.
        ValueError: for settings out of range, and for a target and tasks that the gate does not have.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gate = gs.DiscriminatorGate(features=4, classes=2, tasks=["de", "fr"])
        >>> rule = gs.Chain(gs.TaskGate(gate, "de"), gs.PCGrad())
        >>> gate.see(torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]), ["de", "fr", "fr", "de", "fr", "fr"])
        >>> weights, state = rule.weigh(torch.ones(2), rule.init(["de", "fr"], ["model"]))
        >>> float(weights[0])
        1.0

    Reference:
        Wang, Dai, Póczos, Carbonell, *Characterizing and Avoiding Negative Transfer*, CVPR 2019 (arXiv:1811.09751);
        Z. Wang's thesis, Equations 3.8 and 3.9.

    Note:
        The papers weigh samples; here, a task takes the place of a sample. Train the gate on the target against *all* other
        tasks together: ``D`` then compares each task with their mixture. Against a single task, the mean ratio of that
        task's own samples is 1 whatever they are: ``E_S[P_T / P_S] = 1``. The geometric mean, ``e^-KL(S || T)``, is not,
        and is less moved by single samples. A task that the gate has not seen yet has the weight 1. What the gate noted is
        in its own ``state_dict``, the average in the optimizer's. In data-parallel training, each process has to note the
        same: let :meth:`~DiscriminatorGate.see` have the samples of all.
    """

    scale_equivariant: ClassVar[bool] = True

    gate: DiscriminatorGate
    target: str
    beta: float = 0.1
    mean: str = "arithmetic"

    def __post_init__(self) -> None:
        if not isinstance(self.gate, DiscriminatorGate):
            raise TypeError(f"`gate` must be a DiscriminatorGate. Found {type(self.gate).__name__}.")
        if not self.gate.tasks:
            raise ValueError("`gate` knows no tasks: make it with tasks=[...], their names.")
        if self.target not in self.gate.tasks:
            raise ValueError(f"`target` must be one of the gate's tasks, {list(self.gate.tasks)}. Found {self.target!r}.")
        if not 0 < self.beta <= 1:
            raise ValueError(f"`beta` must be in (0, 1]. Found beta={self.beta!r}.")
        if self.mean not in ("arithmetic", "geometric"):
            raise ValueError(f"`mean` must be 'arithmetic' or 'geometric'. Found {self.mean!r}.")

    def __repr__(self) -> str:
        # By its settings, not its weights: a checkpoint knows its rule by this.
        gate = f"DiscriminatorGate({self.gate.extra_repr()})"
        return f"TaskGate(gate={gate}, target={self.target!r}, beta={self.beta!r}, mean={self.mean!r})"

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        check_names("target", [self.target], tasks, self)
        if unknown := [task for task in tasks if task not in self.gate.tasks]:
            raise ValueError(f"TaskGate's gate knows the tasks {list(self.gate.tasks)}, but not {unknown}.")
        return {
            "slot": torch.tensor([self.gate.tasks.index(task) for task in tasks], device=device),
            "mean": torch.zeros(len(tasks), device=device, dtype=dtype),
            "seen": torch.zeros(len(tasks), device=device, dtype=torch.bool),
        }

    def weigh(
        self, losses: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        gate, slot, mean = self.gate, state["slot"], state["mean"]
        geometric = self.mean == "geometric"
        noted = (gate.task_logit if geometric else gate.task_ratio).to(mean).index_select(0, slot)
        there = who_is_there(losses, active)
        known = there & gate.task_seen.to(mean.device).index_select(0, slot)
        mean = torch.where(known, torch.where(state["seen"], torch.lerp(mean, noted, self.beta), noted), mean)
        seen = state["seen"] | known
        weights = torch.where(seen, (mean.exp() if geometric else mean) * gate.scale, 1.0)
        weights = torch.where(there & (slot != gate.tasks.index(self.target)), weights, 1.0)
        return weights.to(losses.dtype), {"slot": slot, "mean": mean, "seen": seen}
