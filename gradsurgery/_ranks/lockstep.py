"""Work on rows during a backward pass, in the same order on all ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from .wire import Lost


class Lockstep:
    """Does one part of the parameters after the other, in the order that is the same on all ranks.

    When a part starts out, the one before does its next stage, and the one before that its last. Where one fails, which is
    likely to be on all ranks, the others go on: no rank is to wait for what another one leaves out.

    Args:
        stages: what is done with a part: it pauses where something is under way.
        parts: the parameters of each part.
        awaited: those that this rank's backward pass will reach.
    """

    def __init__(
        self,
        stages: Callable[[Sequence[int]], Iterator[None]],
        parts: Sequence[Sequence[int]],
        awaited: Iterable[int] = (),
    ) -> None:
        self._stages = stages
        self._part_of = {p: i for i, part in enumerate(parts) for p in part}
        self._awaited: list[set[int]] = [set() for _ in parts]
        for p in awaited:
            if p in self._part_of:
                self._awaited[self._part_of[p]].add(p)
        self._parts = deque(enumerate(parts))
        self._under_way: list[Iterator[None]] = []
        self._failed: Exception | None = None

    def complete(self, p: int) -> None:
        """All of this rank's gradients of parameter ``p`` are there."""
        if p in self._part_of:
            self._awaited[self._part_of[p]].discard(p)
        while self._parts and not self._awaited[self._parts[0][0]]:
            self._start()

    def finish(self) -> None:
        """Starts what is left, and waits for all.

        Raises:
            Exception: what went wrong first, in any part.
        """
        while self._parts:
            self._start()
        while self._under_way:
            self._move()
        if self._failed is not None:
            raise self._failed

    def _start(self) -> None:
        self._move()
        self._under_way.append(self._stages(self._parts.popleft()[1]))
        self._advance(self._under_way[-1])

    def _move(self) -> None:
        for stages in list(self._under_way):
            self._advance(stages)

    def _advance(self, stages: Iterator[None]) -> None:
        try:
            over = next(stages, self) is self
        except Lost:
            raise
        except Exception as error:
            self._failed, over = self._failed or error, True
        if over:
            self._under_way.remove(stages)
