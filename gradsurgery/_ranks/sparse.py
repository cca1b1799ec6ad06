"""Sparse rows of all ranks: entries that every rank gets in full."""

from __future__ import annotations

from collections.abc import Sequence

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


def exchange(
    wire: Wire, rows: Rows, parameter: Tensor, tasks: Sequence[int], shares: Sequence[float], dense: bool, factor: float
) -> KnownRows:
    """The rows of all ranks, added up, of a parameter whose rows are sparse on every rank that has some.

    Args:
        wire: the collectives.
        rows: this rank's. They are freed.
        parameter: whose they are.
        tasks: that reached it on any rank.
        shares: of this rank in the tasks.
        dense: whether the combined gradient is to be dense.
        factor: what the rows' products count on this rank.
    """
    own = {task: (row * shares[task]).coalesce() for task, row in rows.of.items()}
    layout = wire.gather_objects({task: (row.sparse_dim(), row.values().shape[0]) for task, row in own.items()})
    sparse_dim = next(dims for counts in layout for dims, _ in counts.values())
    most = max(sum(count for _, count in counts.values()) for counts in layout)
    shape = parameter.shape[sparse_dim:]
    width = flat(parameter.new_empty(1, *shape)).numel()
    indices = torch.zeros(most, sparse_dim, dtype=torch.int64, device=parameter.device)
    values = flat(parameter.new_zeros(most, *shape)).view(most, width)
    start = 0
    for row in own.values():
        end = start + row.values().shape[0]
        indices[start:end] = row.indices().T
        values[start:end] = flat(row.values()).view(-1, width)
        start = end
    all_indices = indices.new_empty(wire.size, most, sparse_dim)
    all_values = values.new_empty(wire.size, most, width)
    for whole, shard in ((all_indices, indices), (all_values, values)):
        if most:
            wire.start_all_gather(whole.view(-1), shard.reshape(-1)).wait()
    result = KnownRows(factor)
    rows.clear()
    for task in tasks:
        found_indices, found_values = [], []
        for rank, counts in enumerate(layout):
            start = 0
            for other, (_, count) in counts.items():
                if other == task:
                    found_indices.append(all_indices[rank, start : start + count].T)
                    found_values.append(all_values[rank, start : start + count])
                start += count
        flat_values = torch.cat(found_values)
        real = flat_values.view(-1, *shape, 2) if parameter.is_complex() else flat_values.view(-1, *shape)
        entries = torch.view_as_complex(real) if parameter.is_complex() else real
        row = torch.sparse_coo_tensor(torch.cat(found_indices, 1), entries, parameter.shape, check_invariants=False)
        result.add(task, row.coalesce(), dense=dense)
    result.align()
    return result
