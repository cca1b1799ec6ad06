"""All tasks' gradients from one backward pass over a mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ..._buffer import Rows
from ..._groups import some
from .._graph import reached_by
from .cuts import New, cut, general, split_labelled
from .labels import Labels
from .passage import Passage
from .probe import call, present
from .route import Key, Route, Work
from .saved import keep_readable
from .verify import differences, precision

_END = 1 << 63


class Pass:
    """One backward pass over a mixed batch.

    Args:
        losses: ``[B, ...]``.
        labels: the index of each loss's task, ``[B, 1, ...]``.
        parameters: whose gradients are wanted.
        rows: where they go.
        names: of the parameters, for messages.

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
        self._at_leaves = [
            (wanted, leaf.parameter)
            for work in route.works
            for wanted in [*work.shared, *(wanted for wanted, _ in work.labelled)]
            if (leaf := route.leaves.get(wanted.target)) is not None
        ]
        for _, p in self._at_leaves:
            self._awaited[p] += 1

    @property
    def reached(self) -> list[int]:
        """The parameters that gradients will arrive at."""
        return [p for p, count in enumerate(self._awaited) if count]

    def outlook(self) -> tuple[list[set[int]], list[int]]:
        """What is known ahead: the tasks that will reach each parameter, and the order in which parameters are complete."""
        tasks: list[set[int]] = [set() for _ in self._parameters]
        made: dict[Key, set[int]] = {key: set() for key in self._made}
        last = [_END if mask else -_END for mask in self._reach]
        ends = self._route.ends()
        for work in self._route.works:
            node, here = work.passage.node, present(work.passage.labels)
            # The engine takes the youngest node that is ready; those that it does not come by wait for its end.
            when = _END if node in ends else -node._sequence_nr()
            for wanted, own in [*((w, here) for w in work.shared), *((w, present([s])) for w, s in work.labelled)]:
                leaf = self._route.leaves.get(wanted.target)
                if leaf is None:
                    made[wanted.target].update(own)
                else:
                    tasks[leaf.parameter].update(own)
                    last[leaf.parameter] = max(last[leaf.parameter], when)
        for p, mask in enumerate(self._reach):
            tasks[p].update(task for i, own in enumerate(made.values()) if mask >> i & 1 for task in own)
        return tasks, sorted(self.reached, key=last.__getitem__)

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
        if bad := [p for p, difference in enumerate(found) if not difference <= tolerance]:
            worst = max(bad, key=found.__getitem__)
            raise RuntimeError(
                "The gradients of a single pass are not those of a plain backward pass: "
                f"{some(self._route.names[p] for p in bad)} (at worst {self._route.names[worst]!r}, by {found[worst]:.1e} "
                "of its norm). Please report this with the model. Until then compute one loss per task, and pass them to "
                "backward() as a mapping, without split()."
            )

    def run(
        self,
        seeds: Tensor,
        *,
        retain_graph: bool,
        complete: Callable[[int], None] | None = None,
        new: New | None = None,
    ) -> None:
        """Adds each task's gradients to the rows.

        Args:
            seeds: what flows into each loss, of their shape.
            retain_graph: keep the graph.
            complete: called with the index of each parameter once all of its gradients are there.
            new: where memory for blocks comes from. It is free once rows are.
        """
        self._complete = complete
        for wanted, _ in self._at_leaves:
            wanted.new = wanted.new if new is None else new
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
