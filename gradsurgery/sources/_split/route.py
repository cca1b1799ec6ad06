"""What one backward pass has to do, and at which nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from .._graph import topological
from .cuts import CUTS, Wanted
from .flow import Interaction, flows
from .labels import SHARED, Flow, Labels, Shared, merge
from .passage import Passage, kind, signed
from .probe import present

Key: TypeAlias = tuple[Node, int]
"""An output of a node."""


@dataclass(frozen=True)
class Leaf:
    """Where an edge leads: to a parameter, maybe through steps that only rearrange its gradient."""

    parameter: int
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()


@dataclass(eq=False)
class Work:
    """What is to be done at a node once the gradients of its outputs are there."""

    passage: Passage
    shared: list[Wanted] = field(default_factory=list)
    labelled: list[tuple[Wanted, Labels]] = field(default_factory=list)
    below: list[Node] = field(default_factory=list)  # where labelled gradients go on to

    def __bool__(self) -> bool:
        return bool(self.shared or self.labelled)


class Route:
    """What one backward pass has to do at which node, from whose losses are whose.

    Args:
        losses: ``[B, ...]``.
        labels: the task of each loss, ``[B, 1, ...]``.
        parameters: whose gradients are wanted.
        names: of the parameters, for messages.

    Raises:
        ValueError: if losses of several tasks depend on each other's samples.
    """

    def __init__(self, losses: Tensor, labels: Labels, parameters: Sequence[Tensor], names: Sequence[str]) -> None:
        self.names = names
        self._index = {id(parameter): p for p, parameter in enumerate(parameters)}
        self._works: dict[Node, Work] = {}
        self._arrived: dict[Node, list[tuple[Work | None, int, int, Flow]]] = {}
        edge = get_gradient_edge(losses)
        self.order = topological([edge.node])
        self._leads = self._leading()
        self._below: set[Node] = set()
        self._arrived[edge.node] = [(None, 0, edge.output_nr, labels)]
        for node in self.order:
            if node in self._arrived and self._leaf(node) is None:
                self._visit(node, self._arrived[node])
        self.works = [work for work in self._works.values() if work]
        self.leaves: dict[tuple[Node, int], Leaf] = {}
        self.made: list[Key] = []  # outputs of nodes that make tensors of parameters alone
        for work in self.works:
            for wanted in [*work.shared, *(wanted for wanted, _ in work.labelled)]:
                leaf = self._follow(wanted.target[0])
                if leaf is not None:
                    self.leaves[wanted.target] = leaf
                elif wanted.target not in self.made:
                    self.made.append(wanted.target)

    def ends(self) -> set[Node]:
        """The nodes with work below which there is none: the engine would not come by."""
        busy: set[Node] = set()
        ends = set()
        for node in reversed(self.order):
            work = self._works.get(node)
            if work is None:
                continue
            if any(below in busy for below in work.below):
                busy.add(node)
            elif work:
                busy.add(node)
                ends.add(node)
        return ends

    def _leading(self) -> set[Node]:
        """The nodes that lead to one of the parameters."""
        leads: set[Node] = set()
        for node in reversed(self.order):
            if self._leaf(node) is not None or any(n in leads for n, _ in node.next_functions if n is not None):
                leads.add(node)
        return leads

    def _leaf(self, node: Node) -> int | None:
        variable = getattr(node, "variable", None)
        return None if variable is None else self._index.get(id(variable))

    def _visit(self, node: Node, arrived: Sequence[tuple[Work | None, int, int, Flow]]) -> None:
        if any(isinstance(flow, Shared) for *_, flow in arrived):
            self._visit_below(node, arrived)
            return
        outputs = node._input_metadata
        merged: list[Flow] = [None] * len(outputs)
        for _, _, number, flow in arrived:
            merged[number] = merge(merged[number], flow)
        if any(isinstance(flow, Shared) for flow in merged):
            self._visit_below(node, arrived)
            return
        labels = [flow if isinstance(flow, np.ndarray) else None for flow in merged]
        shapes: list[tuple[int, ...] | None] = []
        for target, number in node.next_functions:
            leads = target is not None and target in self._leads
            shapes.append(tuple(target._input_metadata[number].shape) if leads and target is not None else None)
        passage = Passage(node, kind(node), labels, [tuple(output.shape) for output in outputs], shapes)
        work = self._works[node] = Work(passage)
        try:
            found = flows(passage)
        except Interaction as interaction:
            raise self._interaction(node, *interaction.args) from None
        for i, flow in enumerate(found):
            target, number = node.next_functions[i]
            if flow is None or target is None:
                continue
            if self._leaf(target) is not None:
                self._add(work, i, flow)
                continue
            self._arrived.setdefault(target, []).append((work, i, number, flow))
            if isinstance(flow, Shared):
                self._add(work, i, flow)
            else:
                work.below.append(target)

    def _visit_below(self, node: Node, arrived: Sequence[tuple[Work | None, int, int, Flow]]) -> None:
        """A node that works on tensors which tasks share, such as one that derives a weight from parameters."""
        self._below.add(node)
        for work, i, _, flow in arrived:
            if work is None or isinstance(flow, Shared) or flow is None:
                continue
            if len(present([flow])) > 1:
                raise self._interaction(node, "elements of its result are used by samples of several tasks")
            self._add(work, i, SHARED)
            work.below.remove(node)
        for target, number in node.next_functions:
            if target is not None and target in self._leads and self._leaf(target) is None:
                self._arrived.setdefault(target, []).append((None, 0, number, SHARED))

    @staticmethod
    def _add(work: Work, i: int, flow: Flow) -> None:
        target, number = work.passage.node.next_functions[i]
        shape = work.passage.inner[i]
        assert target is not None
        assert shape is not None
        wanted = Wanted(i, shape, (target, number), not target._input_metadata[number].dtype.is_complex)
        if isinstance(flow, np.ndarray) and not (flow.size == 1 and work.passage.name in CUTS):
            work.labelled.append((wanted, flow))
        else:
            work.shared.append(wanted)

    def _follow(self, node: Node) -> Leaf | None:
        steps: list[Callable[[Tensor], Tensor]] = []
        while (p := self._leaf(node)) is None:
            make = _STEPS.get(kind(node))
            targets = [(target, number) for target, number in node.next_functions if target is not None]
            if make is None or len(targets) != 1:
                return None
            following, number = targets[0]
            steps.append(make(node, tuple(following._input_metadata[number].shape)))
            node = following
        return Leaf(p, tuple(steps))

    def _interaction(self, node: Node, what: str, remedy: str | None = None) -> ValueError:
        below = {id(variable) for n in topological([node]) if (variable := getattr(n, "variable", None)) is not None}
        names = [name for p, name in zip(self._index, self.names, strict=True) if p in below]
        where = f", on the way to parameter {names[0]!r}" if names else ""
        remedy = remedy or (
            "compute one loss per task, and pass them to backward() as a mapping, without split(): that takes one backward "
            "pass per task"
        )
        return ValueError(
            f"split() needs samples that do not interact, but at operation {kind(node)}{where}: {what}. Remedy: {remedy}."
        )


def _rearranged(steps: Callable[[Node], Callable[[Tensor], Tensor]]) -> Callable[[Node, Any], Callable[[Tensor], Tensor]]:
    return lambda node, shape: steps(node)


def _to_shape(_: Node, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda block: block.reshape(len(block), *shape)


def _transposition(node: Any) -> Callable[[Tensor], Tensor]:
    dims = [signed(node._saved_dim0), signed(node._saved_dim1)]
    a, b = (dim + 1 if dim >= 0 else dim for dim in dims)
    return lambda block: block.transpose(a, b)


def _permutation(node: Any) -> Callable[[Tensor], Tensor]:
    dims = [signed(dim) % len(node._saved_dims) for dim in node._saved_dims]
    back = [0, *(int(i) + 1 for i in np.argsort(dims))]
    return lambda block: block.permute(back)


def _same(block: Tensor) -> Tensor:
    return block


# What lies between a parameter and its use most often. Each returns how a block of gradients goes through.
_STEPS: Mapping[str, Callable[[Node, Any], Callable[[Tensor], Tensor]]] = {
    "T": _rearranged(lambda _: lambda block: block.mT if block.ndim == 3 else block),
    "Transpose": _rearranged(_transposition),
    "Permute": _rearranged(_permutation),
    **dict.fromkeys(("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"), _to_shape),
    **dict.fromkeys(("ToCopy", "Clone", "Alias"), _rearranged(lambda _: _same)),
}
