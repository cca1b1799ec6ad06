"""All tasks' gradients from one backward pass over a mixed batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ..._buffer import Rows
from ..._groups import some
from .._graph import reached_by, topological
from .cuts import CUTS, New, Wanted, cut, general, split_labelled
from .flow import Interaction, Passage, call, flows, present, signed
from .labels import SHARED, Flow, Labels, Shared, merge
from .saved import keep_readable
from .verify import differences, precision

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


def kind(node: Node) -> str:
    """The kind of a node, such as ``"Addmm"``."""
    return re.sub(r"Backward\d*$", "", node.name())


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


class Pass:
    """One backward pass over a mixed batch.

    Args:
        losses: ``[B, ...]``.
        labels: the index of each loss's task, ``[B, 1, ...]``.
        parameters: whose gradients are wanted.
        rows: where they go.
        names: of the parameters, for messages.
        new: where memory for blocks comes from. It is free once rows are.

    Raises:
        ValueError: if losses of several tasks depend on each other's samples, or on none of the parameters.
    """

    def __init__(
        self,
        losses: Tensor,
        labels: Labels,
        parameters: Sequence[Tensor],
        rows: Sequence[Rows],
        names: Sequence[str],
        new: New | None = None,
    ) -> None:
        self._losses = losses
        self._parameters = parameters
        self._rows = rows
        self._complete: Callable[[int], None] | None = None
        self._route = route = Route(losses, labels, parameters, names)
        if not route.works:
            raise ValueError(
                "The losses reach none of the optimizer's trainable parameters. Were they computed by another model, or "
                "are all parameters that they depend on frozen?"
            )
        self._made: dict[Key, dict[int, Tensor]] = {key: {} for key in route.made}
        self._reach = reached_by([node for node, _ in route.made], parameters) if route.made else [0] * len(parameters)
        self._awaited = [int(mask > 0) for mask in self._reach]
        for work in route.works:
            for wanted in [*work.shared, *(wanted for wanted, _ in work.labelled)]:
                leaf = route.leaves.get(wanted.target)
                if leaf is not None:
                    self._awaited[leaf.parameter] += 1
                    wanted.new = wanted.new if new is None else new

    @property
    def reached(self) -> list[int]:
        """The parameters that gradients will arrive at."""
        return [p for p, count in enumerate(self._awaited) if count]

    @property
    def precision(self) -> float:
        """The machine precision of the coarsest gradients on the way."""
        return precision(self._route.order)

    def verify(self, weights: Tensor, plain: Sequence[Tensor | None]) -> None:
        """Compares the rows with a plain backward pass over losses that are weighted by task, which no task's share of a
        gradient can be mistaken in. Waits for the device.

        Args:
            weights: of the tasks, ``[K]``.
            plain: for each parameter, ``sum_k w_k dL_k/dp``.

        Raises:
            RuntimeError: naming the parameters that differ.
        """
        tolerance = 3 * self.precision**0.5
        found = differences(self._rows, weights, plain).tolist()
        if bad := [p for p, difference in enumerate(found) if not difference <= tolerance and difference == difference]:
            worst = max(bad, key=found.__getitem__)
            raise RuntimeError(
                "The gradients of a single pass are not those of a plain backward pass: "
                f"{some(self._route.names[p] for p in bad)} (at worst {self._route.names[worst]!r}, by {found[worst]:.1e} "
                "of its norm). Please report this with the model. Until then compute one loss per task, and pass them to "
                "backward() as a mapping, without split()."
            )

    def run(self, seeds: Tensor, *, retain_graph: bool, complete: Callable[[int], None] | None = None) -> None:
        """Adds each task's gradients to the rows.

        Args:
            seeds: what flows into each loss, of their shape.
            retain_graph: keep the graph.
            complete: called with the index of each parameter once all of its gradients are there.
        """
        self._complete = complete
        ends = self._route.ends()
        captured: list[tuple[Work, list[int]]] = []
        handles = []
        for work in self._route.works:
            node = work.passage.node
            keep_readable(node)
            if node in ends:
                captured.append((work, [i for i, labels in enumerate(work.passage.labels) if labels is not None]))
            else:
                handles.append(node.register_prehook(self._hook(work)))
        inputs: list[Any] = [GradientEdge(work.passage.node, i) for work, numbers in captured for i in numbers]
        try:
            found = torch.autograd.grad([self._losses], inputs, [seeds], retain_graph=retain_graph, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        arrived = list(reversed(found))
        del found
        with torch.no_grad():
            for work, numbers in captured:
                gradients: list[Tensor | None] = [None] * len(work.passage.labels)
                for i in numbers:
                    gradients[i] = arrived.pop()
                self._do(work, gradients)
            self._finish(retain_graph)

    def _hook(self, work: Work) -> Callable[[Any], None]:
        def hook(gradients: Sequence[Tensor | None]) -> None:
            with torch.no_grad():
                self._do(work, gradients)

        return hook

    def _do(self, work: Work, gradients: Sequence[Tensor | None]) -> None:
        passage = work.passage
        labels = [None if gradient is None else own for own, gradient in zip(passage.labels, gradients, strict=True)]
        if any(own is not known for own, known in zip(labels, passage.labels, strict=True)):
            passage = Passage(passage.node, passage.name, labels, passage.outer, passage.inner)
        if any(own is not None for own in labels):
            blocks = cut(passage, gradients, work.shared) if work.shared else {}
            products = call(passage.node, gradients) if work.labelled else ()
            for wanted, own in work.labelled:
                product = products[wanted.edge]
                if product is None:
                    continue
                if product.is_sparse:
                    blocks.update(general(passage, gradients, [wanted]))
                else:
                    blocks[wanted.edge] = split_labelled(product.sum_to_size(wanted.shape), own)
        else:
            blocks = {}
        for wanted in [*work.shared, *(wanted for wanted, _ in work.labelled)]:
            self._deliver(passage.node, wanted.target, *blocks.pop(wanted.edge, ([], None)))

    def _deliver(self, source: Node, target: Key, tasks: Sequence[int], block: Tensor | list[Tensor] | None) -> None:
        leaf = self._route.leaves.get(target)
        if leaf is None:
            if block is not None:
                made = self._made[target]
                for task, gradient in zip(tasks, block, strict=True):
                    gradient = gradient.to_dense() if gradient.is_sparse else gradient
                    made[task] = made[task] + gradient if task in made else gradient
            return
        if block is not None:
            p = leaf.parameter
            if isinstance(block, list):
                keeps_sparse = getattr(source, "_saved_sparse", True)
                for task, gradient in zip(tasks, block, strict=True):
                    for step in leaf.steps:
                        gradient = step(gradient.to_dense()[None])[0]
                    self._rows[p].add(task, gradient, dense=not keeps_sparse)
            else:
                for step in leaf.steps:
                    block = step(block)
                self._rows[p].add_block(tasks, block.to(self._parameters[p].dtype), owned=True)
        self._arrived(leaf.parameter)

    def _arrived(self, p: int) -> None:
        self._awaited[p] -= 1
        if not self._awaited[p] and self._complete is not None:
            self._complete(p)

    def _finish(self, retain_graph: bool) -> None:
        """Takes the gradients of what was made of parameters alone back to the parameters."""
        wanted = [p for p, mask in enumerate(self._reach) if mask]
        made = {key: blocks for key, blocks in self._made.items() if blocks}
        tasks = sorted({task for blocks in made.values() for task in blocks})
        edges: list[Any] = [GradientEdge(*key) for key in made]
        seeds = []
        for blocks in made.values():
            like = next(iter(blocks.values()))
            seeds.append(torch.stack([blocks.get(task, torch.zeros_like(like)) for task in tasks]))
        found = _pulled_back(edges, [self._parameters[p] for p in wanted], seeds, retain_graph) if made else []
        keys = list(self._made)
        for p, block in zip(wanted, found or [None] * len(wanted), strict=True):
            if block is not None:
                mine = {t for i, key in enumerate(keys) if (self._reach[p] >> i) & 1 for t in self._made[key]}
                there = [i for i, task in enumerate(tasks) if task in mine]
                self._rows[p].add_block([tasks[i] for i in there], block if len(there) == len(tasks) else block[there])
            self._arrived(p)


def _pulled_back(
    edges: Sequence[Any], parameters: Sequence[Tensor], seeds: Sequence[Tensor], retain_graph: bool
) -> Sequence[Tensor | None]:
    """Vector-Jacobian products for seeds ``[k, ...]``; one after the other where they cannot be vectorised."""
    count = len(seeds[0])
    if count > 1:
        try:
            return torch.autograd.grad(
                edges, parameters, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:
            pass
    rows = [
        torch.autograd.grad(
            edges, parameters, [seed[k] for seed in seeds], retain_graph=retain_graph or k < count - 1, allow_unused=True
        )
        for k in range(count)
    ]
    return [
        None if any(row is None for row in parts) else torch.stack([row for row in parts if row is not None])
        for parts in zip(*rows, strict=True)
    ]
