"""IMTL-L: impartial multi-task learning, for losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._weighing import adam, check_positive, fresh_adam, who_is_there


@dataclass(frozen=True)
class IMTLL(Rule):
    r"""Learns a scale for each loss that makes all scaled losses equal.

    Minimises ``sum_i exp(s_i) L_i - s_i`` over the model and over ``s``, so that the weight of a loss is ``exp(s_i)``.
    Where ``s`` has settled, ``exp(s_i) L_i = 1``. The ``s_i`` start at zero and follow Adam.

    Args:
        lr: learning rate of the ``s_i``.

    State:
        ``"scale"``: ``[K]``, the ``s_i``; ``"adam"``: its moments, each ``[K]``.

    Raises:
        ValueError: for a learning rate that is not positive.

    Example:
        >>> import torch, gradsurgery as gs
        >>> rule = gs.IMTLL(lr=0.1)
        >>> state = rule.init(["large", "small"], ["model"])
        >>> losses = torch.tensor([5.0, 0.2])
        >>> for _ in range(300):
        ...     weights, state = rule.weigh(losses, state)
        >>> weights * losses
        tensor([1.0000, 1.0000])

    Reference:
        Liu et al., *Towards Impartial Multi-Task Learning*, ICLR 2021 (https://openreview.net/forum?id=IMPnRXEWpvr),
        there IMTL-L.

    Note:
        The paper trains ``s`` with the model's optimizer; here it has an Adam of its own, whose state is the rule's.
    """

    scale_equivariant: ClassVar[bool] = True

    lr: float = 1e-3

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        scale = torch.zeros(len(tasks), device=device, dtype=dtype)
        return {"scale": scale, "adam": fresh_adam(len(tasks), device, dtype)}

    def weigh(
        self, losses: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        there, s = who_is_there(losses, active), state["scale"]
        weights = s.exp()
        learned, moments = adam(s, weights * losses - 1, state["adam"], there, self.lr)
        return torch.where(there, weights, 1.0).to(losses.dtype), {"scale": learned, "adam": moments}
