"""The collectives, small ones between hosts and large ones between devices."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 has new names for both.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Lost(RuntimeError):
    """Another rank does not answer."""


class Wire:
    """The collectives of a process group.

    Small messages between hosts go through a group that needs no device: reading them does not wait for gradients that are
    being computed.

    Args:
        group: the process group.

    Raises:
        RuntimeError: (by all methods) if another rank is lost, or does not answer within the group's timeout.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.names = dist.get_process_group_ranks(group)  # as the user knows them
        backends: Any = dist.get_backend_config(group)
        self._hosts = group
        if "cpu:" not in str(backends):
            self._hosts = self._another_group("gloo")

    def beside(self) -> Wire:
        """The collectives of a group of its own, of the same processes, that do not wait for this one's."""
        result = copy.copy(self)
        result.group = self._another_group()
        return result

    def _another_group(self, backend: str | None = None) -> dist.ProcessGroup:
        settings: dict[str, Any] = {"timeout": _timeout(self.group), "backend": backend, "use_local_synchronization": True}
        if self.names != sorted(self.names):  # which only PyTorch 2.13 and later have
            settings["sort_ranks"] = False
        with _explained("making a process group"):
            group: dist.ProcessGroup = dist.new_group(self.names, **settings)
        return group

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Each rank's integers; all ranks have as many."""
        result = torch.empty(self.size * len(numbers), dtype=torch.int64)
        with _explained("comparing notes with the others"):
            _all_gather(result, torch.tensor(numbers, dtype=torch.int64), group=self._hosts)
        table: list[list[int]] = result.view(self.size, -1).tolist()
        return table

    def gather_objects(self, thing: Any) -> list[Any]:
        """Each rank's object."""
        result = [None] * self.size
        with _explained("comparing notes with the others"):
            dist.all_gather_object(result, thing, group=self._hosts)
        return result

    def host_sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the ranks."""
        result = torch.tensor(numbers, dtype=torch.float64)
        with _explained("counting samples"):
            dist.all_reduce(result, group=self._hosts)
        numbers = result.tolist()
        return list(numbers)

    def host_max(self, numbers: Tensor) -> Tensor:
        """The largest over the ranks, of integers on the CPU. In place."""
        with _explained("comparing notes with the others"):
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._hosts)
        return numbers

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        with _explained("adding up inner products"):
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def start_reduce_scatter(self, shard: Tensor, parts: Tensor) -> Waiting:
        """Sums ``parts``, one for each rank, over the ranks; this rank's becomes ``shard``."""
        with _explained("adding up gradients"):
            return Waiting(_reduce_scatter(shard.view(-1), parts.view(-1), group=self.group, async_op=True), parts)

    def start_all_gather(self, whole: Tensor, shard: Tensor) -> Waiting:
        """Puts all ranks' shards one after the other."""
        with _explained("gathering gradients"):
            return Waiting(_all_gather(whole, shard, group=self.group, async_op=True), shard)

    def start_sum(self, tensor: Tensor) -> Waiting:
        """The sum over the ranks, in place."""
        with _explained("adding up gradients"):
            return Waiting(dist.all_reduce(tensor, group=self.group, async_op=True), tensor)


def _timeout(group: Any) -> timedelta | None:
    """How long the group waits, which a new one would not know by itself; None if it does not say."""
    backends = [group._get_backend(device) for device in group._device_types]
    found = (getattr(getattr(backend, "options", None), "_timeout", None) for backend in backends)
    return next((timeout for timeout in found if timeout is not None), None)


class Waiting:
    """A collective that is under way, and what it reads."""

    def __init__(self, work: Any, source: Tensor) -> None:
        self._work = work
        self._source: Tensor | None = source

    def is_done(self) -> bool:
        """Whether the result is there."""
        return bool(self._work.is_completed())

    def wait(self) -> None:
        """Returns when the result is there (on a GPU: when it will be, for what is launched next)."""
        with _explained("exchanging gradients"):
            self._work.wait()
        self._source = None


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # among them, torch.distributed's own
        raise Lost(
            f"Rank {dist.get_rank()} lost another rank, or waited in vain for it, while {doing}. Every rank has to call "
            "combine() or step() in each step. If a rank has died, start all of them again from the last checkpoint. "
            f"PyTorch says: {error}"
        ) from error
