"""Surgery at a shared representation: one pass through the trunk, whatever the number of tasks.

1. Each loss's backward pass ends at the features, the tensors through which the losses depend on the *trunk*. It gives the
   task's row there, and those of the parameters *beyond* the features, the heads.
2. The rows at all features make up the one cell of the step. Its Gram matrix is what the rule sees.
3. The combined row flows from the features into the trunk, in one backward pass.

So the combined gradient is that of ``sum_k c_k L_k``, where the rule's coefficients ``c`` are those of the rows at the
features. Parameters beyond them that one task alone reaches have that task's gradient, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ._buffer import Rows, gram
from ._gradients import TaskGradients, apart
from ._groups import some
from ._losses import Loss
from ._plan import Cell, Level, Plan, Reach
from .sources import Source
from .sources._backward import Backward
from .sources._graph import Place, node_of, place_of, reached_by

FeatureSpec: TypeAlias = Tensor | Sequence[Tensor]

_CELL = "features"


class Features(TaskGradients):
    """The per-task gradients of a step that is operated on at features: the parameters' rows, and then the features'.

    Those of several passes are side by side: a feature of one pass is another one in the next, and a task that does not
    reach it has zeros there. The same tensor in several passes is one feature.

    Args:
        gradients: of the parameters.
        look: whether gradients from the pass through the trunk are to be looked at: ``finite``.
        fail: whether they are to be finite.
    """

    def __init__(self, gradients: TaskGradients, *, look: bool, fail: bool) -> None:
        self.__dict__.update(gradients.__dict__)
        self.rows, self.names = list(gradients.rows), list(gradients.names)
        self.finite: list[Tensor] = []
        self._look, self._fail = look, fail
        self._count = len(gradients.rows)
        self._places: dict[Place, int] = {}  # of features, as indices of rows
        self._edges: dict[int, Any] = {}  # which keep the trunk's graphs
        self._trunk: set[int] = set()
        self._retain = False
        self._seeds: dict[int, Tensor] = {}
        self._awaited = 0

    def add(
        self, features: Sequence[Tensor], losses: Sequence[Loss], retain_graph: bool
    ) -> tuple[list[Tensor], list[Rows]]:
        """Takes in the features of a pass. Returns where its gradients end, and the rows there.

        Raises:
            ValueError: if a loss does not depend on the features, if no parameter is reached through them, if one of them
                depends on another, or if a parameter is reached both through them and past them.
        """
        tensors = list({place_of(feature): feature for feature in features}.values())
        trained = self.trained
        targets = [*tensors, *(self.parameters[p] for p in trained)]
        count = len(tensors)
        masks = reached_by([node_of(loss.output) for loss in losses], targets)
        beyond = [p for p, mask in zip(trained, masks[count:], strict=True) if mask]
        through = reached_by([place_of(tensor)[0] for tensor in tensors], targets)
        trunk = [p for p, mask in zip(trained, through[count:], strict=True) if mask]
        for i, loss in enumerate(losses):
            if not any(mask >> i & 1 for mask in masks[:count]):
                raise ValueError(
                    f"The loss of task {loss.name!r} does not depend on `features`, where its gradient is to be compared "
                    "with those of others. Pass the very tensors that the trunk returned and the losses were computed "
                    "from, no copies; or leave `features` out."
                )
        if any(through[:count]):
            raise ValueError(
                "One of the `features` depends on another. Pass tensors of which none is computed from another, such as "
                "the last layer's."
            )
        if not trunk:
            raise ValueError(
                "No trainable parameter of the optimizer is reached through `features`: there is no trunk. Pass what the "
                "shared layers returned, and see that they are not frozen."
            )
        if both := [self.names[p] for p in trunk if p in beyond]:
            raise ValueError(
                f"Parameters are reached both through `features` and past them: {some(both)}. Pass all tensors through "
                "which the losses depend on the shared layers, as a sequence; or leave `features` out, where layers past "
                "them share weights with layers ahead of them."
            )
        for tensor in tensors:
            place = place_of(tensor)
            if place not in self._places:
                self._places[place] = p = len(self.rows)
                self._edges[p] = get_gradient_edge(tensor)
                self.rows.append(Rows())
                self.names.append(_CELL if p == self._count else f"{_CELL}[{p - self._count}]")
        self._trunk.update(trunk)
        self._retain |= retain_graph
        chosen = [*(self._places[place_of(tensor)] for tensor in tensors), *beyond]
        return [*tensors, *(self.parameters[p] for p in beyond)], [self.rows[p] for p in chosen]

    def plan(self, tasks: tuple[str, ...], parameters: Sequence[int] | None = None) -> Plan:
        reach = tuple(rows.tasks for rows in self.rows)
        trunk = tuple(sorted(self._trunk))
        self._awaited = sum(map(bool, reach[self._count :]))
        return self._kept((reach, tasks, trunk), lambda: _Plan(reach, self._count, trunk, len(tasks), self.device))

    def accumulate(self, p: int, combined: Tensor) -> None:
        if p < self._count:
            self._note(combined)
            super().accumulate(p, combined)
            return
        self._seeds[p] = combined
        if len(self._seeds) == self._awaited:
            self._through()

    def _through(self) -> None:
        """Sends the combined rows of all features into the trunk."""
        trunk, seeds = sorted(self._trunk), list(self._seeds.values())
        edges = [self._edges[p] for p in self._seeds]
        parameters = [self.parameters[p] for p in trunk]
        try:
            found = torch.autograd.grad(edges, parameters, seeds, retain_graph=self._retain, allow_unused=True)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise RuntimeError(
                "The graph from the shared layers to `features` was freed before combine(), which goes through it. Let no "
                "other backward pass go there before; or give that one retain_graph=True."
            ) from error
        if self._fail:
            self._check(trunk, found)
        for p, gradient in zip(trunk, apart(found, seeds), strict=True):
            if gradient is not None:
                self._note(gradient)
                super().accumulate(p, gradient)

    def _note(self, gradient: Tensor) -> None:
        if self._look:
            self.finite.append(_finite(gradient).to(self.device))

    def _check(self, trunk: Sequence[int], found: Sequence[Tensor | None]) -> None:
        for p, gradient in zip(trunk, found, strict=True):
            if gradient is not None and not bool(_finite(gradient)):
                raise FloatingPointError(
                    f"The combined gradient for parameter {self.names[p]!r} holds inf or nan, though no task's gradient at "
                    "`features` did: it came up on the way through the shared layers, where tasks are not apart. Leave "
                    "`features` out to see which task's it is."
                )


class _Plan(Plan):
    """One cell: all features, whatever tasks reached each of them.

    Args:
        reach: for each parameter, and then for each feature, the tasks that reached it.
        count: of the parameters.
        trunk: the parameters that features were computed from.
        tasks: how many there are.
        device: where the Gram matrix is.
    """

    def __init__(self, reach: Reach, count: int, trunk: Sequence[int], tasks: int, device: torch.device) -> None:
        features = [p for p in range(count, len(reach)) if reach[p]]
        beyond = [p for p in range(count) if reach[p]]
        here = sorted({task for p in features for task in reach[p]})
        self.levels: list[Level] = []
        self.alone = [*features, *beyond]  # which is right where one task is left
        if len(here) > 1:
            self.alone = [p for p in beyond if len(reach[p]) == 1 and p not in trunk]
            shared = [p for p in beyond if p not in self.alone]
            cell = Cell(0, _CELL, tuple(here), tuple(sorted({*trunk, *shared})))
            self.levels = [_Level(cell, features, shared, reach, tasks, device)]


class _Level(Level):
    """The cell of the features, and the parameters beyond them that are combined alike."""

    def __init__(
        self, cell: Cell, features: Sequence[int], shared: Sequence[int], reach: Reach, tasks: int, device: torch.device
    ) -> None:
        super().__init__([cell], 1, tasks, device)
        self._features, self._combined = features, [*features, *shared]
        self._index = {p: torch.tensor(reach[p], device=device) for p in self._combined}

    def gram(self, rows: Sequence[Rows], dtype: torch.dtype) -> Tensor:
        tasks = self.active.shape[1]
        result = torch.zeros(1, tasks, tasks, dtype=dtype, device=self.active.device)
        for p in self._features:
            index = self._index[p]
            result[0].index_put_((index[:, None], index), gram([rows[p]]).to(result), accumulate=True)
        return result

    def combine(self, rows: Sequence[Rows], coefficients: Tensor) -> Iterator[tuple[int, Tensor]]:
        for p in self._combined:
            yield p, rows[p].combine(coefficients[0].index_select(0, self._index[p]))
            rows[p].clear()

    def operate(
        self, rows: Sequence[Rows], function: Callable[[int, Rows, Tensor | None], Tensor], mixing: Tensor | None
    ) -> Iterator[tuple[int, Tensor]]:
        (cell,) = self.cells
        for p in self._combined:
            index = self._index[p]
            if p in self._features:  # a part of one long vector, where a task that does not reach it has zeros
                index, there = self._tasks[0], rows[p].of
                for task in set(cell.tasks).difference(there):
                    row = next(iter(there.values()))
                    rows[p].add(task, row.new_zeros((), layout=torch.strided).expand(row.shape))
            rows[p].align()
            yield p, function(p, rows[p], None if mixing is None else mixing[0][index][:, index])
            rows[p].clear()


def read_features(features: object, *, groups: int, ranks: int, mixed: bool, source: Source) -> list[Tensor]:
    """The argument ``features`` of :meth:`SurgeryOptimizer.backward`, checked.

    Raises:
        TypeError: if it is no tensor, and no sequence of tensors.
        ValueError: if one has no graph, or hooks; and where there is no surgery at features.
    """
    found = [features] if isinstance(features, Tensor) else features
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise TypeError(f"`features` must be a tensor, or a sequence of tensors. Found {type(features).__name__}.")
    if not found:
        raise ValueError("`features` is empty: pass what the shared layers returned.")
    for i, feature in enumerate(found):
        name = "`features`" if isinstance(features, Tensor) else f"`features[{i}]`"
        if not isinstance(feature, Tensor):
            raise TypeError(f"{name} must be a tensor. Found {type(feature).__name__}.")
        if not feature.requires_grad or feature.is_leaf:
            state = "it is a leaf" if feature.requires_grad else "requires_grad=False"
            raise ValueError(
                f"{name} has no graph ({state}), and so leads to no shared layers. Pass the tensor that they returned, not "
                "a detached copy, and compute it outside torch.no_grad()."
            )
        if feature._backward_hooks:
            raise ValueError(
                f"{name} has a hook, which would run twice: in the tasks' passes, and in that through the shared layers. "
                "Register it on a tensor that it is computed from, or on one that is computed from it."
            )
    if mixed:
        raise ValueError(
            "`features` is for losses of tasks: a mixed batch has one pass anyway. Leave it out after split()."
        )
    if groups > 1:
        raise ValueError(
            f"`features` needs one surgery group: there is one Gram matrix, of the rows at the features. Found {groups}; "
            "make the optimizer with groups='model'."
        )
    if ranks > 1 or isinstance(source, Backward):
        why = f"Found {ranks} processes" if ranks > 1 else "The model is sharded by FSDP2"
        raise ValueError(f"`features` works in one process that holds the whole model. {why}; leave `features` out.")
    return list(found)


def _finite(gradient: Tensor) -> Tensor:
    return (gradient._values() if gradient.is_sparse else gradient).isfinite().all()
