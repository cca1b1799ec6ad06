"""Sources by name."""

from __future__ import annotations

from ._autograd import Autograd
from ._batched import Batched
from ._root import Source


def source_named(name: str, chunk_size: int | None) -> Source:
    """The source that the arguments ``source`` and ``chunk_size`` of :class:`SurgeryOptimizer` describe."""
    if name == "batched":
        return Batched(chunk_size)
    if name != "autograd":
        raise ValueError(f"`source` must be 'autograd' or 'batched'. Found {name!r}.")
    if chunk_size is not None:
        raise ValueError(f"`chunk_size` belongs to source='batched'. Found chunk_size={chunk_size!r} without it.")
    return Autograd()
