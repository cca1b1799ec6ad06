"""Memory for rows that come and go within a step.

Fresh memory costs the system more time than a gradient costs arithmetic. Where rows are freed during the backward pass, the
next ones take their place.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

_ALIGNMENT = 64


class Arena:
    """Tensors that share a piece of memory, as large as was needed at one time so far."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._free: list[tuple[int, int]] = []  # intervals, in order
        self._taken: dict[int, tuple[int, int]] = {}  # by address: an interval, or (-1, size) of what did not fit
        self._wanted = 0
        self._live = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with arbitrary content."""
        size = -(-max(prod(shape) * dtype.itemsize, 1) // _ALIGNMENT) * _ALIGNMENT
        if not self._taken and (self._memory is None or len(self._memory) < self._wanted or self._memory.device != device):
            self._memory = None  # first, so that there are never two
            self._memory = torch.empty(self._wanted, dtype=torch.uint8, device=device) if self._wanted else None
            self._free = [(0, self._wanted)] if self._wanted else []
        place = self._place(size) if self._memory is not None and self._memory.device == device else None
        if place is None or self._memory is None:
            tensor = torch.empty(shape, dtype=dtype, device=device)
            place = -1
        else:
            tensor = self._memory[place : place + prod(shape) * dtype.itemsize].view(dtype).view(shape)
        self._taken[tensor.data_ptr()] = place, size
        self._live += size
        fits = place >= 0 or self._memory is None
        self._wanted = max(self._wanted, self._live, 0 if fits or self._memory is None else len(self._memory) + size)
        return tensor

    def give(self, tensor: Tensor) -> None:
        """Takes back what :meth:`take` returned, or a view of all of it; ignores others."""
        place, size = self._taken.pop(tensor.data_ptr(), (-1, 0))
        self._live -= size
        if place < 0:
            return
        intervals = sorted([*self._free, (place, place + size)])
        self._free = [intervals[0]]
        for start, end in intervals[1:]:
            if start == self._free[-1][1]:
                self._free[-1] = self._free[-1][0], end
            else:
                self._free.append((start, end))

    def reset(self) -> None:
        """Takes everything back."""
        self._taken.clear()
        self._live = 0
        self._free = [(0, len(self._memory))] if self._memory is not None else []

    def _place(self, size: int) -> int | None:
        for i, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[i : i + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None
