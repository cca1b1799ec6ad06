"""From losses to ``p.grad``: what a :class:`SurgeryOptimizer` does in a step, ahead of the optimizer inside."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ._buffer import Rows
from ._combination import Combination
from ._counts import Counts, read_samples
from ._gradients import TaskGradients
from ._losses import Losses, read_losses, task_names
from ._mixed import MixedBatch
from ._ranks import Ranks
from ._reuse import Reuse
from ._rule import Rule, State, implements
from ._step import Step
from ._stream import Stream, Streaming
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


@contextmanager
def _donated_buffers_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "donated" not in str(error):
            raise
        raise RuntimeError(
            "split() sends gradients through compiled parts of a model once per task, and torch.compile let their backward "
            "pass give its buffers away. Set torch._functorch.config.donated_buffer = False before the model is first "
            "called, or do not compile it."
        ) from error


class Surgery:
    """Per-task gradients of a step, and what becomes of them.

    Args:
        gradients: the rows.
        rule: operates on them.
        source: computes them, from one loss per task.
        ranks: the processes that train together.
        nonfinite, verify, stream, every: as for :class:`SurgeryOptimizer`.
        seed: of the generator.

    Attributes:
        tasks: names of the tasks; None until they are known.
        state: the rule's.
        generator: that random rules draw from.
        split: the mixed batch whose losses are awaited, or None.
        last: the record of the last combination, or None.
        skipped: how often each task sat out a step.
        reuse: when there is surgery, and what is reused when not.
    """

    def __init__(
        self,
        gradients: TaskGradients,
        rule: Rule,
        source: Source,
        ranks: Ranks,
        *,
        nonfinite: str,
        seed: int,
        verify: bool,
        stream: bool | None,
        every: int,
    ) -> None:
        self.gradients = gradients
        self.rule = rule
        self.source = source
        self.nonfinite = nonfinite
        self.tasks: tuple[str, ...] | None = None
        self.state: State = {}
        self.generator = torch.Generator(gradients.device).manual_seed(seed)
        self.last: Step | None = None
        self.skipped: dict[str, int] = {}
        self.reuse = Reuse(every)
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
        self.scale: Tensor | None = None  # of the losses, by a GradScaler
        self._rested = False  # this step reuses a mixing: its gradients are in p.grad already
        self._streamed = False  # this step's surgery is done already
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
        return self.rule.init(tasks, tuple(gradients.groups), device=gradients.device, dtype=gradients.dtype)

    def why_not_streaming(self) -> str:
        """The reason; empty if surgery can happen inside the backward pass."""
        if self._stream is False:
            return "stream=False"
        if len(self.gradients.groups) == 1:
            return "there is one surgery group, which is complete at the end of the backward pass"
        if not self.rule.separable:
            return f"{self.rule} needs all surgery groups at a time"
        if self.nonfinite != "propagate":
            return f"nonfinite={self.nonfinite!r} looks at all gradients of a task before any are combined"
        return self.ranks.why_not_streaming

    @property
    def weighs(self) -> bool:
        """Whether the rule weighs losses ahead of the backward pass."""
        return implements(self.rule, "weigh")

    @property
    def streaming(self) -> Streaming:
        """Whether surgery happens inside the backward pass."""
        why = self.why_not_streaming()
        return Streaming(not why, why)

    def backward(
        self,
        losses: Losses,
        scaler: torch.amp.GradScaler | None,
        retain_graph: bool,
        samples: Mapping[str, float] | None = None,
    ) -> None:
        """As :meth:`SurgeryOptimizer.backward`."""
        if self._streamed:
            raise RuntimeError(
                f"backward() once more in a step that had {self._usual_passes} of them at most so far: this step's surgery "
                "has been streamed, and cannot take in more gradients. Make the optimizer with stream=False, or call "
                "step() first."
            )
        before = self.tasks, self.state
        try:
            if self.split is not None:
                if samples is not None:
                    raise ValueError(
                        "`samples` is for losses of tasks: a mixed batch is counted. Leave it out after split()."
                    )
                batch, self.split = self.split, None
                self._backward_mixed(batch.check(losses), batch, scaler, retain_graph)
            else:
                self._backward_tasks(losses, scaler, retain_graph, samples)
        except _Partial as partial:
            self.forget()
            self.tasks, self.state = before
            raise partial.__cause__ from None  # type: ignore[misc]

    def _backward_tasks(
        self,
        losses: Losses,
        scaler: torch.amp.GradScaler | None,
        retain_graph: bool,
        samples: Mapping[str, float] | None,
    ) -> None:
        found = read_losses(losses, self.tasks, none=self.ranks.size > 1)
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
        factors, parameters, rows = self._begin(values, [index[loss.name] for loss in found], scaler, counts)
        roots = [
            Root(index[loss.name], loss.name, loss.output, factors[index[loss.name]].to(loss.value).expand(loss.shape))
            for loss in found
        ]
        if self.reuse.weights is not None and self._rested:
            weights = self.reuse.weights
            weighted = [root.gradient * weights[root.task].to(root.gradient) for root in roots]
            with _partial():
                self.reuse.gradients(
                    [root.output for root in roots],
                    [root.gradient for root in roots],
                    weighted,
                    self.gradients,
                    retain_graph,
                    self._add_rested,
                )
            return
        with _partial():
            self.source(roots, parameters, rows, retain_graph=retain_graph)

    def _backward_mixed(
        self, losses: Tensor, batch: MixedBatch, scaler: torch.amp.GradScaler | None, retain_graph: bool
    ) -> None:
        verify = self._verify and not self.due
        values = batch.values(losses, self.per_task)
        factors, parameters, rows = self._begin(values, batch.present, scaler, batch.counts(losses))
        names = [n for n, p in zip(self.gradients.names, self.gradients.parameters, strict=True) if p.requires_grad]
        seeds = batch.seeds(losses, factors)
        if self.reuse.weights is not None and self._rested:
            weighted = batch.seeds(losses, factors * self.reuse.weights)
            with _partial():
                self.reuse.gradients([losses], [seeds], [weighted], self.gradients, retain_graph, self._add_rested)
            return
        stream = bool(self.streaming) and not verify and self._usual_passes == len(self.passes) > 0
        with _partial(), _donated_buffers_explained():
            new = self.gradients.arena.take if stream else None
            single = Pass(losses, batch.labels(losses), parameters, rows, names, new)
            if stream:
                self._run_streaming(single, seeds, retain_graph)
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

    def _run_streaming(self, single: Pass, seeds: Tensor, retain_graph: bool) -> None:
        trained = [p for p, parameter in enumerate(self.gradients.parameters) if parameter.requires_grad]
        combination = self._combination(self.gradients, undoable=True)
        stream = Stream(self.gradients, combination, [trained[i] for i in single.reached])
        try:
            single.run(seeds, retain_graph=retain_graph, complete=lambda i: stream.complete(trained[i]))
            stream.finish()
        except BaseException:
            combination.undo()
            raise
        self._finish(combination)
        self._streamed = True

    def _begin(
        self, values: Tensor, tasks: Iterable[int], scaler: torch.amp.GradScaler | None, counts: Counts
    ) -> tuple[Tensor, list[Tensor], list[Rows]]:
        """What comes before a backward pass: the tasks' factors ``[K]``, and the parameters and rows that are trained."""
        tasks = list(tasks)
        present = torch.zeros_like(values, dtype=torch.bool).index_fill(0, self._index(tuple(tasks)), True)
        self._rested = self.reuse.rests
        everyones, there, shares = self.ranks.meet(values, present, counts, ahead=self.weighs or self._rested)
        factors = torch.ones_like(values)
        if self.weighs:
            factors, self.state = self.rule.weigh(everyones, self.state, active=there)
        if shares is not None:
            factors, values = factors * (shares * self.ranks.divisor), values * shares
        gradients = self.gradients
        if scaler is not None:
            self.scale = scaler.scale(torch.ones((), device=gradients.device))
            factors = factors * self.scale
        if not self._rested:
            if not self.due:
                gradients.expect(tasks)
            self.passes.append((values, present))
        trained = [p for p, parameter in enumerate(gradients.parameters) if parameter.requires_grad]
        return factors, [gradients.parameters[p] for p in trained], [gradients.rows[p] for p in trained]

    @torch.no_grad()
    def combine(self) -> None:
        """As :meth:`SurgeryOptimizer.combine`."""
        self._streamed = False
        try:
            if self.ranks.settle(self.due or self._rested):
                if self._rested or (not self.due and self.reuse.rests):
                    self._finish_rested()
                else:
                    self._operate()
        except BaseException:
            if self.ranks.size > 1:
                self.forget()
            raise

    def _operate(self) -> None:
        assert self.tasks is not None
        gradients = self.ranks.reduce(self.gradients)
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
        self.reuse.steps += 1
        self.forget()

    def _combination(self, gradients: TaskGradients, *, undoable: bool = False) -> Combination:
        assert self.tasks is not None
        losses, present = self.per_task, torch.zeros(len(self.tasks), dtype=torch.bool, device=self.gradients.device)
        if self.passes:
            seen, there = (torch.stack(values) for values in zip(*self.passes, strict=True))
            losses, present = seen.sum(0), there.any(0)
        losses, present = self.ranks.own(losses, present)
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
        for task, name in dict(reversed(bad)).items():
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
        left_out = ("gradients", "_indices", "last", "passes", "split", "scale")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._indices, self.last = {}, None
