"""One backward pass per loss, into ``p.grad``: for models whose gradients come to be there only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._buffer import Rows
from ._root import Root, unreached


@dataclass(frozen=True)
class Backward:
    """One call of ``Tensor.backward`` per loss, whose gradients are taken out of ``p.grad``: for FSDP2.

    FSDP2 puts together each layer's parameters, and adds up gradients, in hooks that other ways around do not call. Losses
    come in the order of their tasks, the same on all ranks.

    Attributes:
        around: what these calls happen in.
    """

    around: Callable[[], AbstractContextManager[None]] = field(repr=False)

    def __call__(
        self, roots: Sequence[Root], parameters: Sequence[Tensor], rows: Sequence[Rows], *, retain_graph: bool
    ) -> None:
        roots = sorted(roots, key=lambda root: root.task)
        with plainly(parameters), self.around():
            for i, root in enumerate(roots):
                for parameter in parameters:
                    parameter.grad = None
                if isinstance(root.output, GradientEdge):
                    raise ValueError(
                        "Parameters that FSDP2 shards need losses by name: pass a mapping from tasks to losses, no tensor."
                    )
                root.output.backward(root.gradient, retain_graph=retain_graph or i + 1 < len(roots))
                found = [parameter.grad for parameter in parameters]
                if all(gradient is None for gradient in found):
                    raise unreached(root)
                for row, gradient in zip(rows, found, strict=True):
                    if gradient is not None:
                        row.add(root.task, gradient)


@contextmanager
def plainly(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Begins without ``p.grad``, and leaves it as it was."""
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
