"""Reading what the user passes as losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

Losses: TypeAlias = Mapping[str, Tensor | None] | Sequence[Tensor | None] | Tensor


class Loss:
    """One task's loss: its name, its value, where its backward pass starts, and the shape that it has there."""

    def __init__(self, name: str, value: Tensor, output: Tensor | GradientEdge, shape: torch.Size) -> None:
        self.name = name
        self.value = value
        self.output = output
        self.shape = shape


def task_names(losses: Losses) -> list[str]:
    """Names of all tasks that the losses name, the absent ones too: what is learned from a first step."""
    return list(losses) if isinstance(losses, Mapping) else [str(i) for i in range(len(losses))]


def read_losses(losses: Losses, tasks: Sequence[str] | None, *, none: bool = False) -> list[Loss]:
    """Losses of the tasks that are there, in the order given, each checked.

    Args:
        losses: name → scalar loss; or one scalar loss per task, in order; or a 1-D tensor of them. None means absent.
        tasks: names of the tasks, if they are known.
        none: whether it may be that there is no loss.

    Raises:
        ValueError: if there is no loss, a loss is no scalar or has no graph, or the tasks do not fit.
        TypeError: if something is of another type.
    """
    found = list(_named(losses, tasks))
    if not found and not none:
        raise ValueError("No losses: `backward` needs the loss of at least one task. Found none, or only None.")
    for loss in found:
        if not loss.value.requires_grad:
            raise ValueError(
                f"The loss of task {loss.name!r} has no graph (requires_grad=False). Was it detached, or computed under "
                "torch.no_grad()?"
            )
    return found


def _named(losses: Losses, tasks: Sequence[str] | None) -> Iterator[Loss]:
    if isinstance(losses, Tensor):
        if losses.dim() != 1:
            raise ValueError(
                f"A tensor of losses must be 1-D, one entry per task. Found shape {tuple(losses.shape)}. "
                "Pass {'task': loss} for a single loss."
            )
        names = _positional(len(losses), tasks)
        yield from _entries(names, losses)
        return
    if isinstance(losses, Mapping):
        for name in losses:
            if not isinstance(name, str):
                raise TypeError(f"Tasks are named by strings. Found {name!r} of type {type(name).__name__}.")
        if tasks is not None and (unknown := [name for name in losses if name not in tasks]):
            raise ValueError(
                f"Unknown task {', '.join(map(repr, unknown))}: the tasks are {list(tasks)}. "
                "Pass all names as `tasks=` when the optimizer is made."
            )
        items = list(losses.items())
    elif isinstance(losses, Sequence) and not isinstance(losses, str):
        items = list(zip(_positional(len(losses), tasks), losses, strict=True))
    else:
        raise TypeError(f"`losses` must be a mapping, a sequence or a 1-D tensor of losses. Found {type(losses).__name__}.")
    for name, loss in items:
        if loss is None:
            continue
        if not isinstance(loss, Tensor):
            raise TypeError(f"The loss of task {name!r} must be a tensor. Found {type(loss).__name__}.")
        if loss.numel() != 1:
            raise ValueError(
                f"The loss of task {name!r} must be a scalar. Found shape {tuple(loss.shape)}; reduce it, say by .mean()."
            )
        yield Loss(name, loss, loss, loss.shape)


def _positional(count: int, tasks: Sequence[str] | None) -> Sequence[str]:
    if tasks is None:
        return [str(i) for i in range(count)]
    if count != len(tasks):
        raise ValueError(
            f"Losses without names must be one per task, in order: {len(tasks)} for the tasks {list(tasks)}. "
            f"Found {count}. Name them in a mapping, or put None where a task is absent."
        )
    return tasks


def _entries(names: Sequence[str], losses: Tensor) -> Iterator[Loss]:
    """The entries of a 1-D tensor.

    Behind ``torch.stack`` or ``torch.cat`` the tasks are still apart. Going through it would give each parameter of one
    task a gradient of zero from all others, as if they had reached it.
    """
    node = losses.grad_fn
    joined = node is not None and node.name() in ("StackBackward0", "CatBackward0")
    if node is None or not joined or len(node.next_functions) != len(losses):
        for name, value in zip(names, losses.unbind(), strict=True):
            yield Loss(name, value, value, value.shape)
        return
    shape = torch.Size([] if node.name() == "StackBackward0" else [1])
    values = losses.detach()
    for name, value, (target, index) in zip(names, values, node.next_functions, strict=True):
        if target is None:
            yield Loss(name, value, value, value.shape)  # without a graph, which is refused above
        else:
            yield Loss(name, value.requires_grad_(), GradientEdge(target, index), shape)
