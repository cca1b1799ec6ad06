"""A node of an autograd graph, and whose the gradients of its outputs are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch.autograd.graph import Node

from .labels import Labels, Shape


@dataclass(frozen=True, eq=False)
class Passage:
    """A node, and the labels that its outputs' gradients have.

    Attributes:
        node: of the graph.
        name: of its kind, without the number of the variant.
        labels: for each output, its labels, or None if no gradient arrives there.
        outer: for each output, its shape.
        inner: for each input, its shape, or None if it has no gradient.
    """

    node: Node
    name: str
    labels: Sequence[Labels | None]
    outer: Sequence[Shape]
    inner: Sequence[Shape | None]

    @property
    def first(self) -> Labels:
        """Labels of the only output, or of the first that has any."""
        return next(labels for labels in self.labels if labels is not None)

    @property
    def single(self) -> bool:
        """Whether a gradient arrives at the first output, and at no other."""
        return self.labels[0] is not None and all(labels is None for labels in self.labels[1:])

    def saved(self, name: str) -> Any:
        """An attribute that the node keeps."""
        return getattr(self.node, f"_saved_{name}")

    def dims(self, name: str, ndim: int) -> list[int]:
        """Saved dimensions, as numbers from 0; all of them if none were given."""
        found = self.saved(name)
        chosen = range(ndim) if found is None or found == () else found if isinstance(found, tuple) else (found,)
        return [signed(dim) % ndim if ndim else 0 for dim in chosen]


def kind(node: Node) -> str:
    """The kind of a node, such as ``"Addmm"``."""
    return _kind(node.name())


@cache
def _kind(name: str) -> str:
    return re.sub(r"Backward\d*$", "", name)


def signed(number: int) -> int:
    """Negative numbers, which nodes keep as unsigned ones."""
    return number - (1 << 64) if number >= 1 << 63 else number
