"""Several rules, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._coordinates import AnyRule, CoordinateRule
from .._rule import Rule, State, implements

if TYPE_CHECKING:
    from .._step import Step


@dataclass(frozen=True, init=False)
class Chain(Rule):
    r"""Applies rules in order; each sees the gradients as the one before it left them.

    ``M = M_n ... M_2 M_1``, and rule ``r + 1`` gets the Gram matrix ``M_r G M_r^T``. Weights of losses multiply, and each
    rule weighs the losses as the ones before it weighted them; all weigh before any mixes.

    Args:
        rules: at least one rule. Chains inside a chain are flattened. The last may be a :class:`CoordinateRule`, which
            makes one gradient of those that the others leave.

    Attributes:
        rules: the rules that see losses and Gram matrices.
        coordinates: the coordinate rule at the end, or None.

    Raises:
        ValueError: without any rule, and for a coordinate rule that is not the last.
        TypeError: if one of them is no rule.

    Example:
        >>> import gradsurgery as gs
        >>> gs.Chain(gs.PCGrad(), gs.Mean())
        Chain(PCGrad(weights=None), Mean())
    """

    rules: tuple[Rule, ...]
    coordinates: CoordinateRule | None

    def __init__(self, *rules: AnyRule) -> None:
        if not rules:
            raise ValueError("`Chain` needs at least one rule. Found none; write Chain(PCGrad(), Mean()), say.")
        for rule in rules:
            if not isinstance(rule, (Rule, CoordinateRule)):
                raise TypeError(f"`Chain` takes rules. Found {rule!r} of type {type(rule).__name__}.")
        flat = [part for rule in rules for part in (rule._parts if isinstance(rule, Chain) else (rule,))]
        last = flat.pop() if isinstance(flat[-1], CoordinateRule) else None
        if early := [part for part in flat if isinstance(part, CoordinateRule)]:
            raise ValueError(f"A coordinate rule leaves one gradient: it must be the last of a `Chain`. {early[0]} is not.")
        object.__setattr__(self, "rules", tuple(flat))
        object.__setattr__(self, "coordinates", last)

    @property
    def _parts(self) -> tuple[AnyRule, ...]:
        return self.rules if self.coordinates is None else (*self.rules, self.coordinates)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self._parts))})"

    @property
    def separable(self) -> bool:  # type: ignore[override]
        return all(rule.separable for rule in self.rules)

    @property
    def random(self) -> bool:  # type: ignore[override]
        return any(rule.random for rule in self._parts)

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return all(rule.symmetric for rule in self._parts)

    @property
    def scale_equivariant(self) -> bool:  # type: ignore[override]
        return all(rule.scale_equivariant for rule in self._parts)

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        return {str(i): rule.init(tasks, groups, device=device, dtype=dtype) for i, rule in enumerate(self.rules)}

    def weigh(
        self, losses: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        weights, new = torch.ones_like(losses), dict(state)
        for i, rule in enumerate(self.rules):
            factor, new[str(i)] = rule.weigh(losses * weights, state[str(i)], active=active, generator=generator)
            weights = weights * factor
        return weights, new

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        mixing, new = super().mix(gram, state)[0], dict(state)
        for i, rule in enumerate(self.rules):
            if implements(rule, "mix"):
                step, new[str(i)] = rule.mix(gram, state[str(i)], active=active, generator=generator)
                gram, mixing = _mixed(gram, step), step @ mixing
        return mixing, new

    def observe(self, step: Step, state: State) -> State:
        return {str(i): rule.observe(step, state[str(i)]) for i, rule in enumerate(self.rules)}


def _mixed(gram: Tensor, mixing: Tensor) -> Tensor:
    """``M G M^T``. A gradient of which only rounding is left has been cancelled: it is zero."""
    result = mixing @ gram @ mixing.mT
    terms = (mixing.abs() @ gram.abs() @ mixing.abs().mT).diagonal(dim1=-2, dim2=-1)
    left = result.diagonal(dim1=-2, dim2=-1) > 8 * torch.finfo(gram.dtype).eps * terms
    return torch.where(left[:, :, None] & left[:, None, :], result, 0.0)
