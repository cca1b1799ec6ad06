"""All losses' vector-Jacobian products in one vectorised backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from .._buffer import Rows
from ._root import Root, unreached


@dataclass(frozen=True)
class Batched:
    """One backward pass for many losses, vectorised with ``vmap``: for many losses on shared inputs.

    Args:
        chunk_size: how many losses at a time; None means all. Activation gradients take this many times the memory.

    Raises:
        ValueError: if ``chunk_size`` is not positive.

    Note:
        A vectorised pass computes a gradient of zero where there is none. Which loss reaches which parameter is therefore
        read from the autograd graph.
    """

    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and not self.chunk_size >= 1:
            raise ValueError(f"`chunk_size` must be at least 1, or None for all at once. Found {self.chunk_size!r}.")

    def __call__(
        self, roots: Sequence[Root], parameters: Sequence[Tensor], rows: Sequence[Rows], *, retain_graph: bool
    ) -> None:
        roots = sorted(roots, key=lambda root: root.task)  # the order of rows in a block
        reached = _reached([_node(root.output) for root in roots], parameters)
        for i, root in enumerate(roots):
            if not any((mask >> i) & 1 for mask in reached):
                raise unreached(root)
        size = self.chunk_size or len(roots)
        for start in range(0, len(roots), size):
            chunk = roots[start : start + size]
            last = start + size >= len(roots)
            wanted = [p for p, mask in enumerate(reached) if (mask >> start) & ((1 << len(chunk)) - 1)]
            blocks = self._grad(chunk, [parameters[p] for p in wanted], retain_graph or not last)
            for p, block in zip(wanted, blocks, strict=True):
                if block is not None:
                    there = [i for i in range(len(chunk)) if (reached[p] >> (start + i)) & 1]
                    block = block if len(there) == len(chunk) else block[there]
                    rows[p].add_block([chunk[i].task for i in there], block)

    @staticmethod
    def _grad(roots: Sequence[Root], parameters: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
        seeds = []
        for i, root in enumerate(roots):
            seed = root.gradient.new_zeros((len(roots), *root.gradient.shape))
            seed[i] = root.gradient
            seeds.append(seed)
        try:
            return torch.autograd.grad(
                [root.output for root in roots],
                parameters,
                seeds,
                retain_graph=retain_graph,
                allow_unused=True,
                is_grads_batched=True,
            )
        except RuntimeError as error:
            raise RuntimeError(
                "source='batched' could not vectorise this model's backward pass (its message is above). "
                "Use source='autograd', which works on every model."
            ) from error


def _node(output: Tensor | GradientEdge) -> Node:
    return (output if isinstance(output, GradientEdge) else get_gradient_edge(output)).node


def _reached(starts: Sequence[Node], parameters: Sequence[Tensor]) -> list[int]:
    """For each parameter, the set of losses that reach it: a bit mask.

    Each node is visited once, after all nodes that lead to it, and hands its mask on.
    """
    masks: dict[Node, int] = {}
    for i, start in enumerate(starts):
        masks[start] = masks.get(start, 0) | (1 << i)
    leaves: dict[int, int] = {}
    for node in _topological(masks):
        mask = masks[node]
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = leaves.get(id(variable), 0) | mask
        for following in _following(node):
            masks[following] = masks.get(following, 0) | mask
    return [leaves.get(id(parameter), 0) for parameter in parameters]


def _following(node: Node) -> Iterator[Node]:
    return (edge[0] for edge in node.next_functions if edge[0] is not None)


def _topological(starts: dict[Node, int]) -> list[Node]:
    order: list[Node] = []
    done: set[Node] = set()
    for start in list(starts):
        stack: list[tuple[Node, Iterator[Node]]] = []
        if start not in done:
            done.add(start)
            stack.append((start, _following(start)))
        while stack:
            node, rest = stack[-1]
            for following in rest:
                if following not in done:
                    done.add(following)
                    stack.append((following, _following(following)))
                    break
            else:
                order.append(node)
                stack.pop()
    return order[::-1]
