"""Memory for rows that come and go within a step.

On the CPU, fresh memory costs the system more time than a gradient costs arithmetic. Where rows are freed during the
backward pass, the next ones take their place. Between steps all but a part of the memory belongs to the system.
"""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

_ALIGNMENT = 64
_PART = 5 / 8  # a step needs all of it only when activations have been freed that the next one starts with


class Arena:
    """Tensors that share a piece of memory, as large as was needed at one time so far.

    On other devices than the CPU, PyTorch does as much by itself.

    Args:
        keep: how many bytes stay between steps, or else a part of what was needed at one time, whichever is more.
    """

    def __init__(self, keep: int = 0) -> None:
        self._keep = keep
        self._memory: _Memory | None = None
        self._free: list[tuple[int, int]] = []  # intervals, in order
        self._taken: dict[int, tuple[int, int]] = {}  # by address: an interval, or (-1, size) of what did not fit
        self._wanted = 0
        self._live = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with arbitrary content."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        if not self._taken and self._wanted and (self._memory is None or self._memory.size < self._wanted):
            self._memory = _Memory(self._wanted)
            self._free = [(0, self._memory.size)]
        size = -(-max(prod(shape) * dtype.itemsize, 1) // _ALIGNMENT) * _ALIGNMENT
        place = self._place(size)
        if place is None or self._memory is None:
            tensor, place = torch.empty(shape, dtype=dtype), -1
            self._wanted = max(self._wanted, 0 if self._memory is None else self._memory.size + size)
        else:
            tensor = self._memory.bytes[place : place + prod(shape) * dtype.itemsize].view(dtype).view(shape)
        self._taken[tensor.data_ptr()] = place, size
        self._live += size
        self._wanted = max(self._wanted, self._live)
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
        """Takes everything back, and lets the system have the pages that are not kept."""
        self._taken.clear()
        self._live = 0
        if self._memory is not None:
            self._free = [(0, self._memory.size)]
            if not self._memory.release(max(self._keep, int(_PART * self._wanted))):
                self._memory, self._free = None, []

    def _place(self, size: int) -> int | None:
        for i, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[i : i + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None


class _Memory:
    """At least ``size`` bytes, as a tensor."""

    def __init__(self, size: int) -> None:
        self._map: mmap.mmap | None = None
        if hasattr(mmap, "MADV_DONTNEED"):  # on Linux, among others
            size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        else:
            self.bytes = torch.empty(size, dtype=torch.uint8)
        self.size = size

    def release(self, keep: int) -> bool:
        """Gives pages back to the system, all but the first ``keep`` bytes; False if that would take a new memory."""
        if self._map is None:
            return self.size <= keep
        start = -(-keep // mmap.PAGESIZE) * mmap.PAGESIZE
        if start < self.size:
            self._map.madvise(mmap.MADV_DONTNEED, start, self.size - start)
        return True
