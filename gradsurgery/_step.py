"""What one combination saw and did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """The record of one combination, at no extra pass over the gradients: ``optimizer.last``, and what ``observe`` sees.

    A *cell* is a surgery group, or the part of one that a certain set of tasks reached; there are ``C`` of them. The
    tensors are on the device of the gradients, and reading them is what waits for it.

    Attributes:
        tasks: names of the ``K`` tasks.
        groups: names of the ``C`` cells. The widest cell of a group has the group's name; a narrower one names its tasks,
            ``"decoder [de, fr]"``.
        active: ``[C, K]``, which tasks reached the cell.
        gram: ``[C, K, K]``, inner products of the gradients of the tasks' weighted losses; zero for tasks that are not
            active.
        mixing: ``[C, K, K]``, the rule's answer: ``g'_i = sum_j mixing[c, i, j] g_j``.
        losses: ``[K]``, detached, summed over accumulated passes; nan for an absent task.
        loss_weights: ``[K]``, what the rule weighed the losses with; None if it weighs none.
    """

    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    active: Tensor
    gram: Tensor
    mixing: Tensor
    losses: Tensor
    loss_weights: Tensor | None = None

    @property
    def norms(self) -> Tensor:
        """``[C, K]``, norms of the tasks' gradients; nan where the task is absent."""
        return self.gram.diagonal(dim1=-2, dim2=-1).sqrt().masked_fill(~self.active, torch.nan)

    @property
    def pairs(self) -> Tensor:
        """``[C, K, K]``, which ordered pairs of different tasks are there."""
        pairs = self.active[:, :, None] & self.active[:, None, :]
        return pairs & ~torch.eye(len(self.tasks), dtype=torch.bool, device=pairs.device)

    @property
    def cosines(self) -> Tensor:
        """``[C, K, K]``, cosine similarities; nan on the diagonal, for absent tasks and for zero gradients."""
        norms = self.norms
        cosines = (self.gram / norms[:, :, None] / norms[:, None, :]).clamp(-1, 1)
        return torch.where(self.pairs, cosines, torch.nan)

    @property
    def conflicts(self) -> Tensor:
        """``[C, K, K]``, the pairs whose cosine is negative."""
        return self.pairs & (self.gram < 0)

    @property
    def operated(self) -> Tensor:
        """``[C, K, K]``, the pairs ``(i, j)`` for which the rule changed ``i``'s gradient by a part of ``j``'s."""
        return self.pairs & (self.mixing != 0)

    @property
    def weights(self) -> Tensor:
        """``[C, K]``, how much of each task's gradient is in the combined one: the column sums of the mixing matrix.

        The gradient of the weighted loss, that is, where the rule weighs losses."""
        return (self.mixing * self.active[:, :, None]).sum(-2).masked_fill(~self.active, torch.nan)

    def named_pairs(self, mask: Tensor) -> list[tuple[str, str, str]]:
        """``[C, K, K]`` mask → the names ``(group, task i, task j)`` where it is true. Waits for the device.

        Example:
            ``optimizer.last.named_pairs(optimizer.last.conflicts)``
        """
        return [(self.groups[c], self.tasks[i], self.tasks[j]) for c, i, j in mask.nonzero().tolist()]

    def __repr__(self) -> str:
        pairs = int(self.pairs.sum())
        share = (f"{int(mask.sum())} of {pairs} pairs" for mask in (self.conflicts, self.operated))
        return f"Step({len(self.tasks)} tasks, {len(self.groups)} groups: " + "{} in conflict, {} operated on)".format(
            *share
        )
