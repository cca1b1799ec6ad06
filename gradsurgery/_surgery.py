"""From losses to ``p.grad``: what a :class:`SurgeryOptimizer` does in a step, ahead of the optimizer inside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ._combination import Combination
from ._coordinates import AnyRule, parts
from ._features import Features, FeatureSpec, read_features
from ._gradients import TaskGradients
from ._joint import joint_loss
from ._losses import Losses, read_losses, task_names
from ._mixed import MixedBatch
from ._passes import BatchPass, TaskPass
from ._ranks import Lockstep, Lost, Meeting, Ranks
from ._reuse import Reuse
from ._rule import State, implements
from ._state import loaded
from ._step import Step
from ._stream import Stream, Streaming
from .sources import Source

_log = logging.getLogger("gradsurgery")


class _Partial(Exception):
    """Something went wrong when some rows may have been added to."""


@contextmanager
def _partial() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        raise _Partial from error


class Surgery:
    """Per-task gradients of a step, and what becomes of them.

    Args:
        gradients: the rows.
        rule: operates on them.
        source: computes them, from one loss per task.
        ranks: the processes that train together.
        nonfinite, verify, stream, every, measure: as for :class:`SurgeryOptimizer`.
        seed: of the generator.

    Attributes:
        given: the rule.
        rule: the part of it that sees losses and Gram matrices; it may be the identity.
        coordinates: the part that sees coordinates, or None.
        tasks: names of the tasks; None until they are known.
        state: the rule's.
        generator: that random rules draw from.
        split: the mixed batch whose losses are awaited, or None.
        features: the gradients of a step that is operated on at features, or None.
        last: the record of the last combination, or None.
        skipped: how often each task sat out a step.
        reuse: when there is surgery, and what is reused when not.
    """

    def __init__(
        self,
        gradients: TaskGradients,
        rule: AnyRule,
        source: Source,
        ranks: Ranks,
        *,
        nonfinite: str,
        seed: int,
        verify: bool,
        stream: bool | None,
        every: int,
        measure: bool,
    ) -> None:
        self.gradients = gradients
        self.given = rule
        self.rule, self.coordinates = parts(rule)
        self.source = source
        self.nonfinite = nonfinite
        self.tasks: tuple[str, ...] | None = None
        self.state: State = {}
        self._seed = seed
        self.generator = torch.Generator(gradients.device).manual_seed(seed)
        self.last: Step | None = None
        self.skipped: dict[str, int] = {}
        self.reuse = Reuse(every if measure else 0)
        self._verify = verify
        self._stream = stream
        self._usual_passes = 0  # most backward passes that a step had
        self.ranks = ranks
        ranks.join(self)
        self.forget()

    def forget(self) -> None:
        """Forgets everything about the step that is under way."""
        self.gradients.clear()
        self.passes: list[tuple[Tensor, Tensor]] = []  # of this step: losses, and which tasks were there
        self.split: MixedBatch | None = None
        self.features: Features | None = None
        self.scale: Tensor | None = None  # of the losses, by a GradScaler
        self._rested = False  # this step reuses a mixing: its gradients are in p.grad already
        self._sits_out: tuple[int, ...] = ()  # tasks of this step whose gradients are not finite
        self._done = ""  # how, if this step's surgery is done already
        self.reuse.forget()
        self.ranks.forget()

    @property
    def due(self) -> bool:
        """Whether there are gradients that have not been combined."""
        return bool(self.passes)

    def set_tasks(self, tasks: Iterable[str]) -> None:
        """Makes the tasks' names known, and the rule's state for them.

        Raises:
            ValueError: for a string, for repeated names, and without any.
        """
        if isinstance(tasks, str):
            raise ValueError(f"`tasks` must be several names, or their number. Found the string {tasks!r}.")
        names = tuple(tasks)
        if twice := sorted({repr(name) for name in names if names.count(name) > 1}):
            raise ValueError(f"`tasks` must be distinct. Found {', '.join(twice)} more than once.")
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"`tasks` must be names, at least one. Found {names!r}.")
        self.state = self.fresh_state(names)
        self.tasks = names
        self.ranks.renew()

    def fresh_state(self, tasks: tuple[str, ...]) -> State:
        """The rule's state before the first step."""
        gradients = self.gradients
        if self.coordinates is not None:
            self.coordinates.check(tasks)
        return self.rule.init(tasks, tuple(gradients.groups), device=gradients.device, dtype=gradients.dtype)

    def settle(self) -> None:
        """Follows the parameters to another device, if the model was moved after its optimizer was made.

        The generator starts afresh there: those of different devices share no state.
        """
        gradients = self.gradients
        if gradients.parameters[0].device == gradients.device:
            return
        gradients.locate()
        batch = self.split
        self.forget()
        self.split = batch
        self.generator = torch.Generator(gradients.device).manual_seed(self._seed)
        if self.tasks is not None:
            self.state = loaded(self.state, self.fresh_state(self.tasks))
        self.reuse.load_state_dict(self.reuse.state_dict(), gradients)

    def why_not_streaming(self) -> str:
        """The reason; empty if surgery can happen inside the backward pass."""
        if self._stream is False:
            return "stream=False"
        if self.weighs_ahead:
            return "measure=False: there are no gradients of single tasks"
        if len(self.gradients.groups) == 1:
            return "there is one surgery group, which is complete at the end of the backward pass"
        if not self.rule.separable:
            return f"{self.rule} needs all surgery groups at a time"
        if self.nonfinite != "propagate":
            return f"nonfinite={self.nonfinite!r} looks at all gradients of a task before any are combined"
        return self.ranks.why_not_streaming

    @property
    def weighs_ahead(self) -> bool:
        """Whether losses are weighed ahead of the backward pass."""
        return not self.reuse.every

    @property
    def streaming(self) -> Streaming:
        """Whether surgery happens inside the backward pass."""
        why = self.why_not_streaming()
        return Streaming(not why, why)

    def joint_loss(
        self,
        losses: Losses,
        scaler: torch.amp.GradScaler | None,
        combine: bool,
        samples: Mapping[str, float] | None = None,
        features: FeatureSpec | None = None,
    ) -> Tensor:
        """As :meth:`SurgeryOptimizer.joint_loss`."""
        self.settle()
        batch, self.split = self.split, None
        if features is not None:
            self._read_features(features, batch)
        if batch is not None:
            checked = batch.check(losses)
            value = batch.values(checked, self.per_task).sum().to(checked.dtype)
        else:
            value = torch.stack([loss.value.detach().reshape(()) for loss in read_losses(losses, self.tasks)]).sum()
        if value.dtype.itemsize < 4:
            value = value.float()  # whose gradient may be a scaler's scale, too large for half precision

        def run(seed: Tensor) -> None:
            self._add(losses, batch, scaler, seed=seed, samples=samples, features=features)
            if combine:
                self.combine()
                self._done = "combined by the joint loss"

        return joint_loss(value, run)

    def backward(
        self,
        losses: Losses,
        scaler: torch.amp.GradScaler | None,
        retain_graph: bool,
        samples: Mapping[str, float] | None = None,
        features: FeatureSpec | None = None,
    ) -> None:
        """As :meth:`SurgeryOptimizer.backward`."""
        self.settle()
        batch, self.split = self.split, None
        self._add(losses, batch, scaler, retain_graph=retain_graph, samples=samples, features=features)

    def _add(
        self,
        losses: Losses,
        batch: MixedBatch | None,
        scaler: torch.amp.GradScaler | None,
        *,
        seed: Tensor | None = None,
        retain_graph: bool = False,
        samples: Mapping[str, float] | None = None,
        features: FeatureSpec | None = None,
    ) -> None:
        """Adds each task's gradients to its rows: those of the losses, times ``scaler``'s scale; or times ``seed``."""
        self._check_open()
        ends = None if features is None else self._read_features(features, batch)
        if self.due and (ends is None) != (self.features is None):
            raise ValueError("One step holds backward passes with `features` and without. Pass them in all of its passes.")
        before = self.tasks, self.state
        try:
            found: TaskPass | BatchPass
            if batch is None:
                found = self._tasks_pass(losses, samples, ends, retain_graph)
            elif samples is None:
                found = self._batch_pass(batch.check(losses), batch)
            else:
                raise ValueError("`samples` is for losses of tasks: a mixed batch is counted. Leave it out after split().")
            factors, streams = self._begin(found, scaler, seed)
            with _partial():
                self._run(found, factors, streams, retain_graph)
        except _Partial as partial:
            self.forget()
            self.tasks, self.state = before
            raise partial.__cause__ from None  # type: ignore[misc]

    def _tasks_pass(
        self, losses: Losses, samples: Mapping[str, float] | None, ends: list[Tensor] | None, retain_graph: bool
    ) -> TaskPass:
        found = read_losses(losses, self.tasks, none=self.ranks.size > 1)
        step, targets = self.features, None
        if ends is not None and not self.reuse.rests:
            careful = self.nonfinite != "propagate"
            step = step or Features(self.gradients, look=bool(self.state) or self.tasks is None, fail=careful)
            targets = step.add(ends, found, retain_graph)
        if self.tasks is None:
            self.set_tasks(task_names(losses))
        assert self.tasks is not None
        made = TaskPass(found, self.tasks, samples, self.gradients, self.source, targets)
        if targets is not None:
            self.features = step
        return made

    def _batch_pass(self, losses: Tensor, batch: MixedBatch) -> BatchPass:
        verify = self._verify and not self.due
        streams = bool(self.streaming) and not verify and self._usual_passes == len(self.passes) + 1
        inflow, follow = self.ranks.inflow(self.gradients.trained), not self.reuse.rests
        with _partial():
            return BatchPass(
                losses, batch, self.gradients, self.ranks, inflow, follow=follow, streams=streams, verify=verify
            )

    def _run(self, found: TaskPass | BatchPass, factors: Tensor, streams: bool, retain_graph: bool) -> None:
        """Runs a backward pass: into the rows, into ``p.grad`` if there is no surgery, or through the rule at once."""
        if self._rested:
            own, shared = (found.seeds(factors * weights) for weights in (self.reuse.own, self.reuse.weights))
            self.reuse.gradients(found.outputs, own, shared, self.gradients, retain_graph, self._add_rested)
        elif streams:
            assert isinstance(found, BatchPass)  # the only one with an outlook
            combination = self._combination(self.gradients, undoable=True)
            self._combine_in(*found.stream(combination, factors, retain_graph=retain_graph), combination)
            self._done = "streamed"
        else:
            found.run(factors, retain_graph=retain_graph)
            if found.verifies:
                self._verify = False

    def _combine_in(self, stream: Stream | Lockstep, run: Callable[[], None], combination: Combination) -> None:
        """Combines what ``run`` brings; or, where anything goes wrong on any rank, leaves everything as it was on all."""
        failed: Exception | None = None
        try:
            for work in (run, stream.finish):
                try:
                    work()
                except Lost:
                    raise
                except Exception as error:
                    if self.ranks.size == 1:
                        raise
                    failed = failed or error  # the others are not to wait for the rest of this rank's rows
            self.ranks.confirm(failed)
        except BaseException:
            combination.undo()
            raise
        self._finish(combination)

    def _read_features(self, features: FeatureSpec, batch: MixedBatch | None) -> list[Tensor]:
        groups, ranks = len(self.gradients.groups), self.ranks.size
        return read_features(features, groups=groups, ranks=ranks, mixed=batch is not None, source=self.source)

    def _check_open(self) -> None:
        """Raises unless this step can take in more gradients.

        A scaler that skips a step calls no ``step()``, and some loops call ``model.zero_grad()`` instead of ours; but then
        the gradients are gone.
        """
        if self._done and any(parameter.grad is not None for parameter in self.gradients.parameters):
            self.ranks.refuse()
            raise RuntimeError(
                f"backward() once more in a step that had {self._usual_passes} of them at most so far: this step's surgery "
                f"has been {self._done}, and cannot take in more gradients. "
                + {
                    "streamed": "Make the optimizer with stream=False, or call step() first.",
                    "combined by the joint loss": "Put all losses of a forward pass into one joint loss, and step() after.",
                }[self._done]
            )
        self._done = ""

    def _begin(
        self, found: TaskPass | BatchPass, scaler: torch.amp.GradScaler | None, seed: Tensor | None
    ) -> tuple[Tensor, bool]:
        """What comes before a backward pass: the tasks' factors ``[K]``, and whether surgery happens inside it."""
        values, gradients = found.values, self.gradients
        present = torch.zeros_like(values, dtype=torch.bool).index_fill(0, gradients.index(found.present), True)
        self._rested = self.reuse.rests
        meeting = self.ranks.meet(values, present, found.counts, ahead=self._rested, outlook=found.outlook)
        if self.weighs_ahead:
            self.weigh(meeting)
        shares = meeting.shares
        factors = torch.ones_like(values)
        if shares is not None:
            factors, values = factors * (shares * self.ranks.divisor), values * shares
        if scaler is not None:
            self.scale = scaler.scale(torch.ones((), device=gradients.device))
        if seed is None:
            seed = self.scale if scaler is not None else None
        else:  # the share of this pass in the step is the seed without the scale
            values = values * (seed if scaler is None or self.scale is None else seed / self.scale)
        if seed is not None:
            factors = factors * seed
        if not self._rested:
            if not self.due:
                gradients.expect(found.present)
            self.passes.append((values, present))
        return factors, meeting.streams

    @torch.no_grad()
    def weigh(self, meeting: Meeting) -> None:
        """Weighs losses ahead of a backward pass."""
        self.reuse.weigh(self.rule, meeting.losses, meeting.present, self.state, self.generator)

    @torch.no_grad()
    def combine(self) -> None:
        """As :meth:`SurgeryOptimizer.combine`."""
        self._done = ""
        try:
            if self.ranks.settle(self.due or self._rested):
                if self._rested or (not self.due and self.reuse.rests):
                    self._finish_rested()
                else:
                    self._operate()
        except BaseException:
            if self.ranks.size > 1 or self.features is not None:
                self.forget()
            raise

    def _operate(self) -> None:
        assert self.tasks is not None
        if self.ranks.parts is not None:
            combination = self._combination(self.gradients, undoable=True)
            self._combine_in(Lockstep(combination.stages, self.ranks.parts), lambda: None, combination)
            return
        gradients = self.ranks.reduce(self.gradients if self.features is None else self.features)
        if self.nonfinite != "propagate":
            gradients.align()
            self._check_finite(self.tasks, gradients)
        combination = self._combination(gradients)
        combination.add()
        self._finish(combination)

    def _add_rested(self, p: int, gradient: Tensor) -> None:
        if self.ranks.size == 1:
            self.gradients.accumulate(p, gradient)
        else:  # to be added up over the ranks: the rows of a single task, as it were
            self.gradients.rows[p].add(0, gradient)

    def _finish_rested(self) -> None:
        if self.ranks.size > 1:
            gradients = self.ranks.reduce(self.gradients)
            combined = ((p, rows.alone()) for p, rows in enumerate(gradients.rows) if rows.tasks)
            for p, whole in self.ranks.gather(combined):
                gradients.accumulate(p, whole)
        assert self.tasks is not None
        self.state, last = self.reuse.finish(self.gradients, self.tasks, self.state)
        self.last = self.last if last is None else last
        self.forget()
        self.ranks.check(self.state)

    def _combination(self, gradients: TaskGradients, *, undoable: bool = False) -> Combination:
        assert self.tasks is not None
        losses, present = self.per_task, torch.zeros(len(self.tasks), dtype=torch.bool, device=self.gradients.device)
        if self.passes:
            seen, there = (torch.stack(values) for values in zip(*self.passes, strict=True))
            losses, present = seen.sum(0), there.any(0)
        losses, present = self.ranks.own(losses, present)
        if self._sits_out:
            present = present.index_fill(0, self.gradients.index(self._sits_out), False)
            losses = torch.where(present, losses, 0.0)
        return Combination(
            gradients,
            self.rule,
            self.tasks,
            self.state,
            self.generator,
            self.scale,
            losses,
            present,
            self.ranks,
            self.coordinates,
            undoable=undoable,
        )

    def _finish(self, combination: Combination) -> None:
        self._usual_passes = max(self._usual_passes, len(self.passes))
        self.last, self.state = combination.finish()
        self.reuse.learn(self.last, self.gradients, combination.shared)
        self.reuse.steps += 1
        self.forget()
        if implements(self.rule, "observe"):
            self.state = self.rule.observe(self.last, self.state)
        self.ranks.check(self.state)

    @property
    def per_task(self) -> Tensor:
        """Zeros, one for each task."""
        assert self.tasks is not None
        return self.gradients.zeros(len(self.tasks))

    def _check_finite(self, tasks: tuple[str, ...], gradients: TaskGradients) -> None:
        bad = self.ranks.union(gradients.not_finite())
        if bad and self.nonfinite == "raise":
            task, name = bad[0]
            raise FloatingPointError(
                f"The gradient of task {tasks[task]!r} for parameter {name!r} holds inf or nan"
                + (f", and so do {len(bad) - 1} more." if len(bad) > 1 else ".")
            )
        worst = dict(reversed(bad))
        self._sits_out = tuple(worst)
        for task, name in worst.items():
            gradients.drop(task)
            self.skipped[tasks[task]] = self.skipped.get(tasks[task], 0) + 1
            _log.warning(
                "task %r sits out this step (%d so far): its gradient for %r holds inf or nan",
                *(tasks[task], self.skipped[tasks[task]], name),
            )

    def __getstate__(self) -> dict[str, Any]:
        if self.ranks.size > 1:
            raise TypeError("An optimizer that works with other processes cannot be copied: save its state_dict() instead.")
        # Gradients are not saved. Whoever unpickles this gives it `gradients`, and calls `forget`.
        left_out = ("gradients", "last", "passes", "split", "features", "scale")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.last = None
