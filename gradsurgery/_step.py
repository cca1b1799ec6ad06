"""What one combination saw and did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
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
        group_of: ``[C]``, the index of each cell's surgery group; None if cells and groups are the same.
    """

    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    active: Tensor
    gram: Tensor
    mixing: Tensor
    losses: Tensor
    loss_weights: Tensor | None = None
    group_of: Tensor | None = None

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

    def figures(self) -> dict[str, float]:
        """What to log: the loss of each task; and for each cell the mean cosine, the share of pairs in conflict, and
        the share operated on; without what is not there. Waits for the device.

        Example:
            >>> import torch, gradsurgery as gs
            >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
            >>> opt = gs.SurgeryOptimizer(torch.optim.SGD([x], lr=0.1), gs.PCGrad())
            >>> opt.backward({"a": x.sum(), "b": -x[0]})
            >>> opt.step()
            >>> for name, value in opt.last.figures().items():
            ...     print(f"{name} {value:.2f}")
            surgery/loss/a 3.00
            surgery/loss/b -1.00
            surgery/cosine/model -0.71
            surgery/conflict/model 1.00
            surgery/operated/model 1.00
        """
        host = (tensor.float().cpu().numpy() for tensor in (self.losses, self.cosines, self.operated))
        return figures(self.tasks, self.groups, *host)

    def __repr__(self) -> str:
        pairs = int(self.pairs.sum())
        share = (f"{int(mask.sum())} of {pairs} pairs" for mask in (self.conflicts, self.operated))
        return f"Step({len(self.tasks)} tasks, {len(self.groups)} groups: " + "{} in conflict, {} operated on)".format(
            *share
        )


def figures(
    tasks: Sequence[str],
    groups: Sequence[str],
    losses: npt.NDArray[np.float32],
    cosines: npt.NDArray[np.float32],
    operated: npt.NDArray[np.generic],
) -> dict[str, float]:
    """As :meth:`Step.figures`, of ``[K]`` losses, ``[C, K, K]`` cosines and ``[C, K, K]`` operated pairs."""
    result = {f"surgery/loss/{task}": float(loss) for task, loss in zip(tasks, losses, strict=True) if not np.isnan(loss)}
    for c, name in enumerate(groups):
        if pairs := int(np.isfinite(cosines[c]).sum()):
            result[f"surgery/cosine/{name}"] = float(np.nanmean(cosines[c]))
            result[f"surgery/conflict/{name}"] = float((cosines[c] < 0).sum() / pairs)
            result[f"surgery/operated/{name}"] = float(operated[c].sum() / pairs)
    return result
