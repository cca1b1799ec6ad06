"""What rules that weigh losses share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._rule import Rule, State

_LEAST = 1e-20  # losses below count as this: the weight 1 / loss stays within float32


def who_is_there(losses: Tensor, active: Tensor | None) -> Tensor:
    """``[K]``, the tasks that the step holds."""
    return torch.ones_like(losses, dtype=torch.bool) if active is None else active


def softmax(values: Tensor, there: Tensor) -> Tensor:
    """``[K]``, over the tasks that are there; zero for the others."""
    # Subtracting the largest by hand: with no task at all, a softmax would be nan.
    largest = values.masked_fill(~there, -torch.inf).amax().nan_to_num(neginf=0.0)
    powers = torch.where(there, (values - largest).exp(), 0.0)
    return powers / powers.sum().clamp_min(torch.finfo(values.dtype).tiny)


def positive(rule: Rule, losses: Tensor, there: Tensor) -> Tensor:
    """The losses ``[K]``, at least ``1e-20`` and 1 for absent tasks.

    Raises:
        ValueError: on the CPU, for a negative loss. Elsewhere, where looking would wait for the device, it becomes nan.
    """
    negative = there & (losses < 0)
    if losses.device.type == "cpu" and bool(negative.any()):
        task = int(negative.nonzero()[0])
        raise ValueError(
            f"{rule} needs losses that are not negative. Found {losses[task].item():.3g} for the task of index {task}. Add "
            "a constant that makes it positive, or use a rule that does not mind."
        )
    least = losses.clamp_min(_LEAST).masked_fill(negative, torch.nan)
    return torch.where(there, least, 1.0)


def named_tasks(setting: str, names: Sequence[str] | str) -> tuple[str, ...]:
    """The names that a setting gives, as a tuple.

    Raises:
        ValueError: for a string in place of several, and for repeated names.
    """
    if isinstance(names, str):
        raise ValueError(f"`{setting}` must be several names. Found the string {names!r}; write ({names!r},).")
    found = tuple(names)
    if len(set(found)) < len(found):
        raise ValueError(f"`{setting}` must be distinct names. Found {found!r}.")
    return found


def check_positive(**settings: float) -> None:
    """Raises a ValueError that names the setting which is not positive and finite."""
    for name, value in settings.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"`{name}` must be positive. Found {name}={value!r}.")


# --- What is learned --------------------------------------------------------------------------------------------------


def fresh_adam(tasks: int, device: torch.device | str | None, dtype: torch.dtype) -> State:
    """The state of :func:`adam` before the first step, an entry ``[K]`` for each of its moments."""
    return {key: torch.zeros(tasks, device=device, dtype=dtype) for key in ("steps", "mean", "square")}


def adam(
    value: Tensor, gradient: Tensor, state: State, there: Tensor, lr: float, *, decay: float = 0.0
) -> tuple[Tensor, State]:
    """One step of Adam (Kingma and Ba, ICLR 2015, Algorithm 1; betas 0.9 and 0.999) on what is learned of each task.

    The tasks' values are steps ahead of each other where tasks have been absent, so that each counts its own.

    Args:
        value: ``[K]``, what is learned.
        gradient: ``[K]``.
        state: the moments, as :func:`fresh_adam` made them.
        there: ``[K]``, the tasks whose value is updated. The others' values and moments stay as they are.
        lr: learning rate.
        decay: ``decay * value`` is added to the gradient.

    Returns:
        The new value and state.
    """
    gradient = gradient.to(value.dtype) + decay * value
    steps = state["steps"] + 1
    mean = torch.lerp(state["mean"], gradient, 0.1)
    square = torch.lerp(state["square"], gradient * gradient, 0.001)
    moved = value - lr * (mean / (1 - 0.9**steps)) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
    new = {"steps": steps, "mean": mean, "square": square}
    return torch.where(there, moved, value), {key: torch.where(there, new[key], state[key]) for key in new}
