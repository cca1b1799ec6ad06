"""Labels: to which task each element of a gradient belongs.

Labels are an integer array with as many dimensions as the tensor, each of the tensor's size or of size one, where all
elements along it belong to the same task. So a batch ``[B, T, D]`` has labels ``[B, 1, 1]``, and flattened to ``[B*T, D]``
labels ``[B*T, 1]``: a few thousand numbers at most. ``NOBODY`` marks elements that no gradient reaches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Labels: TypeAlias = NDArray[np.int32]
Shape: TypeAlias = tuple[int, ...]

NOBODY = -1


class Unknown(Exception):
    """Nothing is known of how labels go on."""


class Shared:
    """Instead of labels: elements that several tasks reach."""

    def __repr__(self) -> str:
        return "SHARED"


SHARED = Shared()
Flow: TypeAlias = Labels | Shared | None
"""What is known of a gradient: whose its elements are, that tasks share them, or that there is none."""


def constant(task: int, dims: int) -> Labels:
    """Labels of a tensor that belongs to one task."""
    return np.full((1,) * dims, task, np.int32)


def compact(labels: Labels, dims: Iterable[int] | None = None) -> Labels:
    """The same labels with size one along those of ``dims`` (all, by default) where nothing changes."""
    for dim in range(labels.ndim) if dims is None else dims:
        if labels.shape[dim] > 1:
            first = labels.take([0], dim)
            if (labels == first).all():
                labels = first
    return labels


def across(labels: Labels, dims: Iterable[int]) -> Labels | None:
    """Labels that are the same all along ``dims``, of size one there; None if tasks differ. Nobody's may be anybody's."""
    for dim in dims:
        if labels.shape[dim] > 1:
            most = labels.max(dim, keepdims=True)
            if not ((labels == most) | (labels == NOBODY)).all():
                return None
            labels = most
    return labels


def others(labels: Labels, *dims: int) -> list[int]:
    """All dimensions but these."""
    return [dim for dim in range(labels.ndim) if dim not in dims]


def full(labels: Labels, shape: Shape, dims: Iterable[int]) -> Labels:
    """The same labels, of the tensor's size along ``dims``."""
    wide = list(labels.shape)
    for dim in dims:
        wide[dim] = shape[dim]
    return np.broadcast_to(labels, wide)


def merge(a: Flow, b: Flow) -> Flow:
    """What is known of the sum of two gradients of the same tensor."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, Shared) or isinstance(b, Shared):
        return SHARED
    if a is b or (a.shape == b.shape and np.array_equal(a, b)):
        return a
    if ((a != b) & (a != NOBODY) & (b != NOBODY)).any():
        return SHARED
    return compact(np.where(a == NOBODY, b, a))


def reshaped(labels: Labels, old: Shape, new: Shape) -> Labels:
    """Labels of a tensor of shape ``new`` that is a view of one of shape ``old``."""
    if labels.size == 1:
        return labels.reshape((1,) * len(new))
    partial: list[int] = []  # of the old shape, with ones in groups of dimensions without differences
    wanted: list[int] = []
    split: list[int] = []  # dimensions of the new shape that may have become constant
    for before, after in _corresponding(old, new):
        if any(labels.shape[dim] != 1 for dim in before):
            partial += [old[dim] for dim in before]
            wanted += [new[dim] for dim in after]
            if len(after) > 1:
                split += after
        else:
            partial += [1] * len(before)
            wanted += [1] * len(after)
    return compact(np.broadcast_to(labels, partial).reshape(wanted), split)


def _corresponding(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Pairs of smallest sets of consecutive dimensions with the same number of elements."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = [], []
        left = right = 1
        if i < len(old):
            before, left, i = [i], old[i], i + 1
        if j < len(new):
            after, right, j = [j], new[j], j + 1
        while left != right:
            if left < right:
                before.append(i)
                left, i = left * old[i], i + 1
            else:
                after.append(j)
                right, j = right * new[j], j + 1
        groups.append((before, after))
    return groups


def reduced(labels: Labels, shape: Shape) -> Flow:
    """Labels of a tensor of ``shape`` that was broadcast, as arithmetic does: its gradient is summed over the copies."""
    extra = labels.ndim - len(shape)
    if extra < 0:
        return labels.reshape(labels.shape + (1,) * -extra) if labels.size == 1 else SHARED
    same = across(labels, [dim for dim in range(labels.ndim) if dim < extra or shape[dim - extra] == 1])
    return SHARED if same is None else same.reshape(same.shape[extra:])


def scattered(labels: Labels, index: Any, shape: Shape, dims: Sequence[int]) -> Flow:
    """Labels of ``x`` of ``shape``, given those of ``x[index]``, where ``index`` tells elements apart along ``dims``."""
    keep = [size if dim in dims else 1 for dim, size in enumerate(shape)]
    for dim in range(len(shape)):
        if keep[dim] == 1 and shape[dim] != 1 and labels.size != 1:
            keep[dim] = shape[dim]
    result = np.full(keep, NOBODY, np.int32)
    picked = result[index]
    if picked.ndim != labels.ndim:
        raise Unknown
    wide = np.broadcast_to(labels, picked.shape)
    np.maximum.at(result, index, wide)  # nobody gives way
    if ((wide != NOBODY) & (result[index] != wide)).any():  # an element that is picked twice, by different tasks
        return SHARED
    return compact(result, [dim for dim in range(len(shape)) if dim not in dims])


class Segments:
    """Positions along some dimension, put together by task.

    Args:
        labels: of the positions, ``[N]``.

    Attributes:
        tasks: the tasks that are there, increasing.
        sizes: how many positions each has.
        order: positions by task; None if they come in this order already.
        labels: of the positions in this order.
    """

    def __init__(self, labels: Labels) -> None:
        order = np.argsort(labels, kind="stable")
        nobody = int((labels == NOBODY).sum())
        order = order[nobody:]
        tasks, sizes = np.unique(labels[order], return_counts=True)
        self.tasks: list[int] = tasks.tolist()
        self.sizes: list[int] = sizes.tolist()
        in_order = not nobody and bool((order == np.arange(len(order))).all())
        self.order: NDArray[np.int64] | None = None if in_order else order
        self.labels: Labels = labels[order]
        self._on: dict[torch.device, Tensor] = {}

    @cached_property
    def even(self) -> bool:
        """Whether all tasks have as many."""
        return len(set(self.sizes)) == 1

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Where each task's positions start and end, once they are in order."""
        ends = np.cumsum(self.sizes).tolist()
        return list(zip([0, *ends], ends, strict=False))

    def sort(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The tensor with its positions along ``dim`` in order of their tasks."""
        if self.order is None:
            return tensor
        index = self._on.get(tensor.device)
        if index is None:
            index = self._on[tensor.device] = torch.from_numpy(self.order).to(tensor.device)
        return tensor.index_select(dim, index)
