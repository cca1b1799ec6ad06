"""All losses' vector-Jacobian products in one vectorised backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._buffer import Rows
from ._graph import node_of, reached_by
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
        reached = reached_by([node_of(root.output) for root in roots], parameters)
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
