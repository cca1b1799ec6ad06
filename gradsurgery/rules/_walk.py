"""The loop that PCGrad and GradVac share: each task meets the others, one by one, in a random order of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def random_order(gram: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws, for each group and each task ``i``, a uniformly random order of the other tasks.

    Args:
        gram: ``[G, K, K]``, for its shape and device.

    Returns:
        ``[G, K, K - 1]``; entry ``[g, i]`` is a permutation of all tasks but ``i``.
    """
    keys = torch.empty(gram.shape, dtype=torch.int32, device=gram.device).random_(generator=generator)
    keys.diagonal(dim1=-2, dim2=-1).fill_(-1)  # others are not negative: i itself is sorted to the front, and cut off
    # On the CPU, NumPy sorts many short rows several times faster.
    order = torch.from_numpy(keys.numpy().argsort(-1)) if keys.device.type == "cpu" else keys.argsort(-1)
    return order[..., 1:]


def few_groups(active: Tensor | None) -> Tensor | None:
    """The groups in which tasks are active, ``[g]``, where that can be seen at no cost and leaves some out; else None."""
    if active is None or active.device.type != "cpu":
        return None
    there = active.numpy().any(-1)
    return None if there.all() else torch.from_numpy(there.nonzero()[0])


class Walk:
    """All walks of one step, side by side: in meeting ``s``, task ``i`` of group ``g`` meets ``j = order[g, i, s]``.

    There are ``N = G * K`` walks of ``K - 1`` meetings. What is known of ordered pairs ``[G, K, K]`` can be laid out by
    meeting, ``[K-1, N, 1]``, so that one operation serves all tasks of all groups.
    """

    def __init__(self, shape: torch.Size, order: Tensor) -> None:
        groups, tasks, _ = shape
        self._shape = shape
        self._partner = order.reshape(groups * tasks, tasks - 1)
        self._meetings = self._partner.T.contiguous()  # [K-1, N]: the task j that is met
        self._rows = self._meetings  # [K-1, N]: the row of j among all rows of all groups
        if groups > 1:
            first = torch.arange(0, groups * tasks, tasks, device=order.device).repeat_interleave(tasks)
            self._rows = self._meetings + first

    def by_meeting(self, pairs: Tensor) -> Tensor:
        """``[G, K, K]`` → ``[K-1, N, 1]``."""
        return pairs.reshape(-1, self._shape[-1]).gather(1, self._partner).T.contiguous()[..., None]

    def by_pair(self, meetings: Tensor, into: Tensor) -> Tensor:
        """``[K-1, N, 1]`` → ``[G, K, K]``: a copy of ``into`` with these entries off the diagonal."""
        flat = into.reshape(-1, self._shape[-1])
        return flat.scatter(1, self._partner, meetings.squeeze(-1).T).reshape(self._shape)

    def run(self, start: Tensor, change: Tensor, coefficient: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Runs all walks. Each keeps the inner products of ``g'_i`` with all tasks, and in each meeting adds to ``g'_i``.

        Args:
            start: ``[G, K, K]``, the inner products at the start.
            change: ``[G, K, K]``, whose row ``j`` is what one more ``g_j`` in ``g'_i`` adds to its inner products.
            coefficient: ``(s, products [N, 1] of g'_i with the g_j that it meets) -> how much of g_j to add [N, 1]``.

        Returns:
            ``[K-1, N, 1]``, what ``coefficient`` returned.
        """
        tasks = self._shape[-1]
        products, changes = start.reshape(-1, tasks).clone(), change.reshape(-1, tasks)
        added: list[Tensor] = []
        meetings = zip(self._meetings.unsqueeze(-1).unbind(), self._rows.unbind(), strict=True)
        last = len(self._rows) - 1
        met = torch.empty_like(products)  # allocated once: at this size, fresh memory costs more than the arithmetic
        for s, (column, row) in enumerate(meetings):
            amount = coefficient(s, products.gather(1, column))
            added.append(amount)
            if s < last:
                products.addcmul_(amount, torch.index_select(changes, 0, row, out=met))
        return torch.stack(added) if added else products.new_zeros(0, len(products), 1)
