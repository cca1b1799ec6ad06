"""Which tasks reach which parameters, on this rank and on all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch

from .._buffer import Rows
from .._gradients import TaskGradients
from .._plan import Reach
from .agreement import digest
from .buckets import Bucket, arranged, parted
from .wire import Wire

Mask: TypeAlias = "np.ndarray[tuple[int, int], np.dtype[np.uint8]]"
"""``[P, K + 2]``: for each parameter, the tasks that reached it; whether a row is dense; whether the result has to be."""

_MOST = 256


class Reaches:
    """What all ranks' rows are, and how they travel: known by the digests of each rank's mask, so that it is sent once.

    Args:
        wire: the collectives.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.forget()

    def forget(self) -> None:
        """Begins afresh."""
        self._masks: dict[tuple[int, ...], Mask] = {}
        self._arranged: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Bucket]] = {}
        self._parted: dict[tuple[tuple[int, ...], tuple[str, ...]], list[list[int]]] = {}

    def learn(self, key: tuple[int, ...], mask: Mask) -> None:
        """Puts this rank's mask and those of others together, whose digests are the key."""
        self._key = key
        if key not in self._masks:
            if len(self._masks) >= _MOST:
                self.forget()
            self._masks[key] = self._wire.host_max(torch.from_numpy(mask.copy())).numpy()

    @property
    def tasks(self) -> Reach:
        """For each parameter, the tasks that reached it on any rank."""
        return tuple(tuple(np.flatnonzero(line[:-2]).tolist()) for line in self._masks[self._key])

    def dense(self, p: int) -> bool:
        """Whether a row of the parameter is dense, on any rank."""
        return bool(self._masks[self._key][p, -2])

    def to_be_dense(self, p: int) -> bool:
        """Whether the combined gradient of the parameter has to be."""
        return bool(self._masks[self._key][p, -1])

    def buckets(self, reach: Mapping[int, tuple[int, ...]], gradients: TaskGradients) -> list[Bucket]:
        """Buckets for some parameters, given the tasks that reached each."""
        key = self._key, tuple(reach)
        if key not in self._arranged:
            self._arranged[key] = arranged(reach, gradients.parameters, self._wire.size)
        return self._arranged[key]

    def parts(self, order: Sequence[str], gradients: TaskGradients) -> list[list[int]]:
        """In which parts rows travel, given the order of the surgery groups; those that are not in it come last."""
        key = self._key, tuple(order)
        if key not in self._parted:
            groups = list(gradients.groups)
            members: dict[str, list[int]] = {name: [] for name in [*order, *reversed(groups)] if name in gradients.groups}
            for p, group in enumerate(gradients.group_of):
                members[groups[group]].append(p)
            self._parted[key] = parted(members.values(), self.tasks, gradients.parameters)
        return self._parted[key]


def mask_of(rows: Sequence[Rows], tasks: int) -> Mask:
    """The mask of this rank's rows."""
    mask = np.zeros((len(rows), tasks + 2), np.uint8)
    for p, own in enumerate(rows):
        if reached := own.tasks:
            mask[p, list(reached)] = 1
            mask[p, -2] = any(not row.is_sparse for row in own.of.values()) if own.maybe_sparse else 1
            mask[p, -1] = own.to_be_dense
    return mask


def promised(reach: Sequence[Collection[int]], tasks: int) -> Mask:
    """The mask of dense rows that are to come, given the tasks that will reach each parameter."""
    mask = np.zeros((len(reach), tasks + 2), np.uint8)
    for p, own in enumerate(reach):
        mask[p, list(own)] = 1
        mask[p, -2] = bool(own)
    return mask


def broken(rows: Rows, promise: Mask, p: int) -> bool:
    """Whether the rows of parameter ``p`` are not those that were promised."""
    sparse = rows.maybe_sparse and any(row.is_sparse for row in rows.of.values())
    return sparse or rows.tasks != tuple(np.flatnonzero(promise[p, :-2]).tolist())


def all_dense(mask: Mask) -> bool:
    """Whether all rows are dense."""
    return not len(sparse_ones(mask))


def sparse_ones(mask: Mask) -> Sequence[int]:
    """The parameters whose rows are all sparse."""
    found: list[int] = np.flatnonzero(mask[:, :-2].any(1) & (mask[:, -2] == 0)).tolist()
    return found


def digest_of(mask: Mask) -> int:
    """63 bits that stand for a mask."""
    return digest({"reach": mask.tobytes().hex()})
