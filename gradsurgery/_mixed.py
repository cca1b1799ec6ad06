"""A batch that mixes samples of different tasks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ._counts import Counts

TaskIds = Tensor | Sequence[int] | Sequence[str]


class MixedBatch:
    """Which sample belongs to which task.

    Args:
        task_ids: ``[B]``, indices into the tasks or names.
        tasks: names of the ``K`` tasks.
        reduction: how a task's losses become one: ``"mean"`` or ``"sum"``.

    Raises:
        TypeError: if ``task_ids`` is of another type.
        ValueError: for unknown tasks, another shape, no samples, and an unknown reduction.
    """

    def __init__(self, task_ids: TaskIds, tasks: Sequence[str], reduction: str = "mean") -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"`reduction` must be 'mean' or 'sum'. Found {reduction!r}.")
        self.tasks = tasks
        self.reduction = reduction
        found = _indices(task_ids, tasks)
        if not len(found):
            raise ValueError("`task_ids` is empty: there must be one for each sample of the batch.")
        outside = [k for k in found if not 0 <= k < len(tasks)]
        if outside:
            raise ValueError(
                f"`task_ids` must be indices of the {len(tasks)} tasks, 0 to {len(tasks) - 1}. Found {outside[0]}."
            )
        self.task_of = np.asarray(found, np.int32)

    @cached_property
    def present(self) -> tuple[int, ...]:
        """The tasks that are there."""
        return tuple(int(k) for k in np.unique(self.task_of))

    def check(self, losses: object) -> Tensor:
        """The losses, if they are one for each sample, ``[B, ...]``.

        Raises:
            TypeError: if they are no tensor.
            ValueError: if they have another shape, or no graph.
        """
        if not isinstance(losses, Tensor):
            raise TypeError(
                "After split(), `losses` must be a tensor with one loss for each sample (reduction='none'). Found "
                f"{type(losses).__name__}. To pass one loss per task, call backward() without split()."
            )
        count = len(self.task_of)
        if losses.dim() == 0 or len(losses) != count:
            raise ValueError(
                f"`losses` must have one entry for each of the {count} samples in `task_ids` along dimension 0. Found "
                f"shape {tuple(losses.shape)}. Compute them with reduction='none'; if several belong to each sample, "
                f"reshape them to ({count}, ...)."
            )
        if losses.numel() == 0:
            raise ValueError(f"`losses` has no elements. Found shape {tuple(losses.shape)}.")
        if not losses.requires_grad:
            raise ValueError(
                "The losses have no graph (requires_grad=False). Were they detached, or computed under torch.no_grad()?"
            )
        return losses

    def labels(self, losses: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        """The task of each loss, ``[B, 1, ...]``."""
        return self.task_of.reshape((-1,) + (1,) * (losses.dim() - 1))

    def counts(self, losses: Tensor) -> Counts:
        """How many losses each task has."""
        numbers = np.bincount(self.task_of, minlength=len(self.tasks)) * losses[0].numel()
        return Counts(tuple(map(float, numbers)), "mixed" if self.reduction == "mean" else "sum")

    def on(self, device: torch.device) -> Tensor:
        """The task of each sample, ``[B]``."""
        return torch.from_numpy(self.task_of.astype(np.int64)).to(device, non_blocking=True)

    def shares(self, losses: Tensor) -> Tensor:
        """What each sample's losses count in their task's loss, ``[B]``, float64."""
        counts = np.bincount(self.task_of, minlength=len(self.tasks))
        each = losses[0].numel()
        share = 1.0 / (counts[self.task_of] * each) if self.reduction == "mean" else np.ones(len(self.task_of))
        return torch.from_numpy(share)

    def values(self, losses: Tensor, like: Tensor) -> Tensor:
        """The tasks' losses ``[K]``, detached; zero for those that are not there."""
        samples = losses.detach().flatten(1).sum(1) if losses.dim() > 1 else losses.detach()
        weighted = samples.to(like) * self.shares(losses).to(like)
        return torch.zeros_like(like).index_add(0, self.on(like.device), weighted)

    def seeds(self, losses: Tensor, factors: Tensor) -> Tensor:
        """What flows into each loss in the backward pass, given the tasks' factors ``[K]``."""
        per_sample = self.shares(losses).to(factors) * factors.index_select(0, self.on(factors.device))
        return per_sample.to(losses.dtype).reshape((-1,) + (1,) * (losses.dim() - 1)).expand_as(losses)


def _indices(task_ids: TaskIds, tasks: Sequence[str]) -> Sequence[int]:
    if isinstance(task_ids, Tensor):
        if task_ids.dim() != 1:
            raise ValueError(f"`task_ids` must be 1-D, one for each sample. Found shape {tuple(task_ids.shape)}.")
        if task_ids.is_floating_point() or task_ids.is_complex() or task_ids.dtype == torch.bool:
            raise TypeError(f"`task_ids` must be integers. Found dtype {task_ids.dtype}.")
        found: list[int] = task_ids.tolist()
        return found
    if isinstance(task_ids, np.ndarray):
        return _indices(task_ids.tolist() if task_ids.dtype.kind == "U" else torch.from_numpy(task_ids), tasks)
    if isinstance(task_ids, str) or not isinstance(task_ids, Sequence):
        raise TypeError(f"`task_ids` must be a tensor of indices or a list of names. Found {type(task_ids).__name__}.")
    index = {name: k for k, name in enumerate(tasks)}
    result = []
    for task in task_ids:
        if isinstance(task, str):
            if task not in index:
                raise ValueError(f"Unknown task {task!r} in `task_ids`: the tasks are {list(tasks)}.")
            result.append(index[task])
        elif isinstance(task, (int, np.integer)) and not isinstance(task, bool):
            result.append(int(task))
        else:
            raise TypeError(f"`task_ids` must be indices or names of tasks. Found {task!r}.")
    return result
