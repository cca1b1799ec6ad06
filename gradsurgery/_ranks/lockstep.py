"""Work on rows during a backward pass, in the same order on all ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence


class Lockstep:
    """Does one part of the parameters after the other, in the order that is the same on all ranks.

    When a part starts out, the one before does its next stage, and the one before that its last.

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
        self._under_way: deque[Iterator[None]] = deque()

    def complete(self, p: int) -> None:
        """All of this rank's gradients of parameter ``p`` are there."""
        if p in self._part_of:
            self._awaited[self._part_of[p]].discard(p)
        while self._parts and not self._awaited[self._parts[0][0]]:
            self._start()

    def finish(self) -> None:
        """Starts what is left, and waits for all."""
        while self._parts:
            self._start()
        while self._under_way:
            self._move()

    def _start(self) -> None:
        self._move()
        stages = self._stages(self._parts.popleft()[1])
        self._under_way.append(stages)
        next(stages)

    def _move(self) -> None:
        for stages in list(self._under_way):
            if next(stages, self) is self:
                self._under_way.remove(stages)
