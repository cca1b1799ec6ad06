"""Memory for rows that come and go within a step.

On the CPU, fresh memory costs the system more time than a gradient costs arithmetic. Where rows are freed during the
backward pass, the next ones take their place. Between steps all but a part of the memory belongs to the system.
"""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: a line of the cache
_PAGE = 64  # lines: addresses that are this far apart share a place in the cache
_APART = 17  # lines: odd, so that as many rows as there are places have one each
_PART = 5 / 8  # a step needs all of it only when activations have been freed that the next one starts with


def block_strides(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[int, ...]:
    """How a block of rows ``[k, ...]`` lies in memory: each row contiguous, and the rows not at alike addresses.

    Products read all rows at once. On the CPU, rows whose distance is a multiple of 4 KB, as it often is, would drive each
    other out of the cache, which makes the Gram matrix of 32 rows 1.7 times slower.
    """
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    line = _ALIGNMENT // dtype.itemsize
    if device.type == "cpu" and strides[0] > _PAGE * line:
        lines = -(-strides[0] // line)
        strides[0] = (lines + (_APART - lines) % _PAGE) * line
    return tuple(strides)


def new_block(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A block of rows ``[k, ...]`` with arbitrary content."""
    return torch.empty_strided(shape, block_strides(shape, dtype, device), dtype=dtype, device=device)


def is_block(tensor: Tensor) -> bool:
    """Whether the rows of ``[k, ...]`` are contiguous and apart."""
    return tensor[:1].is_contiguous() and (len(tensor) < 2 or tensor.stride(0) >= tensor[0].numel())


class Arena:
    """Blocks that share a piece of memory, as large as was needed at one time so far.

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
        """As :func:`new_block`."""
        if device.type != "cpu":
            return new_block(shape, dtype, device)
        if not self._taken and self._wanted and (self._memory is None or self._memory.size < self._wanted):
            self._memory = _Memory(self._wanted)
            self._free = [(0, self._memory.size)]
        strides = block_strides(shape, dtype, device)
        extent = shape[0] * strides[0] * dtype.itemsize if prod(shape) else 0
        size = -(-max(extent, 1) // _ALIGNMENT) * _ALIGNMENT
        place = self._place(size)
        if place is None or self._memory is None:
            tensor, place = new_block(shape, dtype, device), -1
            self._wanted = max(self._wanted, 0 if self._memory is None else self._memory.size + size)
        else:
            tensor = self._memory.bytes[place : place + extent].view(dtype).as_strided(shape, strides)
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
