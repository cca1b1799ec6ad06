"""Which rows are operated on together: the cells of a step.

Within a surgery group, parameters that the same set of at least two tasks reached form a *cell*. In a cell every task has
a gradient for every parameter, so inner products mean what a paper means by them: a head that one task alone reaches
neither dilutes a cosine nor is changed by another task. Cells depend on nothing but which task reached what, so that the
plan of a step is made once and kept.

A rule is called on one cell per group at a time, since its state is that of the group: first on the widest cells, then,
should some group have more, on the next. Nearly always there is one such *level*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._buffer import Rows, gram

Reach = tuple[tuple[int, ...], ...]
"""For each parameter, the tasks that reached it."""


@dataclass(frozen=True, eq=False)
class Cell:
    """A part of surgery group ``group`` that the same ``tasks`` reached: the indices of its parameters."""

    group: int
    name: str
    tasks: tuple[int, ...]
    parameters: tuple[int, ...]


class Level:
    """At most one cell of each surgery group, to be operated on in one call of the rule."""

    def __init__(self, cells: Sequence[Cell], groups: int, tasks: int, device: torch.device) -> None:
        self.cells = cells
        self.full = len(cells) == groups and all(len(cell.tasks) == tasks for cell in cells)
        active = torch.zeros(groups, tasks, dtype=torch.bool)
        for cell in cells:
            active[cell.group, list(cell.tasks)] = True
        self.active = active.to(device)
        self.groups = torch.tensor([cell.group for cell in cells], device=device)
        self._tasks = [torch.tensor(cell.tasks, device=device) for cell in cells]

    def gram(self, rows: Sequence[Rows], dtype: torch.dtype) -> Tensor:
        """Gram matrices ``[G, K, K]``, zero for tasks that are not there."""
        grams = [gram([rows[p] for p in cell.parameters]).to(self.active.device, dtype) for cell in self.cells]
        if self.full:
            return torch.stack(grams)
        groups, tasks = self.active.shape
        result = torch.zeros(groups, tasks, tasks, dtype=dtype, device=self.active.device)
        for cell, index, small in zip(self.cells, self._tasks, grams, strict=True):
            result[cell.group].index_put_((index[:, None], index[None, :]), small)
        return result

    def combine(self, rows: Sequence[Rows], coefficients: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each parameter's combined gradient, given the tasks' coefficients ``[G, K]``; the rows are freed on the way."""
        for cell, index in zip(self.cells, self._tasks, strict=True):
            weights = coefficients[cell.group].index_select(0, index)
            for p in cell.parameters:
                yield p, rows[p].combine(weights)
                rows[p].clear()

    def operate(
        self, rows: Sequence[Rows], function: Callable[[int, Rows, Tensor | None], Tensor], mixing: Tensor | None
    ) -> Iterator[tuple[int, Tensor]]:
        """As :meth:`combine`, by a function of parameter, rows, and mixing matrix ``[k, k]``; None unless there is one."""
        for cell, index in zip(self.cells, self._tasks, strict=True):
            own = None if mixing is None else mixing[cell.group].index_select(0, index).index_select(1, index)
            for p in cell.parameters:
                yield p, function(p, rows[p], own)
                rows[p].clear()


class Plan:
    """The cells of a step, from who reached what.

    Args:
        reach: for each parameter, the tasks that reached it.
        group_of: for each parameter, the index of its surgery group.
        groups: names of the ``G`` surgery groups.
        tasks: names of the ``K`` tasks.
        device: where the Gram matrices are.

    Attributes:
        levels: what is operated on, in this order.
        alone: the parameters that one task alone reached.
    """

    def __init__(
        self,
        reach: Reach,
        group_of: Sequence[int],
        groups: Sequence[str],
        tasks: Sequence[str],
        device: torch.device,
    ) -> None:
        self.alone = [p for p, reached in enumerate(reach) if len(reached) == 1]
        members: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for p, reached in enumerate(reach):
            if len(reached) > 1:
                members.setdefault(group_of[p], {}).setdefault(reached, []).append(p)
        levels: list[list[Cell]] = []
        for group in sorted(members):
            widest_first = sorted(members[group].items(), key=lambda item: (-len(item[0]), item[1]))
            for depth, (reached, parameters) in enumerate(widest_first):
                name = groups[group]
                if depth:
                    name += f" [{', '.join(tasks[k] for k in reached)}]"
                if depth == len(levels):
                    levels.append([])
                levels[depth].append(Cell(group, name, reached, tuple(parameters)))
        self.levels = [Level(cells, len(groups), len(tasks), device) for cells in levels]
