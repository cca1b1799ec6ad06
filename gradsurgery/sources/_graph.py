"""Walking through autograd graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor
from torch.autograd.graph import Node


def following(node: Node) -> Iterator[Node]:
    """The nodes that a node hands gradients to."""
    return (edge[0] for edge in node.next_functions if edge[0] is not None)


def topological(starts: Iterable[Node]) -> list[Node]:
    """All nodes that can be reached, each after all nodes that lead to it."""
    order: list[Node] = []
    done: set[Node] = set()
    for start in list(starts):
        stack: list[tuple[Node, Iterator[Node]]] = []
        if start not in done:
            done.add(start)
            stack.append((start, following(start)))
        while stack:
            node, rest = stack[-1]
            for after in rest:
                if after not in done:
                    done.add(after)
                    stack.append((after, following(after)))
                    break
            else:
                order.append(node)
                stack.pop()
    return order[::-1]


def reached_by(starts: Sequence[Node], parameters: Sequence[Tensor]) -> list[int]:
    """For each parameter, the set of losses that reach it: a bit mask.

    Each node is visited once, after all nodes that lead to it, and hands its mask on.
    """
    masks: dict[Node, int] = {}
    for i, start in enumerate(starts):
        masks[start] = masks.get(start, 0) | (1 << i)
    leaves: dict[int, int] = {}
    for node in topological(masks):
        mask = masks[node]
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = leaves.get(id(variable), 0) | mask
        for after in following(node):
            masks[after] = masks.get(after, 0) | mask
    return [leaves.get(id(parameter), 0) for parameter in parameters]
