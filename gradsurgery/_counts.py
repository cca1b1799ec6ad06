"""How many samples a task's loss is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Counts(NamedTuple):
    """What a rank's losses weigh among those of all ranks.

    Attributes:
        of: ``[K]``, samples of each task; zero where it is absent.
        kind: where the numbers are from: ``"given"``; ``"alike"``, one for each task that is there; ``"mixed"``, counted in
            a mixed batch; or ``"sum"``, for losses that are summed, where they make no difference.
    """

    of: tuple[float, ...]
    kind: str


def read_samples(samples: Mapping[str, float] | None, present: Sequence[str], tasks: Sequence[str]) -> Counts:
    """The argument ``samples`` of :meth:`SurgeryOptimizer.backward`, checked.

    Raises:
        ValueError: if a task that is there has no number, or one that is not positive; and for unknown tasks.
        TypeError: if it is no mapping.
    """
    if samples is None:
        return Counts(tuple(float(task in present) for task in tasks), "alike")
    if not isinstance(samples, Mapping):
        raise TypeError(f"`samples` must be a mapping from tasks to numbers. Found {type(samples).__name__}.")
    if unknown := [task for task in samples if task not in tasks]:
        raise ValueError(f"`samples` names {', '.join(map(repr, unknown))}, but the tasks are {list(tasks)}.")
    for task in present:
        if task not in samples:
            raise ValueError(f"`samples` has no number for task {task!r}, whose loss is there. Found {list(samples)}.")
        number = samples[task]
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < float("inf"):
            raise ValueError(f"`samples[{task!r}]` must be a positive number. Found {number!r}.")
    return Counts(tuple(float(samples[task]) if task in present else 0.0 for task in tasks), "given")
