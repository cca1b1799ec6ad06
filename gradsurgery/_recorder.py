"""A recording of what happened between the tasks while a model trained."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ._groups import some
from ._optimizer import SurgeryOptimizer
from ._step import Step, figures

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

_TOGETHER = 32  # steps that are fetched from the device at a time


class ScalarWriter(Protocol):
    """What a writer has to have; ``torch.utils.tensorboard.SummaryWriter`` does."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None) -> Any:
        """Writes one number."""
        ...


class Recorder:
    """Records the cosines and operations of every optimizer step, at no extra pass over the gradients.

    Once made, it listens to the optimizer. It fetches results from the device some steps at a time, so that no step waits.

    Args:
        optimizer: what to listen to; None for a recording that is loaded, or filled by :meth:`record`.
        every: record each so many steps.
        writer: gets the :meth:`Step.figures` of every recorded step.
        start: number of the first step, for a run that is resumed.

    Raises:
        ValueError: if ``every`` is not positive.

    Example:
        >>> import torch, gradsurgery as gs
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.PCGrad(), model=model)
        >>> recorder = gs.Recorder(opt)
        >>> for _ in range(3):
        ...     prediction = model(torch.ones(1, 2)).sum()
        ...     opt.backward({"up": -prediction, "down": 2 * prediction})
        ...     opt.step(); opt.zero_grad()
        >>> recorder.cosines[:, 0, 0, 1]
        array([-1., -1., -1.], dtype=float32)
        >>> recorder.conflict_rate()
        1.0
    """

    def __init__(
        self,
        optimizer: SurgeryOptimizer | None = None,
        *,
        every: int = 1,
        writer: ScalarWriter | None = None,
        start: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"`every` must be at least 1. Found every={every!r}.")
        self.tasks: tuple[str, ...] = ()
        """Names of the ``K`` tasks."""
        self._every = every
        self._writer = writer
        self._next = start
        self._seen: Step | None = None
        self._pending: list[tuple[int, Step]] = []
        self._groups: list[str] = []
        self._steps: list[int] = []
        self._cosines: list[dict[str, Floats]] = []
        self._operated: list[dict[str, Bools]] = []
        self._losses: list[Floats] = []
        if optimizer is not None:
            optimizer.register_step_post_hook(self._after_step)

    def record(self, step: Step, number: int | None = None) -> None:
        """Adds one step by hand; it gets the next ``number`` if none is given.

        Raises:
            ValueError: if its tasks are not those of the steps before.
        """
        if self.tasks and step.tasks != self.tasks:
            raise ValueError(f"A recording has the same tasks throughout: {self.tasks}. Found {step.tasks}.")
        self.tasks = step.tasks
        number = self._next if number is None else number
        self._next = number + 1
        self._pending.append((number, step))
        if len(self._pending) >= _TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Fetches what is pending from the device, and hands it to the writer."""
        for number, step in self._pending:
            self._add(
                number,
                step.groups,
                step.cosines.float().cpu().numpy(),
                step.operated.cpu().numpy(),
                step.losses.float().cpu().numpy(),
            )
        self._pending.clear()

    # --- What was recorded --------------------------------------------------------------------------------------------

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the ``C`` surgery groups (or cells of them) that were operated on."""
        self.flush()
        return tuple(self._groups)

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """``[T]``, the numbers of the recorded steps."""
        self.flush()
        return np.array(self._steps, dtype=np.int64)

    @property
    def losses(self) -> Floats:
        """``[T, K]``, the tasks' losses; nan where a task was absent."""
        self.flush()
        return np.stack(self._losses) if self._losses else np.zeros((0, len(self.tasks)), np.float32)

    @property
    def cosines(self) -> Floats:
        """``[T, C, K, K]``, cosine similarities; nan where there is none: on the diagonal, for absent tasks and groups."""
        self.flush()
        result = np.full((len(self._steps), len(self._groups), *[len(self.tasks)] * 2), np.nan, np.float32)
        for t, cells in enumerate(self._cosines):
            for name, cosines in cells.items():
                result[t, self._groups.index(name)] = cosines
        return result

    @property
    def operated(self) -> Bools:
        """``[T, C, K, K]``, the pairs ``(i, j)`` for which the rule changed ``i``'s gradient by a part of ``j``'s."""
        self.flush()
        result = np.zeros((len(self._steps), len(self._groups), *[len(self.tasks)] * 2), np.bool_)
        for t, cells in enumerate(self._operated):
            for name, operated in cells.items():
                result[t, self._groups.index(name)] = operated
        return result

    @property
    def conflicts(self) -> Bools:
        """``[T, C, K, K]``, the pairs whose cosine is negative."""
        return self.cosines < 0

    def conflict_rate(self, groups: Sequence[str] | None = None) -> float:
        """The share of pairs with a negative cosine, over all steps, among those that have one; nan if none has.

        Args:
            groups: names, or patterns such as ``"encoder.*"``; None means all.
        """
        cosines = self.cosines[:, self.select(groups)]
        measured = np.isfinite(cosines).sum()
        return float((cosines < 0).sum() / measured) if measured else float("nan")

    def operation_rate(self, groups: Sequence[str] | None = None) -> float:
        """The share of pairs that the rule operated on, over all steps, among those with a cosine; nan if none has.

        Args:
            groups: as in :meth:`conflict_rate`.
        """
        chosen = self.select(groups)
        measured = np.isfinite(self.cosines[:, chosen]).sum()
        return float(self.operated[:, chosen].sum() / measured) if measured else float("nan")

    def select(self, groups: Sequence[str] | None = None) -> list[int]:
        """Indices of the groups that match any of the names or patterns, in order; None means all.

        Raises:
            ValueError: if one of them matches nothing.
        """
        names = self.groups
        if groups is None:
            return list(range(len(names)))
        if isinstance(groups, str):
            groups = [groups]
        for pattern in groups:
            if not any(pattern == name or fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"No surgery group matches {pattern!r}. The recording has {some(names, 12)}.")
        return [c for c, name in enumerate(names) if any(p == name or fnmatchcase(name, p) for p in groups)]

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the recording to an ``.npz`` file."""
        np.savez_compressed(
            path,
            tasks=np.array(self.tasks, dtype=np.str_),
            groups=np.array(self.groups, dtype=np.str_),
            steps=self.steps,
            cosines=self.cosines,
            operated=self.operated,
            losses=self.losses,
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Recorder:
        """Reads a recording that :meth:`save` wrote."""
        recorder = cls()
        with np.load(path) as file:
            recorder.tasks = tuple(map(str, file["tasks"]))
            groups = tuple(map(str, file["groups"]))
            arrays = zip(file["steps"], file["cosines"], file["operated"], file["losses"], strict=True)
            for number, cosines, operated, losses in arrays:
                recorder._add(int(number), groups, cosines, operated, losses)
                recorder._next = int(number) + 1
        return recorder

    def __repr__(self) -> str:
        return f"Recorder({len(self.steps)} steps, {len(self.tasks)} tasks, {len(self.groups)} groups)"

    # --- How it is recorded -------------------------------------------------------------------------------------------

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        number = self._next
        step = optimizer.last
        if step is not None and step is not self._seen and number % self._every == 0:
            self._seen = step
            self.record(step, number)
        self._next = number + 1

    def _add(self, number: int, groups: Sequence[str], cosines: Floats, operated: Bools, losses: Floats) -> None:
        self._groups += [name for name in groups if name not in self._groups]
        self._steps.append(number)
        self._cosines.append(dict(zip(groups, cosines, strict=True)))
        self._operated.append(dict(zip(groups, operated, strict=True)))
        self._losses.append(losses)
        if self._writer is not None:
            for tag, value in figures(self.tasks, groups, losses, cosines, operated).items():
                self._writer.add_scalar(tag, value, number)
