"""Sparse rows of all ranks: entries that every rank gets in full."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .._buffer import Rows
from .buckets import flat
from .wire import Wire


class KnownRows(Rows):
    """Rows that every rank has in full. So that their products are counted once, one rank counts them.

    Args:
        factor: what its products count on this rank.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def products(self, dtype: torch.dtype) -> list[Tensor]:
        return [product * self._factor for product in super().products(dtype)] if self._factor else []


class Exchange:
    """The entries of all ranks, of parameters whose rows are sparse on every rank that has some.

    Args:
        wire: the collectives.
        rows: this rank's, of each parameter.
        shares: of this rank in the tasks.
    """

    def __init__(self, wire: Wire, rows: Sequence[Rows], shares: Sequence[float]) -> None:
        self._wire = wire
        self._own = [{task: (row * shares[task]).coalesce() for task, row in own.of.items()} for own in rows]
        counts = [{task: (row.sparse_dim(), row.values().shape[0]) for task, row in own.items()} for own in self._own]
        self._layout: list[list[dict[int, tuple[int, int]]]] = wire.gather_objects(counts)

    def _most(self, i: int) -> int:
        return max(sum(count for _, count in layout[i].values()) for layout in self._layout)

    def is_larger(self, i: int, parameter: Tensor, tasks: Sequence[int]) -> bool:
        """Whether more would travel than of dense rows."""
        sparse_dim = self._sparse_dim(i)
        entry = prod(parameter.shape[sparse_dim:]) + 2 * sparse_dim  # an index is as long as two float32
        return self._wire.size * self._most(i) * entry > (len(tasks) + 1) * parameter.numel()

    def _sparse_dim(self, i: int) -> int:
        return next(dims for layout in self._layout for dims, _ in layout[i].values())

    def rows(self, i: int, parameter: Tensor, tasks: Sequence[int], dense: bool, factor: float) -> KnownRows:
        """The rows of all ranks, added up.

        Args:
            i: which of the parameters it is.
            parameter: the parameter.
            tasks: that reached it on any rank.
            dense: whether the combined gradient is to be dense.
            factor: what the rows' products count on this rank.
        """
        sparse_dim, most = self._sparse_dim(i), self._most(i)
        shape = parameter.shape[sparse_dim:]
        width = prod(shape) * (2 if parameter.is_complex() else 1)
        indices = torch.zeros(most, sparse_dim, dtype=torch.int64, device=parameter.device)
        values = torch.zeros(most, width, dtype=parameter.dtype.to_real(), device=parameter.device)
        start = 0
        for row in self._own[i].values():
            end = start + row.values().shape[0]
            indices[start:end] = row.indices().T
            values[start:end] = flat(row.values()).view(-1, width)
            start = end
        all_indices = indices.new_empty(self._wire.size, most, sparse_dim)
        all_values = values.new_empty(self._wire.size, most, width)
        if most:
            self._wire.start_all_gather(all_indices.view(-1), indices.view(-1)).wait()
            self._wire.start_all_gather(all_values.view(-1), values.view(-1)).wait()
        found: dict[int, list[tuple[Tensor, Tensor]]] = {task: [] for task in tasks}
        for rank, layout in enumerate(self._layout):
            start = 0
            for task, (_, count) in layout[i].items():
                found[task].append((all_indices[rank, start : start + count], all_values[rank, start : start + count]))
                start += count
        result = KnownRows(factor)
        for task, parts in found.items():
            places, entries = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            if parameter.is_complex():
                entries = torch.view_as_complex(entries.view(-1, width // 2, 2))
            row = torch.sparse_coo_tensor(places.T, entries.view(-1, *shape), parameter.shape, check_invariants=False)
            result.add(task, row.coalesce(), dense=dense)
        result.align()
        return result
