"""One vector-Jacobian product per loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._buffer import Rows
from ._root import Root, unreached


@dataclass(frozen=True)
class Autograd:
    """One backward pass per loss. Works on every model."""

    def __call__(
        self, roots: Sequence[Root], parameters: Sequence[Tensor], rows: Sequence[Rows], *, retain_graph: bool
    ) -> None:
        retain = [True] * (len(roots) - 1) + [retain_graph]
        for root, keep in zip(roots, retain, strict=True):
            gradients = list(_grad(root, parameters, keep, shared=len(roots) > 1 and not retain_graph))
            if all(gradient is None for gradient in gradients):
                raise unreached(root)
            for row in reversed(rows):
                gradient = gradients.pop()  # so that it is freed as soon as it has been copied to its place
                if gradient is not None:
                    row.add(root.task, gradient)


def _grad(root: Root, parameters: Sequence[Tensor], retain_graph: bool, shared: bool) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad([root.output], parameters, [root.gradient], retain_graph=retain_graph, allow_unused=True)
    except RuntimeError as error:
        # Compiled models recycle their buffers in the backward pass unless told not to, and then refuse to keep the
        # graph. That only matters if losses share it, which is tried out: nothing has been computed or freed yet.
        if "donated" in str(error) and retain_graph and shared:
            return _grad(root, parameters, False, shared)
        if "second time" in str(error) and shared:
            raise RuntimeError(
                f"The loss of task {root.name!r} shares a compiled forward pass with another loss, and torch.compile let "
                "that pass give its buffers away. Set torch._functorch.config.donated_buffer = False before the model "
                "is first called, or call it once per task."
            ) from error
        raise
