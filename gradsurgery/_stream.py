"""Surgery inside the backward pass: on each surgery group as soon as its gradients are complete."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ._combination import Combination
from ._gradients import TaskGradients

# Groups are combined together until their rows are this part of all: a call of the rule costs the same for any number.
_PART = 1 / 16


class Streaming(NamedTuple):
    """Whether surgery happens inside the backward pass, and if not, why.

    Attributes:
        on: whether it does.
        why: the reason if it does not.
    """

    on: bool
    why: str = ""

    def __bool__(self) -> bool:
        return self.on


class Stream:
    """Combines surgery groups as they become complete.

    Args:
        gradients: the rows.
        combination: what combines them.
        awaited: the parameters that this backward pass will reach.
    """

    def __init__(self, gradients: TaskGradients, combination: Combination, awaited: Iterable[int]) -> None:
        self._gradients = gradients
        self._combination = combination
        self._members: dict[int, list[int]] = {}
        for p, group in enumerate(gradients.group_of):
            self._members.setdefault(group, []).append(p)
        self._awaited: dict[int, set[int]] = {group: set() for group in self._members}
        total = 0
        for p in awaited:
            self._awaited[gradients.group_of[p]].add(p)
            total += gradients.parameters[p].numel()
        self._enough = total * _PART
        self._ready: list[int] = []

    def complete(self, p: int) -> None:
        """All gradients of parameter ``p`` are there."""
        if self._combination.measured:
            self._gradients.rows[p].warm()
        group = self._gradients.group_of[p]
        self._awaited[group].discard(p)
        if not self._awaited[group]:
            self._ready += self._members.pop(group)
            if sum(self._gradients.parameters[q].numel() for q in self._ready) >= self._enough:
                self._flush()

    def finish(self) -> None:
        """Combines what is left."""
        for members in self._members.values():
            self._ready += members
        self._members.clear()
        self._flush()

    def _flush(self) -> None:
        ready, self._ready = self._ready, []
        if ready:
            self._combination.add(ready)


class Lockstep:
    """The same on several ranks: on one part of the parameters after the other, in the order that is the same on all.

    When a part sets out to the other ranks, surgery happens on the one before, and the one before that is back.

    Args:
        combination: what combines them.
        parts: the parameters of each part.
        awaited: those that this rank's backward pass will reach.
    """

    def __init__(self, combination: Combination, parts: Sequence[Sequence[int]], awaited: Iterable[int] = ()) -> None:
        self._combination = combination
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
            self._send()

    def finish(self) -> None:
        """Sends what is left, and waits for all."""
        while self._parts:
            self._send()
        while self._under_way:
            self._move()

    def _send(self) -> None:
        self._move()
        stages = self._combination.stages(self._parts.popleft()[1])
        self._under_way.append(stages)
        next(stages)

    def _move(self) -> None:
        for stages in list(self._under_way):
            if next(stages, self) is self:
                self._under_way.remove(stages)
