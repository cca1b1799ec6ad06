"""A rule on given gradients, without an optimizer."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ._buffer import Rows, gram
from ._coordinates import AnyRule, Coordinates, parts
from ._rule import State, implements


@overload
def operate(
    jacobian: Tensor, rule: AnyRule, *, losses: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor: ...
@overload
def operate(
    jacobian: Tensor,
    rule: AnyRule,
    *,
    losses: Tensor | None = None,
    state: State,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, State]: ...
def operate(
    jacobian: Tensor,
    rule: AnyRule,
    *,
    losses: Tensor | None = None,
    state: State | None = None,
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, State]:
    """Lets a rule operate on per-task gradients.

    Args:
        jacobian: ``[K, D]``, one task's gradient per row.
        rule: the rule.
        losses: ``[K]``, the tasks' losses, which rules that weigh them need.
        state: what the rule remembers. Without it the rule starts afresh; with it, the new state is returned too. The first
            is ``{}``; a stateful rule then makes its own for tasks ``"0"``, ``"1"``, … and one surgery group.
        generator: for random rules; None draws from PyTorch's global generator.

    Returns:
        The combined gradient ``[D]``; with ``state``, a pair of it and the new state.

    Raises:
        TypeError: if ``jacobian`` is no floating-point or complex tensor.
        ValueError: if it has another number of dimensions, or no row; and if there is not one loss per task for a rule that
            weighs losses.

    Example:
        >>> import torch, gradsurgery as gs
        >>> gs.operate(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), gs.PCGrad())
        tensor([-0.5000,  1.5000])
        >>> rule, state = gs.GradVac(beta=0.5), {}
        >>> for _ in range(3):
        ...     gradient, state = gs.operate(torch.eye(2) + 1, rule, state=state)
        >>> state["target"][0]  # cos = 0.8; targets start at zero
        tensor([[0.0000, 0.7000],
                [0.7000, 0.0000]], dtype=torch.float64)
    """
    if not isinstance(jacobian, Tensor) or not (jacobian.is_floating_point() or jacobian.is_complex()):
        found = jacobian.dtype if isinstance(jacobian, Tensor) else type(jacobian).__name__
        raise TypeError(f"`jacobian` must be a floating-point tensor. Found {found}.")
    if jacobian.dim() != 2 or not len(jacobian):
        raise ValueError(f"`jacobian` must be [K, D] with K >= 1 tasks. Found shape {tuple(jacobian.shape)}.")
    own, last = parts(rule)
    weighs = implements(own, "weigh")
    if weighs and (losses is None or losses.shape != jacobian.shape[:1]):
        given = "none" if losses is None else f"shape {tuple(losses.shape)}"
        raise ValueError(f"{rule} weighs losses: pass `losses`, one for each of the {len(jacobian)} tasks. Found {given}.")
    rows, names = Rows(), [str(k) for k in range(len(jacobian))]
    if last is not None:
        last.check(names)
    with torch.no_grad():
        rows.add_block(range(len(jacobian)), jacobian.detach())
        matrix = gram([rows])[None]
        new = state or own.init(names, ["all"], device=matrix.device, dtype=matrix.dtype)
        weights = matrix.new_ones(len(jacobian))
        if weighs and losses is not None:
            weights, new = own.weigh(losses.detach().to(weights), new, generator=generator)
            matrix = matrix * weights[:, None] * weights
        mixing, new = own.mix(matrix, new, generator=generator)
        if last is None:
            combined = rows.combine(mixing[0].sum(0) * weights)
        else:
            mixed = weighs or implements(own, "mix")
            combined = Coordinates(last, names, generator)(0, rows, mixing[0] * weights if mixed else None)
    return combined if state is None else (combined, new)
