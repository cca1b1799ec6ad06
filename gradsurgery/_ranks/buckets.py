"""Rows of many parameters side by side, in as many equal parts as there are ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .._buffer import Rows

_BYTES = 1 << 25  # of rows, that travel together
_PART = 1 / 16  # of all rows, at least, that surgery happens on at a time


@dataclass(frozen=True, eq=False)
class Bucket:
    """The rows of parameters that ``k`` tasks reached, ``[k, D]``; of which each rank keeps ``[k, D / ranks]``.

    They need not be the same tasks for each of them. Complex coordinates count as two.

    Attributes:
        tasks: the tasks that reached each parameter, ``k`` of them.
        places: for each parameter, from where to where among the ``D`` coordinates.
        width: how many coordinates each rank keeps; the last rank's part is filled up with zeros.
        ranks: how many there are.
        dtype: of the coordinates.
        device: where they are.
    """

    tasks: dict[int, tuple[int, ...]]
    places: dict[int, tuple[int, int]]
    width: int
    ranks: int
    dtype: torch.dtype
    device: torch.device

    @property
    def rows(self) -> int:
        """How many rows each parameter has."""
        return len(next(iter(self.tasks.values())))

    def pack(self, rows: Sequence[Rows], shares: Sequence[float]) -> Tensor:
        """Rows times the tasks' shares, in the order that a reduce-scatter wants: ``[ranks, k, width]``. Frees them."""
        parts = torch.empty(self.ranks, self.rows, self.width, dtype=self.dtype, device=self.device)
        line = torch.zeros(self.ranks * self.width, dtype=self.dtype, device=self.device)
        for i in range(self.rows):
            for p, (start, end) in self.places.items():
                task = self.tasks[p][i]
                row = rows[p].of.get(task)
                if row is None:
                    line[start:end].zero_()
                elif shares[task] == 1:
                    line[start:end].copy_(flat(row))
                else:
                    torch.mul(flat(row), shares[task], out=line[start:end])
            parts[:, i] = line.view(self.ranks, self.width)
        for p in self.places:
            rows[p].clear()
        return parts

    def shard(self) -> Tensor:
        """Room for one rank's part, ``[k, width]``."""
        return torch.empty(self.rows, self.width, dtype=self.dtype, device=self.device)

    def of_rank(self, rank: int) -> Iterator[tuple[int, slice]]:
        """Each parameter, and its place in the rank's part; empty for those that are not in it."""
        first = rank * self.width
        for p, (start, end) in self.places.items():
            low, high = (min(max(x - first, 0), self.width) for x in (start, end))
            yield p, slice(low, high)

    def whole(self, line: Tensor, parameters: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Each parameter's gradient, in a tensor of its own, out of ``[ranks * width]``."""
        for p, (start, end) in self.places.items():
            like = parameters[p]
            part = line[start:end]
            if like.is_complex():
                yield p, torch.view_as_complex(part.view(*like.shape, 2)).clone()
            else:
                yield p, part.view(like.shape).clone()


def flat(tensor: Tensor) -> Tensor:
    """The coordinates of a dense or sparse tensor, as real numbers ``[n]``."""
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    return (torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense).reshape(-1)


def arranged(reach: Mapping[int, tuple[int, ...]], parameters: Sequence[Tensor], ranks: int) -> list[Bucket]:
    """Buckets for these parameters, given the tasks that reached each: the same on every rank."""
    kinds: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for p in sorted(reach):
        like = parameters[p]
        kinds.setdefault((len(reach[p]), like.dtype.to_real(), like.device), []).append(p)
    buckets = []
    for (count, dtype, device), members in kinds.items():
        places: dict[int, tuple[int, int]] = {}
        end = 0
        for i, p in enumerate(members):
            size = prod(parameters[p].shape) * (2 if parameters[p].is_complex() else 1)
            places[p] = end, end + size
            end += size
            if end * count * dtype.itemsize >= _BYTES or i + 1 == len(members):
                tasks = {q: reach[q] for q in places}
                buckets.append(Bucket(tasks, places, -(-end // ranks), ranks, dtype, device))
                places, end = {}, 0
    return buckets


def parted(
    groups: Iterable[Sequence[int]], reach: Sequence[tuple[int, ...]], parameters: Sequence[Tensor]
) -> list[list[int]]:
    """Groups of parameters, as many at a time as are worth a bucket, given the tasks that reached each parameter."""
    sizes = [len(tasks) * like.numel() * like.element_size() for tasks, like in zip(reach, parameters, strict=True)]
    enough = max(_BYTES, sum(sizes) * _PART)
    parts: list[list[int]] = [[]]
    for members in groups:
        parts[-1] += [p for p in members if reach[p]]
        if sum(sizes[p] for p in parts[-1]) >= enough:
            parts.append([])
    return [part for part in parts if part]
