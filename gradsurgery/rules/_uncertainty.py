"""Uncertainty weighting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._weighing import adam, check_positive, fresh_adam, named_tasks, who_is_there


@dataclass(frozen=True)
class UncertaintyWeighting(Rule):
    r"""Weighs each loss by the task's noise, which is learned beside the model.

    With ``s_i = log sigma_i^2``, minimises over the model and over ``s``

    ``sum_i 1/2 exp(-s_i) L_i + 1/2 s_i`` (regression) or ``sum_i exp(-s_i) L_i + 1/2 s_i`` (classification),

    so that the weight of a loss is ``1/2 exp(-s_i)``, or twice that. The ``s_i`` start at zero and follow Adam.

    Args:
        lr: learning rate of the ``s_i``.
        classification: names of the tasks whose loss is a cross-entropy; the others' are squared errors.

    State:
        ``"log_variance"``: ``[K]``, the ``s_i``; ``"adam"``: its moments, each ``[K]``; ``"scale"``: ``[K]``, 1/2 or 1.

    Raises:
        ValueError: for a learning rate that is not positive, and for names that are no tasks.

    Example:
        >>> import torch, gradsurgery as gs
        >>> rule = gs.UncertaintyWeighting(lr=0.5)
        >>> weights, state = rule.weigh(torch.tensor([8.0, 0.2]), rule.init(["far", "near"], ["model"]))
        >>> weights, state["log_variance"]  # of the first step, and what it leads to
        (tensor([0.5000, 0.5000]), tensor([ 0.5000, -0.5000], dtype=torch.float64))

    Reference:
        Kendall, Gal, Cipolla, *Multi-Task Learning Using Uncertainty to Weigh Losses*, CVPR 2018 (arXiv:1705.07115), the
        section on multi-task likelihoods, with ``s = log sigma^2`` as it suggests.

    Note:
        The paper trains ``s`` with the model's optimizer; here it has an Adam of its own, whose state is the rule's. The
        gradient of ``s`` needs nothing but the loss. Much published code uses the regression form for all losses, which is
        the default.
    """

    scale_equivariant: ClassVar[bool] = True

    lr: float = 1e-3
    classification: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        object.__setattr__(self, "classification", named_tasks("classification", self.classification))

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        if unknown := [name for name in self.classification if name not in tasks]:
            raise ValueError(f"UncertaintyWeighting's `classification` names {unknown}, but the tasks are {list(tasks)}.")
        scale = [1.0 if name in self.classification else 0.5 for name in tasks]
        return {
            "log_variance": torch.zeros(len(tasks), device=device, dtype=dtype),
            "adam": fresh_adam(len(tasks), device, dtype),
            "scale": torch.tensor(scale, device=device, dtype=dtype),
        }

    def weigh(
        self, losses: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        there, s = who_is_there(losses, active), state["log_variance"]
        weights = state["scale"] * (-s).exp()
        learned, moments = adam(s, 0.5 - weights * losses, state["adam"], there, self.lr)
        return torch.where(there, weights, 1.0).to(losses.dtype), {**state, "log_variance": learned, "adam": moments}
