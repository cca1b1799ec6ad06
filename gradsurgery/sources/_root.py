"""What a source starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .._buffer import Rows


@dataclass(frozen=True, eq=False)
class Root:
    """One loss: where its backward pass starts.

    Attributes:
        task: index of the task.
        name: name of the task, for messages.
        output: the loss, or the edge of the graph that carries its gradient.
        gradient: what flows into it: the product of the loss's weight and scale, of the loss's shape and dtype.
    """

    task: int
    name: str
    output: Any  # Tensor | GradientEdge; torch.autograd.grad's annotations do not allow for both in one list
    gradient: Tensor


class Source(Protocol):
    """Turns losses into rows: adds ``dL_k/dp`` to ``rows[p]`` for each root and each parameter that it reaches.

    A parameter may be a tensor that is no leaf. What it was computed from is then none of the parameters.
    """

    def __call__(
        self, roots: Sequence[Root], parameters: Sequence[Tensor], rows: Sequence[Rows], *, retain_graph: bool
    ) -> None:
        """Adds to the rows.

        Raises:
            ValueError: if a loss reaches none of the parameters.
        """
        ...


def unreached(root: Root) -> ValueError:
    """The error for a loss that reaches no parameter."""
    return ValueError(
        f"The loss of task {root.name!r} reaches none of the optimizer's trainable parameters. Was it computed by another "
        "model, or are all parameters that it depends on frozen?"
    )
