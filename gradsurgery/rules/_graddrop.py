"""GradDrop: gradient sign dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._coordinates import CoordinateRule, added
from ._weights import check_names


@dataclass(frozen=True)
class GradDrop(CoordinateRule):
    r"""Picks one sign in each coordinate, at random, and drops the gradients of the other sign.

    ``P = (1 + sum_i g_i / sum_i |g_i|) / 2`` is the *positive sign purity* of a coordinate, and ``u`` is uniform in [0, 1).
    The mask ``m_i`` of a task is 1 if ``P > u`` and ``g_i > 0``, or ``P < u`` and ``g_i < 0``, and 0 otherwise:

    ``g = sum_i (l_i + (1 - l_i) m_i) g_i``.

    Where all signs are equal, nothing is dropped.

    Args:
        leak: ``l``, how much of a gradient passes whatever its sign, in [0, 1]: one number for all tasks, or task →
            number, 0 for tasks that are not named.

    Raises:
        ValueError: for a leak outside of [0, 1]; and, when the tasks are known, for names that are none of them.

    Example:
        >>> import torch, gradsurgery as gs
        >>> jacobian = torch.tensor([[1.0, 2.0, -3.0], [1.0, -2.0, -1.0]])
        >>> _ = torch.manual_seed(0)
        >>> gs.operate(jacobian, gs.GradDrop())
        tensor([ 2.,  -2., -4.])

    Reference:
        Chen, Ngiam, Huang, Luong, Kretzschmar, Chai and Anguelov, *Just Pick a Sign: Optimizing Deep Multitask Models with
        Gradient Sign Dropout*, NeurIPS 2020, Algorithm 1 (arXiv:2010.06808).

    Note:
        The paper applies it to gradients at the shared layers' output, as ``opt.backward(losses, features=z)`` does; plain
        :meth:`SurgeryOptimizer.backward` applies it to those of the parameters, as TorchJD does. At the output, the paper
        finds the purity of gradients that it multiplied by the signs of the activations and summed over the batch; we take
        them as they are. Its monotone function of ``P`` is the identity. Where all gradients are zero, so is the result.
        Where ``P = u``, which rounding makes possible, the negative sign is picked.
    """

    random: ClassVar[bool] = True
    scale_equivariant: ClassVar[bool] = True

    leak: float | Mapping[str, float] | tuple[tuple[str, float], ...] = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.leak, (Mapping, tuple)):
            pairs = self.leak.items() if isinstance(self.leak, Mapping) else self.leak
            object.__setattr__(self, "leak", tuple((str(name), float(value)) for name, value in pairs))
        values = [value for _, value in self.leak] if isinstance(self.leak, tuple) else [self.leak]
        if not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in values):
            raise ValueError(f"`leak` must be in [0, 1]. Found leak={self.leak!r}.")

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return not isinstance(self.leak, tuple)

    def check(self, tasks: Sequence[str]) -> None:
        if isinstance(self.leak, tuple):
            check_names("leak", [name for name, _ in self.leak], tasks, self)

    def combine(self, rows: Tensor, *, tasks: Sequence[str], noise: Tensor | None) -> Tensor:
        assert noise is not None
        above, below = rows.clamp(min=0), rows.clamp(max=0)
        positive, negative = added(above), added(below)
        # P > u, as P = positive / (positive - negative), without dividing. Rounding must not drop what is of one sign.
        up = (positive > noise * (positive - negative)) | (negative == 0)
        leaks: dict[str, float] = dict.fromkeys(tasks, 0.0)
        leaks.update(self.leak if isinstance(self.leak, (Mapping, tuple)) else dict.fromkeys(tasks, self.leak))
        if not any(leaks.values()):
            return torch.where(up, positive, negative)
        # What is not picked leaks, each task's gradient by itself.
        leaked = [added([leaks[task] * row for task, row in zip(tasks, part, strict=True)]) for part in (below, above)]
        return torch.where(up, positive + leaked[0], negative + leaked[1])
