"""Weights of tasks by name, as a setting of rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._rule import State

Weights: TypeAlias = Mapping[str, float] | Sequence[tuple[str, float]]
"""Task → weight; kept as pairs, so that a rule can be compared, hashed and shown."""


class Weighted:
    """What rules with a field ``weights`` share, ahead of :class:`Rule` among their bases.

    The field is brought into its form as a rule is made, and the state has ``"weights"``, ``[G, K]``, if there are any.
    """

    weights: Weights | None  # each rule has the field at its own place

    def __post_init__(self) -> None:
        given = self.weights
        if given is None:
            return
        named = given.items() if isinstance(given, Mapping) else given
        pairs = tuple((str(name), float(weight)) for name, weight in named)
        names = [name for name, _ in pairs]
        if not pairs or len(set(names)) < len(names) or not all(0 <= weight < float("inf") for _, weight in pairs):
            raise ValueError(f"`weights` must map distinct tasks, at least one, to weights >= 0. Found {given!r}.")
        object.__setattr__(self, "weights", pairs)

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        if self.weights is None:
            return {}
        given = dict(self.weights)
        check_names("weights", given, tasks, self)
        values = torch.tensor([given.get(task, 1.0) for task in tasks], device=device, dtype=dtype)
        return {"weights": values.expand(len(groups), -1)}


def check_names(setting: str, names: Iterable[str], tasks: Sequence[str], rule: Any) -> None:
    """Raises a ValueError for names that are no tasks."""
    if unknown := [name for name in names if name not in tasks]:
        raise ValueError(f"{type(rule).__name__}'s `{setting}` names {unknown}, but the tasks are {list(tasks)}.")


def task_names(setting: str, names: Iterable[str]) -> tuple[str, ...]:
    """A setting that holds names of tasks, in its form.

    Raises:
        ValueError: for a string, for no name, and for repeated ones.
    """
    if isinstance(names, str):
        raise ValueError(f"`{setting}` must be several names. Found the string {names!r}; write ({names!r},).")
    found = tuple(names)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"`{setting}` must be distinct names, at least one. Found {found!r}.")
    return found


def marked(names: Iterable[str], tasks: Sequence[str], groups: Sequence[str], device: Any) -> Tensor:
    """Which tasks have these names, ``[G, K]``."""
    chosen = set(names)
    return torch.tensor([task in chosen for task in tasks], device=device).expand(len(groups), -1)


def shares(gram: Tensor, state: State, active: Tensor | None) -> Tensor:
    """Weights ``[G, K]`` that are zero for absent tasks and add up to 1: equal ones, or in proportion to those given.

    In double precision, where the device has it.
    """
    dtype = torch.float32 if gram.device.type == "mps" else torch.float64
    if "weights" not in state and active is None:
        return torch.full(gram.shape[:2], 1 / max(gram.shape[-1], 1), dtype=dtype, device=gram.device)
    weights = (
        state["weights"].to(dtype) if "weights" in state else torch.ones(gram.shape[:2], dtype=dtype, device=gram.device)
    )
    if active is not None:
        weights = weights * active
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def diagonal(weights: Tensor, gram: Tensor, active: Tensor | None) -> Tensor:
    """Mixing matrices of rules that only weigh: ``[G, K]`` → ``[G, K, K]``, in the dtype of ``gram``."""
    if active is not None:
        weights = torch.where(active, weights, 1.0)
    return torch.diag_embed(weights).to(gram.dtype)


def weighted(mixing: Tensor, state: State, active: Tensor | None) -> Tensor:
    """Mixing matrices whose rows are multiplied with the tasks' weights, if there are any."""
    if "weights" not in state:
        return mixing
    weights = state["weights"].to(mixing)
    return mixing * (weights if active is None else torch.where(active, weights, 1.0))[:, :, None]


def operated(mixing: Tensor, gram: Tensor, active: Tensor | None) -> Tensor:
    """Mixing matrices of which the rows and columns of absent tasks are made those of the identity."""
    if active is not None:
        eye = torch.eye(gram.shape[-1], dtype=mixing.dtype, device=gram.device)
        mixing = torch.where(active[:, :, None] & active[:, None, :], mixing, eye)
    return mixing.to(gram.dtype)
