"""What a node does to labels, found out by sending gradients through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from .labels import NOBODY, SHARED, Flow, Labels, Shape, compact
from .passage import Passage
from .saved import freed


def call(node: Node, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The node's vector-Jacobian product, for all of its inputs.

    While the engine runs, a node computes no more than that run needs, even if it is called by hand. It is therefore called
    inside a run of its own, which needs everything.
    """
    function: Any = node.apply if isinstance(node, BackwardCFunction) else node
    if torch._C._current_graph_task_id() == -1:
        with torch.no_grad():
            found = function(*gradients)
    else:
        box: list[Any] = []
        apply: Any = _Apart.apply
        with torch.enable_grad():
            start = torch.zeros((), requires_grad=True)
            torch.autograd.backward(apply(start, lambda: box.append(function(*gradients))), retain_graph=True)
        (found,) = box
    return found if isinstance(found, tuple) else (found,)


class _Apart(torch.autograd.Function):
    """Does something in the backward pass."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, action: Callable[[], None]) -> Tensor:
        ctx.action = action
        return start.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        ctx.action()
        return None, None


def masked(gradient: Tensor, labels: Labels, tasks: Sequence[int]) -> Tensor:
    """The gradient where it belongs to one of the tasks, and zero elsewhere."""
    chosen = torch.from_numpy(np.isin(labels, tasks)).to(gradient.device)
    return torch.where(chosen, gradient, torch.zeros((), dtype=gradient.dtype, device=gradient.device))


def present(labels: Sequence[Labels | None]) -> list[int]:
    """The tasks that are there."""
    tasks = {int(task) for some in labels if some is not None for task in np.unique(some)}
    return sorted(tasks - {NOBODY})


def probed(passage: Passage) -> Sequence[Flow]:
    """Sends random gradients through the node, and sees where those of each task arrive.

    Tasks are told apart by the bits of their numbers: for each bit, the gradients of the tasks that have it are sent, and
    those of the others. An input's element that both reach is shared. For ``K`` tasks this takes ``2 log2 K`` calls of the
    node. An element that nothing arrives at has a derivative of zero for all of them.
    """
    tasks = present(passage.labels)
    if not tasks:
        return [None] * len(passage.inner)
    if freed(passage.node):
        raise ValueError(
            f"split() has to try operation {passage.name} out, but it works on a parameter that FSDP2 does not hold in "
            "memory ahead of the backward pass. Call fully_shard(..., reshard_after_forward=False) on its module; or "
            "compute one loss per task, and pass them to backward() as a mapping, without split()."
        )
    metadata: Any = passage.node._input_metadata
    generator = torch.Generator().manual_seed(0)
    noise = [
        None if labels is None else _noise(tuple(meta.shape), meta.dtype, generator).to(meta.device)
        for labels, meta in zip(passage.labels, metadata, strict=True)
    ]
    count = len(passage.inner)
    number: list[Any] = [0] * count
    anyone: list[Any] = [None] * count
    several = [False] * count
    for bit in range(max((len(tasks) - 1).bit_length(), 1)):
        sides = []
        for side in (0, 1):
            chosen = [task for i, task in enumerate(tasks) if (i >> bit) & 1 == side]
            sent = [
                None if labels is None or gradient is None else masked(gradient, labels, chosen)
                for labels, gradient in zip(passage.labels, noise, strict=True)
            ]
            sides.append(call(passage.node, sent))
        for i, (without, has) in enumerate(zip(*sides, strict=True)):
            if without is None or has is None or passage.inner[i] is None:
                continue
            there, not_there = _reached(has), _reached(without)
            several[i] = several[i] or bool((there & not_there).any()) or there.shape != passage.inner[i]
            number[i] = number[i] | (there.astype(np.int64) << bit)
            anyone[i] = (there | not_there) if anyone[i] is None else anyone[i] | there | not_there
    result: list[Flow] = []
    for i in range(count):
        if anyone[i] is None:
            result.append(None)
        elif several[i]:
            result.append(SHARED)
        else:
            found = np.where(anyone[i], np.asarray(tasks, np.int32)[np.minimum(number[i], len(tasks) - 1)], NOBODY)
            result.append(compact(found.astype(np.int32)))
    return result


def _noise(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers that are not near zero, in both parts if they are complex."""
    parts = torch.rand((2, *shape), generator=generator, dtype=torch.float64) + 0.5
    return (torch.complex(*parts) if dtype.is_complex else parts[0]).to(dtype)


def _reached(gradient: Tensor) -> Any:
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return ((gradient != 0) | gradient.isnan()).cpu().numpy()
