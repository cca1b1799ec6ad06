"""Walking through autograd graphs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeAlias

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Place: TypeAlias = tuple[Node, int]
"""Where a tensor's gradient arrives: at a node, and which of the node's."""


def place_of(tensor: Tensor) -> Place:
    """Where the gradient of a tensor arrives that requires one."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def node_of(output: Tensor | GradientEdge) -> Node:
    """The node where a backward pass starts."""
    return (output if isinstance(output, GradientEdge) else get_gradient_edge(output)).node


def following(node: Node, ends: Collection[Place] = ()) -> Iterator[Node]:
    """The nodes that a node hands gradients to, but at no place of ``ends``."""
    return (edge[0] for edge in node.next_functions if edge[0] is not None and edge not in ends)


def topological(starts: Iterable[Node], ends: Collection[Place] = ()) -> list[Node]:
    """All nodes that can be reached, each after all nodes that lead to it. The walk ends at the places ``ends``."""
    order: list[Node] = []
    done: set[Node] = set()
    for start in list(starts):
        stack: list[tuple[Node, Iterator[Node]]] = []
        if start not in done:
            done.add(start)
            stack.append((start, following(start, ends)))
        while stack:
            node, rest = stack[-1]
            for after in rest:
                if after not in done:
                    done.add(after)
                    stack.append((after, following(after, ends)))
                    break
            else:
                order.append(node)
                stack.pop()
    return order[::-1]


def reached_by(starts: Sequence[Node], tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor, the set of losses that reach it: a bit mask. At a tensor that is no leaf, the walk ends.

    Each node is visited once, after all nodes that lead to it, and hands its mask on.
    """
    masks: dict[Node, int] = {}
    for i, start in enumerate(starts):
        masks[start] = masks.get(start, 0) | (1 << i)
    leaves: dict[int, int] = {}
    ends = {place_of(tensor): 0 for tensor in tensors if not tensor.is_leaf}
    for node in topological(masks, ends):
        mask = masks[node]
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = leaves.get(id(variable), 0) | mask
        for after in following(node, ends):
            masks[after] = masks.get(after, 0) | mask
        for edge in node.next_functions if ends else ():
            if edge in ends:
                ends[edge] |= mask
    return [leaves.get(id(tensor), 0) if tensor.is_leaf else ends[place_of(tensor)] for tensor in tensors]
