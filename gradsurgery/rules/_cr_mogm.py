"""CR-MOGM: weights of another rule, smoothed over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._rule import Rule, State
from ._weights import diagonal

if TYPE_CHECKING:
    from .._step import Step


@dataclass(frozen=True)
class CRMOGM(Rule):
    r"""Smooths the weights that another rule gives the tasks: ``g'_i = w_i g_i`` with

    ``w <- alpha w + (1 - alpha) w^``,

    where ``w^_j = sum_i M_ij`` are the column sums of the other rule's mixing matrix. The first ``w`` is the first ``w^``.

    Args:
        rule: the other rule, such as ``MGDA()``.
        alpha: decay of the moving average, in [0, 1].

    State:
        ``"rule"``: the other rule's. ``"w"``: ``[G, K]``. ``"known"``: ``[G, K]``, the tasks that have a weight already.

    Raises:
        TypeError: if ``rule`` is no :class:`Rule`.
        ValueError: for another ``alpha``.

    Example:
        >>> import torch, gradsurgery as gs
        >>> rule, state = gs.CRMOGM(gs.MGDA(), alpha=0.9), {}
        >>> for jacobian in (torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 2.0]))):
        ...     gradient, state = gs.operate(jacobian, rule, state=state)
        >>> state["w"]  # 0.9 * (0.2, 0.8) + 0.1 * (0.8, 0.2)
        tensor([[0.2600, 0.7400]], dtype=torch.float64)

    Reference:
        Zhou et al., *On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond*, NeurIPS 2022
        (https://proceedings.neurips.cc/paper_files/paper/2022/file/f91bd64a3620aad8e70a27ad9cb3ca57-Paper-Conference.pdf),
        Algorithm 1.

    Note:
        The paper lets ``alpha`` grow towards 1 as the learning rate decays; ours is constant. For rules that change single
        gradients (PCGrad), their sum is what is smoothed.
    """

    rule: Rule
    alpha: float = 0.9

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise TypeError(f"`rule` must be a rule. Found {self.rule!r} of type {type(self.rule).__name__}.")
        if getattr(self.rule, "coordinates", None) is not None:
            raise TypeError(f"`rule` must have weights to smooth, which a coordinate rule has not. Found {self.rule!r}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` must be in [0, 1]. Found alpha={self.alpha!r}.")

    @property
    def separable(self) -> bool:  # type: ignore[override]
        return self.rule.separable

    @property
    def random(self) -> bool:  # type: ignore[override]
        return self.rule.random

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.rule.symmetric

    @property
    def scale_equivariant(self) -> bool:  # type: ignore[override]
        return self.rule.scale_equivariant

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        w = torch.zeros(len(groups), len(tasks), device=device, dtype=dtype)
        own = self.rule.init(tasks, groups, device=device, dtype=dtype)
        return {"rule": own, "w": w, "known": torch.zeros_like(w, dtype=torch.bool)}

    def weigh(
        self, losses: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        weights, own = self.rule.weigh(losses, state["rule"], active=active, generator=generator)
        return weights, {**state, "rule": own}

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        mixing, own = self.rule.mix(gram, state["rule"], active=active, generator=generator)
        old, found = state["w"], mixing.sum(-2).to(state["w"].dtype)
        w = torch.where(state["known"], self.alpha * old + (1 - self.alpha) * found, found)
        if active is None:
            return diagonal(w, gram, None), {"rule": own, "w": w, "known": torch.ones_like(state["known"])}
        kept = torch.where(active, w, old)
        return diagonal(w, gram, active), {"rule": own, "w": kept, "known": state["known"] | active}

    def observe(self, step: Step, state: State) -> State:
        return {**state, "rule": self.rule.observe(step, state["rule"])}
