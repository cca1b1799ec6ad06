"""Rows of all ranks, added up, and what is made of them: there and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .._buffer import Rows
from .._gradients import TaskGradients
from .buckets import Bucket, flat
from .wire import Waiting, Wire


class Round:
    """The rows of some parameters on their way: each rank gets a shard of their sums, and sends back what it makes of it.

    1. :meth:`start` sends this rank's rows, bucket by bucket;
    2. :meth:`rows` waits for the sums;
    3. :meth:`start_back` sends combined gradients, and :meth:`arrive` waits for whole ones.

    Args:
        wire: the collectives.
        gradients: this rank's rows. They are freed.
        buckets: how they travel.
        shares: of this rank in the tasks.
        result: leave rows where they are, and add up what is made of them.
    """

    def __init__(
        self,
        wire: Wire,
        gradients: TaskGradients,
        buckets: Sequence[Bucket],
        shares: Sequence[float],
        *,
        result: bool,
    ) -> None:
        self._wire = wire
        self._own = gradients
        self._buckets = buckets
        self._shares = shares
        self._result = result
        self.reduced = gradients.with_rows([Rows() for _ in gradients.rows])
        self._waiting: list[tuple[Bucket, Tensor, Waiting]] = []
        self._bucket_of = {p: bucket for bucket in buckets for p in bucket.places}
        self._missing = {bucket: set(bucket.places) for bucket in buckets}
        self._parts: dict[int, Tensor] = {}
        self._back: list[tuple[Bucket, Tensor, Waiting | None]] = []

    def start(self, most: int | None = None) -> None:
        """Sends the rows; with no more than ``most`` buckets under way at a time."""
        for bucket in self._buckets:
            if self._result:
                for p in bucket.places:
                    self._scale(p, bucket.tasks[p])
            elif not bucket.width:
                self._deliver(bucket, bucket.shard(), None)
            else:
                shard, parts = bucket.shard(), bucket.pack(self._own.rows, self._shares)
                self._waiting.append((bucket, shard, self._wire.start_reduce_scatter(shard, parts)))
                if most is not None and len(self._waiting) > most:
                    self._deliver(*self._waiting.pop(0))

    def rows(self) -> TaskGradients:
        """The sums: those that this rank multiplies and combines."""
        while self._waiting:
            self._deliver(*self._waiting.pop(0))
        return self.reduced

    def _deliver(self, bucket: Bucket, shard: Tensor, work: Waiting | None) -> None:
        if work is not None:
            work.wait()
        for p, place in bucket.of_rank(self._wire.rank):
            self.reduced.rows[p].add_block(bucket.tasks[p], shard[:, place].contiguous(), owned=True)

    def _scale(self, p: int, tasks: Sequence[int]) -> None:
        """This rank's rows times its shares; zero for tasks that only others have."""
        rows, parameter = self._own.rows[p], self._own.parameters[p]
        for task in tasks:
            row = rows.of.get(task)
            whole = torch.zeros_like(parameter) if row is None else row * self._shares[task]
            self.reduced.rows[p].add(task, flat(whole))
        rows.clear()

    def start_back(self, combined: Iterable[tuple[int, Tensor]]) -> None:
        """Sends combined gradients, a bucket at a time."""
        for p, part in combined:
            self._add_back(p, part)

    def _add_back(self, p: int, part: Tensor) -> None:
        bucket = self._bucket_of[p]
        self._parts[p] = part
        self._missing[bucket].discard(p)
        if self._missing[bucket]:
            return
        whole = torch.cat([flat(self._parts.pop(q)) for q in bucket.places])
        work = None
        if self._result:
            work = self._wire.start_sum(whole)
        elif bucket.width:
            shard = whole.new_zeros(bucket.width)
            shard[: len(whole)] = whole
            whole = whole.new_empty(self._wire.size * bucket.width)
            work = self._wire.start_all_gather(whole, shard)
        self._back.append((bucket, whole, work))

    def arrive(self, most: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Whole combined gradients, by parameter, until no more than ``most`` buckets are under way."""
        while len(self._back) > most:
            bucket, whole, work = self._back.pop(0)
            if work is not None:
                work.wait()
            yield from bucket.whole(whole, self._own.parameters)

    def gather(self, combined: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """Both at a time, with few buckets under way. What did not travel in buckets is as it is."""
        for p, part in combined:
            if p not in self._bucket_of:
                yield p, part
                continue
            self._add_back(p, part)
            yield from self.arrive(1)
        yield from self.arrive()
