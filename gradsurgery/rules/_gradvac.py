"""GradVac: Gradient Vaccine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._walk import Walk, few_groups, random_order
from ._weights import Weighted, Weights, weighted

# What remains of a unit vector's squared length is rounding, below this. Gram matrices may be from products in float32.
_ROUNDING = 16 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class GradVac(Weighted, Rule):
    r"""Pulls each task's gradient towards the others until their cosine similarities reach their usual level.

    Starting from ``g'_i = g_i``, for ``j != i`` in random order, with ``phi = cos(g'_i, g_j)`` and the target ``t_ij``
    of this pair in this surgery group: if ``phi < t_ij``,

    ``g'_i <- g'_i + ||g'_i|| (t sqrt(1 - phi^2) - phi sqrt(1 - t^2)) / (||g_j|| sqrt(1 - t^2))  g_j``,

    after which ``cos(g'_i, g_j) = t_ij`` exactly. Whether it fired or not, ``t_ij <- (1 - beta) t_ij + beta phi``.
    Targets start at zero, where GradVac is PCGrad.

    Args:
        beta: decay of the moving average, in [0, 1]. The window is about ``1 / beta`` steps.
        target: a fixed target in [-1, 1] for all pairs, instead of the moving average.
        tasks: names of the tasks whose gradients are operated on; None means all. The others still serve as ``g_j``.
            In the source's experiments it was best to operate on the low-resource tasks only.
        max_growth: bound on ``||g'_i|| / ||g_i||``, at least 1.
        weights: by task, what its modified gradient is multiplied with; 1 for tasks that are not named.

    State:
        ``"target"``: ``[G, K, K]``, the moving averages ``t_ij`` (none with a fixed target).

    Raises:
        ValueError: for settings outside these ranges, an empty or repeated ``tasks``, and names that are no tasks.

    Example:
        >>> import torch, gradsurgery as gs
        >>> jacobian = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # no conflict: PCGrad would do nothing
        >>> gs.operate(jacobian, gs.GradVac(target=0.6))
        tensor([1.6000, 0.8000])
        >>> gs.operate(jacobian, gs.GradVac(target=0.8))
        tensor([2.3467, 1.1733])

    Reference:
        Wang, Tsvetkov, Firat, Cao, *Gradient Vaccine*, ICLR 2021 (arXiv:2010.05874), Equation 2 and Algorithm 1; Z. Wang's
        thesis, Eqs. 6.2 and 6.3 and Algorithm 2.

    Note:
        When it fires, ``||g'_i||`` grows by ``sqrt(1 - phi^2) / sqrt(1 - t^2)``, which has no limit as the target
        approaches 1: after many steps with nearly identical gradients, one small change would make an enormous step. We
        stop on the way to the target where ``||g'_i||`` reaches ``max_growth`` times ``||g_i||``. TorchJD does not, and its
        ``beta`` is 0.5, where the paper's is 1e-2. Pairs with a zero
        gradient, and a ``g'_i`` that a projection has cancelled, have no cosine: nothing happens, and their target stays.
        Targets above ``1 - 1e-6`` count as that: angles below 1e-3 are rounding, in a Gram matrix from float32 products.
    """

    random: ClassVar[bool] = True
    scale_equivariant: ClassVar[bool] = True

    beta: float = 1e-2
    target: float | None = None
    tasks: Sequence[str] | None = None
    max_growth: float = 10.0
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"`beta` must be in [0, 1]. Found beta={self.beta!r}.")
        if self.target is not None and not -1 <= self.target <= 1:
            raise ValueError(f"`target` is a cosine and must be in [-1, 1], or None for the EMA. Found {self.target!r}.")
        if not self.max_growth >= 1:
            raise ValueError(f"`max_growth` must be at least 1. Found max_growth={self.max_growth!r}.")
        super().__post_init__()
        if self.tasks is not None:
            if isinstance(self.tasks, str):
                raise ValueError(
                    f"`tasks` must be several names. Found the string {self.tasks!r}; write ({self.tasks!r},)."
                )
            names = tuple(self.tasks)
            if not names or len(set(names)) < len(names):
                raise ValueError(f"`tasks` must be distinct names, at least one, or None for all. Found {names!r}.")
            object.__setattr__(self, "tasks", names)

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        state = super().init(tasks, groups, device=device, dtype=dtype)
        if self.tasks is not None:
            if unknown := [name for name in self.tasks if name not in tasks]:
                raise ValueError(f"GradVac's `tasks` names {unknown}, but the tasks are {list(tasks)}.")
            chosen = torch.tensor([name in self.tasks for name in tasks], device=device)
            state["operated"] = chosen.expand(len(groups), -1)
        if self.target is None:
            state["target"] = torch.zeros(len(groups), len(tasks), len(tasks), device=device, dtype=dtype)
        return state

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        order, few = random_order(gram, generator), few_groups(active)
        if few is None or active is None:
            return self._mix(gram, state, active, order)
        part: State = {key: value[few] for key, value in state.items()}
        some, part = self._mix(gram[few], part, active[few], order[few])
        mixing, state = super().mix(gram, state)
        return mixing.index_copy(0, few, some), {key: value.index_copy(0, few, part[key]) for key, value in state.items()}

    def _mix(self, gram: Tensor, state: State, active: Tensor | None, order: Tensor) -> tuple[Tensor, State]:
        # Everything is measured in units of the original norms: at the start all g_i, and always all g_j, are unit vectors.
        # Seen from g_j, g'_i has a part along it, l = <g'_i, g_j>, and a part across of length h = sqrt(||g'_i||^2 - l^2),
        # which a correction leaves alone. The cosine is t where l = h t / sqrt(1 - t^2); so l is raised to that.
        square = gram.diagonal(dim1=-2, dim2=-1)
        usable = (square > 0) & square.isfinite()
        if active is not None:
            usable = usable & active
        norm = torch.where(usable, square, 1.0).sqrt()
        both = usable[:, :, None] & usable[:, None, :]
        cosines = torch.where(both, gram / norm[:, :, None] / norm[:, None, :], 0.0)
        operated = both & state["operated"][:, :, None] if "operated" in state else both

        walk = Walk(gram.shape, order)
        target = state["target"].to(gram.dtype) if self.target is None else torch.full_like(gram, self.target)
        # Of equal gradients, h is rounding. Not multiplied by more than this, it cannot ask for a length above their own.
        slope = (target / (1 - target**2).sqrt().clamp_min(1e-30)).clamp_max(_ROUNDING**-0.5)
        slopes = walk.by_meeting(slope).unbind()
        nothing = walk.by_meeting(torch.where(operated & (target > -1), 0.0, -torch.inf).to(gram.dtype)).unbind()
        bound = self.max_growth**2
        length = gram.new_ones(square.numel(), 1)  # ||g'_i||^2
        along: list[Tensor] = []
        lengths: list[Tensor] = []

        def correction(s: int, product: Tensor) -> Tensor:
            nonlocal length
            along.append(product)
            lengths.append(length)
            across = torch.addcmul(length, product, product, value=-1).clamp_min_(0)  # h^2
            wanted = torch.addcmul(nothing[s], slopes[s], across.sqrt())
            allowed = (bound - across).clamp_min_(0).sqrt_()
            raised = torch.maximum(product, torch.minimum(wanted, allowed))
            length = torch.addcmul(across, raised, raised)
            return raised - product

        added = walk.run(cosines, cosines, correction)
        mixing = walk.by_pair(added, torch.zeros_like(gram))
        mixing = mixing * (norm[:, :, None] / norm[:, None, :])
        mixing.diagonal(dim1=-2, dim2=-1).fill_(1)
        mixing = weighted(mixing, state, active)
        if self.target is None and along:
            # A g'_i that was cancelled has no cosine, and an absent pair is not asked for one.
            measured, square_i = torch.stack(along), torch.stack(lengths)
            known = walk.by_meeting(operated) & (square_i > _ROUNDING)
            old = walk.by_meeting(state["target"])
            cosine = (measured * square_i.rsqrt()).clamp(-1, 1).to(old.dtype)
            new = torch.where(known, torch.lerp(old, cosine, self.beta), old)
            state = {**state, "target": walk.by_pair(new, state["target"])}
        return mixing, state
