"""From losses to ``p.grad``: what a :class:`SurgeryOptimizer` does in a step, ahead of the optimizer inside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._combination import Combination
from ._compile import donated_buffers_explained
from ._coordinates import AnyRule, parts
from ._counts import Counts, read_samples
from ._features import Features, FeatureSpec, read_features
from ._gradients import TaskGradients
from ._joint import joint_loss
from ._losses import Losses, read_losses, task_names
from ._mixed import MixedBatch
from ._ranks import Lost, Meeting, Outlook, Ranks
from ._reuse import Reuse
from ._rule import State, implements
from ._state import guarded, loaded
from ._step import Step
from ._stream import Lockstep, Stream, Streaming
from .sources import Root, Source
from .sources._split import Pass

_log = logging.getLogger("gradsurgery")


class _Partial(Exception):
    """Something went wrong when some rows may have been added to."""


@contextmanager
def _partial() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        raise _Partial from error


class Weighed(NamedTuple):
    """The losses of a step that were weighed ahead of its backward passes, which tasks they are of, and the new state."""

    losses: Tensor
    present: Tensor
    state: State


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
        self._indices: dict[tuple[int, ...], Tensor] = {}
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
        self._weighed: Weighed | None = None  # by a rule that weighs losses ahead of the backward pass
        self.ranks.forget()

    @property
    def due(self) -> bool:
        """Whether there are gradients that have not been combined."""
        return bool(self.passes)

    def set_tasks(self, tasks: Iterable[str]) -> None:
        """Makes the tasks' names known, and the rule's state for them.

        Raises:
            ValueError: for repeated names, and without any.
        """
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
        self._indices.clear()
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

    def joint_loss(self, losses: Losses, scaler: torch.amp.GradScaler | None, combine: bool) -> Tensor:
        """As :meth:`SurgeryOptimizer.joint_loss`."""
        self.settle()
        batch, self.split = self.split, None
        if batch is not None:
            checked = batch.check(losses)
            value = batch.values(checked, self.per_task).sum().to(checked.dtype)
        else:
            value = torch.stack([loss.value.detach().reshape(()) for loss in read_losses(losses, self.tasks)]).sum()
        if value.dtype.itemsize < 4:
            value = value.float()  # whose gradient may be a scaler's scale, too large for half precision

        def run(seed: Tensor) -> None:
            self._add(losses, batch, scaler, seed=seed)
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
            if batch is not None:
                if samples is not None:
                    raise ValueError(
                        "`samples` is for losses of tasks: a mixed batch is counted. Leave it out after split()."
                    )
                self._backward_mixed(batch.check(losses), batch, scaler, seed, retain_graph)
            else:
                self._backward_tasks(losses, scaler, seed, retain_graph, samples, ends)
        except _Partial as partial:
            self.forget()
            self.tasks, self.state = before
            raise partial.__cause__ from None  # type: ignore[misc]

    def _backward_tasks(
        self,
        losses: Losses,
        scaler: torch.amp.GradScaler | None,
        seed: Tensor | None,
        retain_graph: bool,
        samples: Mapping[str, float] | None,
        ends: list[Tensor] | None,
    ) -> None:
        found = read_losses(losses, self.tasks, none=self.ranks.size > 1)
        step, targets = self.features, None
        if ends is not None and not self.reuse.rests:
            careful = self.nonfinite != "propagate"
            step = step or Features(self.gradients, look=bool(self.state) or self.tasks is None, fail=careful)
            targets = step.add(ends, found, retain_graph)
        if self.tasks is None:
            self.set_tasks(task_names(losses))
        assert self.tasks is not None
        index = {name: k for k, name in enumerate(self.tasks)}
        like = self.per_task
        values = like.index_put(
            (self._index(tuple(index[loss.name] for loss in found)),),
            torch.stack([loss.value.detach().reshape(()).to(like) for loss in found]) if found else like[:0],
        )
        counts = read_samples(samples, [loss.name for loss in found], self.tasks)
        factors, _ = self._begin(values, [index[loss.name] for loss in found], scaler, seed, counts)
        roots = [
            Root(index[loss.name], loss.name, loss.output, factors[index[loss.name]].to(loss.value).expand(loss.shape))
            for loss in found
        ]
        if self._rested:
            own, shared = (
                [root.gradient * weights[root.task].to(root.gradient) for root in roots]
                for weights in (self.reuse.own, self.reuse.weights)
            )
            with _partial():
                outputs = [root.output for root in roots]
                self.reuse.gradients(outputs, own, shared, self.gradients, retain_graph, self._add_rested)
            return
        if targets is not None:
            self.features = step
            parameters, rows = targets
        else:
            trained = self._trained()
            parameters = [self.gradients.parameters[p] for p in trained]
            rows = [self.gradients.rows[p] for p in trained]
        with _partial():
            self.source(roots, parameters, rows, retain_graph=retain_graph)

    def _backward_mixed(
        self,
        losses: Tensor,
        batch: MixedBatch,
        scaler: torch.amp.GradScaler | None,
        seed: Tensor | None,
        retain_graph: bool,
    ) -> None:
        verify = self._verify and not self.due
        values, single, outlook = batch.values(losses, self.per_task), None, None
        trained = self._trained()
        parameters = [self.gradients.parameters[p] for p in trained]
        if not self.reuse.rests:
            rows, names = [self.gradients.rows[p] for p in trained], [self.gradients.names[p] for p in trained]
            with _partial(), donated_buffers_explained():
                single = Pass(losses, batch.labels(losses), parameters, rows, names)
            stream = bool(self.streaming) and not verify and self._usual_passes == len(self.passes) + 1
            outlook = Outlook(stream, partial(self._outlook, single, trained))
        factors, streams = self._begin(values, batch.present, scaler, seed, batch.counts(losses), outlook)
        if single is None:
            own, shared = ([batch.seeds(losses, factors * w)] for w in (self.reuse.own, self.reuse.weights))
            with _partial():
                self.reuse.gradients([losses], own, shared, self.gradients, retain_graph, self._add_rested)
            return
        seeds = batch.seeds(losses, factors)
        with _partial(), donated_buffers_explained():
            if streams:
                self._run_streaming(single, trained, seeds, retain_graph)
            else:
                single.run(seeds, retain_graph=retain_graph or verify)
            if verify:
                weights = 0.5 + torch.rand(len(factors), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
                weights = weights.to(factors)
                plain = torch.autograd.grad(
                    [losses],
                    parameters,
                    [batch.seeds(losses, factors * weights)],
                    retain_graph=retain_graph,
                    allow_unused=True,
                )
                single.verify(weights, plain)
                self._verify = False

    def _outlook(self, single: Pass, trained: Sequence[int]) -> tuple[list[set[int]], list[int]]:
        tasks: list[set[int]] = [set() for _ in self.gradients.parameters]
        found, order = single.outlook()
        for p, own in zip(trained, found, strict=True):
            tasks[p] = own
        return tasks, [trained[i] for i in order]

    def _run_streaming(self, single: Pass, trained: Sequence[int], seeds: Tensor, retain_graph: bool) -> None:
        combination = self._combination(self.gradients, undoable=True)
        awaited = [trained[i] for i in single.reached]
        parts = self.ranks.parts
        stream: Stream | Lockstep = Stream(self.gradients, combination, awaited)
        if parts is not None:
            stream = Lockstep(combination, parts, awaited)

        def run() -> None:
            new, complete = self.gradients.arena.take, stream.complete
            single.run(seeds, retain_graph=retain_graph, complete=lambda i: complete(trained[i]), new=new)

        self._combine_in(stream, combination, run)
        self._done = "streamed"

    def _combine_in(self, stream: Stream | Lockstep, combination: Combination, run: Callable[[], None]) -> None:
        """Combines what ``run`` brings; or, where anything goes wrong on any rank, leaves everything as it was on all."""
        failed: Exception | None = None
        try:
            try:
                run()
            except Lost:
                raise
            except Exception as error:
                if self.ranks.size == 1:
                    raise
                failed = error  # the others are not to wait for the rest of this rank's rows
            stream.finish()
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

    def _trained(self) -> list[int]:
        return [p for p, parameter in enumerate(self.gradients.parameters) if parameter.requires_grad]

    def _begin(
        self,
        values: Tensor,
        tasks: Iterable[int],
        scaler: torch.amp.GradScaler | None,
        seed: Tensor | None,
        counts: Counts,
        outlook: Outlook | None = None,
    ) -> tuple[Tensor, bool]:
        """What comes before a backward pass: the tasks' factors ``[K]``, and whether surgery happens inside it."""
        tasks = list(tasks)
        present = torch.zeros_like(values, dtype=torch.bool).index_fill(0, self._index(tuple(tasks)), True)
        self._rested = self.reuse.rests
        meeting = self.ranks.meet(values, present, counts, ahead=self._rested, outlook=outlook)
        if self.weighs_ahead:
            self.weigh(meeting)
        shares = meeting.shares
        factors = torch.ones_like(values)
        if shares is not None:
            factors, values = factors * (shares * self.ranks.divisor), values * shares
        gradients = self.gradients
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
                gradients.expect(tasks)
            self.passes.append((values, present))
        return factors, meeting.streams

    @torch.no_grad()
    def weigh(self, meeting: Meeting) -> None:
        """Weighs losses ahead of a backward pass: in a step's first one, for all of the step."""
        losses, present = meeting.losses, meeting.present
        if self._weighed is None:
            weights, state = torch.ones_like(losses), self.state
            if implements(self.rule, "weigh"):
                weights, state = self.rule.weigh(losses, state, active=present, generator=self.generator)
            self.reuse.weights = self.reuse.own = weights
            self._weighed = Weighed(losses, present, state)
        else:
            self._weighed = Weighed(self._weighed.losses + losses, self._weighed.present | present, self._weighed.state)

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
            self._combine_in(Lockstep(combination, self.ranks.parts), combination, lambda: None)
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
        if self._weighed is not None:
            self._finish_weighed(self._weighed)
        self.reuse.steps += 1
        self.forget()
        self.ranks.check(self.state)

    def _finish_weighed(self, weighed: Weighed) -> None:
        assert self.tasks is not None
        if self.state:
            found = [parameter.grad for parameter in self.gradients.parameters if parameter.grad is not None]
            values = [weighed.losses, *(gradient._values() if gradient.is_sparse else gradient for gradient in found)]
            finite = [value.isfinite().all().to(self.gradients.device) for value in values]
            self.state = guarded(finite, old=self.state, new=weighed.state)
        count = len(self.tasks)
        none = weighed.losses.new_zeros(0, count, count)
        losses = weighed.losses.masked_fill(~weighed.present, torch.nan)
        weights = self.reuse.own if implements(self.rule, "weigh") else None
        self.last = Step(self.tasks, (), none[:, 0].bool(), none, none, losses, weights)

    def _combination(self, gradients: TaskGradients, *, undoable: bool = False) -> Combination:
        assert self.tasks is not None
        losses, present = self.per_task, torch.zeros(len(self.tasks), dtype=torch.bool, device=self.gradients.device)
        if self.passes:
            seen, there = (torch.stack(values) for values in zip(*self.passes, strict=True))
            losses, present = seen.sum(0), there.any(0)
        losses, present = self.ranks.own(losses, present)
        if self._sits_out:
            present = present.index_fill(0, self._index(self._sits_out), False)
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
        return torch.zeros(len(self.tasks), dtype=self.gradients.dtype, device=self.gradients.device)

    def _index(self, tasks: tuple[int, ...]) -> Tensor:
        if tasks not in self._indices:
            self._indices[tasks] = torch.tensor(tasks, device=self.gradients.device)
        return self._indices[tasks]

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
        left_out = ("gradients", "_indices", "last", "passes", "split", "features", "scale")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._indices, self.last = {}, None
