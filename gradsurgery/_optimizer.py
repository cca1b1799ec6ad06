"""The optimizer wrapper."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from ._buffer import Rows
from ._combination import Combination
from ._gradients import TaskGradients
from ._groups import Groups, GroupSpec, unwrap
from ._losses import Losses, read_losses, task_names
from ._mixed import MixedBatch, TaskIds
from ._rule import Rule, State, implements
from ._state import carried, check_match, loaded
from ._step import Step
from ._stream import Stream, Streaming
from .sources import Root
from .sources._named import source_named
from .sources._split import Pass

T = TypeVar("T")

_log = logging.getLogger("gradsurgery")


class _Partial(Exception):
    """Something went wrong when some rows may have been added to."""


@contextmanager
def _partial() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        raise _Partial from error


class SurgeryOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer, and lets a rule operate on the tasks' gradients before it steps.

    One training step is:

    1. :meth:`backward` turns each task's loss into a row of gradients, ``dL_k/dp``; several calls add up.
    2. :meth:`combine` multiplies the rows of each surgery group with each other, which gives its Gram matrix;
    3. the rule turns all Gram matrices ``[G, K, K]`` into mixing matrices;
    4. the mixed rows are added to ``p.grad``, and freed.
    5. :meth:`step` steps the optimizer inside. It combines first if that is still due.

    Parameters that one task alone reaches get that task's gradient as it is. Frozen parameters, and those that no task
    reaches, keep ``grad is None``.

    Args:
        optimizer: any ``torch.optim.Optimizer``. Its ``param_groups``, ``state`` and ``defaults`` are this one's too.
        rule: what happens to the gradients, such as ``GradVac()`` or ``Chain(PCGrad(), Mean())``.
        model: gives parameters their names, for groups, checkpoints and messages. To be wrapped around everything that is
            trained: put a model and a loss with parameters of its own into one ``nn.ModuleList``.
        groups: the surgery groups. ``"model"``: one for all; ``"layer"``: one for each repeated block (an item of a
            ModuleList or Sequential, at the outermost such level), other parameters by top-level child; ``"module"``: one
            for each module that holds parameters; ``"tensor"``: one for each parameter; a mapping from names to lists of
            patterns (the first group that matches; what matches none is in ``"(rest)"``); or a function
            ``(name, parameter) -> group name``.
        tasks: names of the tasks, or their number (names are then "0", "1", …); learned from the first call of
            :meth:`backward` otherwise.
        source: how per-task gradients are computed. ``"autograd"``: one backward pass per loss; ``"batched"``: one
            vectorised pass.
        chunk_size: for ``source="batched"``, how many losses at a time; None means all.
        nonfinite: what a gradient that is inf or nan does. ``"propagate"``: it shows up in ``p.grad``, which is what
            ``GradScaler`` looks for, and the rule's state stays as it was; ``"raise"``: an error names the task and the
            parameter; ``"skip"``: the task sits out this step, counted in :attr:`skipped` and logged. The last two look at
            every gradient and wait for the device.
        seed: of the generator that random rules draw from.
        verify: compare the gradients of the first single pass (see :meth:`split`) with a plain backward pass.
        stream: whether surgery on a group happens inside the backward pass of a mixed batch, as soon as the group's
            gradients are complete, so that no more than a few groups' rows are in memory at a time. None: where it can;
            see :attr:`streaming`. The first step, which shows how many backward passes a step has, never streams.

    Attributes:
        optimizer: the optimizer inside.
        groups: the partition of the parameters; prints as a table.
        last: the :class:`Step` that the last combination saw, or None.
        skipped: how often each task sat out a step.

    Raises:
        TypeError: if ``optimizer`` or ``rule`` is of another type.
        ValueError: for unknown settings, repeated tasks, and a model and an optimizer that hold different parameters.

    Example:
        >>> import torch, gradsurgery as gs
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.PCGrad(), model=model)
        >>> x = torch.randn(8, 2)
        >>> opt.backward({"up": -model(x).mean(), "down": model(x).square().mean()})
        >>> opt.step()
        >>> opt.zero_grad()
        >>> opt.groups
        group  tensors  parameters
        model        2           3  weight, bias

    Note:
        ``backward`` frees the graph after the last loss, as ``Tensor.backward`` does. If every task has a forward pass of
        its own, one call per task keeps one graph at a time in memory. Gradients reach neither hooks that fire on
        accumulation (``register_post_accumulate_grad_hook``) nor reentrant activation checkpointing
        (``use_reentrant=True``, which PyTorch cannot combine with gradients by name).
    """

    _scale: Tensor | None  # of the losses, by a GradScaler
    _split: MixedBatch | None  # whose losses are awaited
    _passes: list[tuple[Tensor, Tensor]]  # since the last combination: losses, and which tasks were there

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: Rule,
        *,
        model: nn.Module | None = None,
        groups: GroupSpec = "model",
        tasks: Iterable[str] | int | None = None,
        source: str = "autograd",
        chunk_size: int | None = None,
        nonfinite: str = "propagate",
        seed: int = 0,
        verify: bool = True,
        stream: bool | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer. Found {type(optimizer).__name__}.")
        if isinstance(optimizer, SurgeryOptimizer):
            raise TypeError("`optimizer` is a SurgeryOptimizer already. To apply several rules, use Chain(rule, rule).")
        if not isinstance(rule, Rule):
            raise TypeError(f"`rule` must be a gradsurgery rule, such as PCGrad(). Found {rule!r}.")
        if nonfinite not in ("propagate", "raise", "skip"):
            raise ValueError(f"`nonfinite` must be 'propagate', 'raise' or 'skip'. Found {nonfinite!r}.")
        if nonfinite != "propagate" and source == "batched":
            raise ValueError(
                f"nonfinite={nonfinite!r} needs source='autograd': in a vectorised pass, one task's inf or nan reaches the "
                "gradients of all others."
            )
        self.optimizer = optimizer
        self.rule = rule
        self.nonfinite = nonfinite
        self.last: Step | None = None
        self.skipped: dict[str, int] = {}
        self._source = source_named(source, chunk_size)
        self._model = None if model is None else unwrap(model)
        self._spec = groups
        self._tasks: tuple[str, ...] | None = None
        self._rule_state: State = {}
        self._gradients = TaskGradients(optimizer, self._model, groups)
        self._generator = torch.Generator(self._gradients.device).manual_seed(seed)
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._verify = verify
        self._stream = stream
        self._usual_passes = 0  # most backward passes that a step had
        self._streamed = False  # whether this step's surgery is done already
        self._forget()
        if tasks is not None:
            self._set_tasks(map(str, range(tasks)) if isinstance(tasks, int) else tasks)
        if stream and (why := self._why_not_streaming()):
            raise ValueError(f"`stream` is True, but surgery cannot be streamed: {why}.")
        super().__setstate__({})  # what an Optimizer needs beside its parameters: hooks, and the patched step

    # --- What makes it an Optimizer: everything but the gradients is the inner one's. ---------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's parameter groups (in PyTorch's sense)."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state. The rule's is :attr:`rule_state`."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the inner optimizer. Surgery groups keep their state by name.

        Raises:
            RuntimeError: between ``backward`` and ``combine``.
            ValueError: for parameters that are not the model's.
        """
        if self.due:
            raise RuntimeError("add_param_group() between backward() and combine(): step, or zero_grad(), first.")
        self.optimizer.add_param_group(param_group)
        old = list(self.groups)
        try:
            self._gradients = TaskGradients(self.optimizer, self._model, self._spec)
        except BaseException:
            self.optimizer.param_groups.pop()
            raise
        if self._tasks is not None:
            self._rule_state = carried(self._rule_state, old, self._fresh_state(self._tasks), list(self.groups))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets ``p.grad``, and forgets gradients that have not been combined."""
        self.optimizer.zero_grad(set_to_none)
        self._streamed = False
        self._forget()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], T]) -> T: ...
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combines if that is still due, and steps the inner optimizer.

        Args:
            closure: evaluates the losses, calls :meth:`backward`, and returns the value that the inner optimizer wants.
        """
        if closure is None:
            self.combine()
            return self.optimizer.step()

        def evaluate() -> Any:
            with torch.enable_grad():
                value = closure()
            self.combine()
            return value

        return self.optimizer.step(evaluate)

    # --- Per-task gradients -------------------------------------------------------------------------------------------

    @contextmanager
    def split(self, task_ids: TaskIds, *, reduction: str = "mean") -> Iterator[None]:
        """Says to which task each sample of a mixed batch belongs, for the forward pass inside.

        :meth:`backward` then takes one loss for each sample, and computes all tasks' gradients in a *single pass*: one
        backward pass of the whole batch, whatever the number of tasks.

        Args:
            task_ids: ``[B]``, for each sample of the batch the index of its task, or its name; in any order. A tensor is
                best left on the CPU: its values are needed there.
            reduction: a task's loss is the ``"mean"``, or the ``"sum"``, over its samples' losses (over all their elements
                if they are ``[B, ...]``). Tasks without samples are absent.

        Raises:
            ValueError: for unknown tasks, other shapes, if the tasks' names are not known yet, and if an earlier batch was
                split and not taken through :meth:`backward`.

        Example:
            >>> import torch, gradsurgery as gs
            >>> model = torch.nn.Linear(2, 1)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> opt = gs.SurgeryOptimizer(sgd, gs.PCGrad(), model=model, tasks=["up", "down"])
            >>> x, task_ids = torch.randn(8, 2), torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
            >>> with opt.split(task_ids):
            ...     losses = (model(x).squeeze(1) - 1).square()
            >>> opt.backward(losses)
            >>> opt.step()

        Note:
            The losses of a sample must depend on no other task's samples: batch normalisation in training mode, for one,
            is an error that says so. Nothing of the forward pass is changed. Operations on parameters that have no fast
            way of their own are repeated for each task, in the backward pass.
        """
        if self._tasks is None:
            raise ValueError("split() needs to know the tasks: make the optimizer with tasks=[...], their names or number.")
        if self._split is not None:
            raise ValueError(
                "split() again, before the losses of the last one were passed to backward(). Call backward(losses) after "
                "each split(), or zero_grad() to forget it."
            )
        self._split = MixedBatch(task_ids, self._tasks, reduction)
        try:
            yield
        except BaseException:
            self._split = None
            raise

    def backward(self, losses: Losses, *, scaler: torch.amp.GradScaler | None = None, retain_graph: bool = False) -> None:
        """Computes each task's gradients, and adds them to its rows.

        Args:
            losses: task → scalar loss; or one scalar loss per task, in order; or a 1-D tensor of them. A step may hold
                only some of the tasks; in a sequence, None marks the others. After :meth:`split`: a tensor ``[B]`` or
                ``[B, ...]`` of each sample's losses.
            scaler: a ``GradScaler``: the gradients are those of the scaled losses, while rules see them unscaled. Call
                :meth:`combine` before ``scaler.unscale_`` or ``scaler.step``. Losses scaled by hand,
                ``scaler.scale(loss)``, also work with rules for which a common factor makes no difference.
            retain_graph: keep the graph of the last loss too.

        Raises:
            ValueError: without losses, and for a loss that is no scalar, has no graph, is of an unknown task, or reaches
                none of the parameters; after :meth:`split`, if samples of different tasks interact.
            RuntimeError: if the first single pass does not agree with a plain backward pass.

        Note:
            An error in a backward pass, or a loss that reaches nothing, leaves some rows added to and others not: all
            gradients of the step are then forgotten.

            In a 1-D tensor, each task reaches whatever the tensor depends on, except directly behind ``torch.stack`` or
            ``torch.cat`` where the tasks are still apart. With heads of their own, pass a mapping.
        """
        if self._streamed:
            raise RuntimeError(
                f"backward() once more in a step that had {self._usual_passes} of them at most so far: this step's surgery "
                "has been streamed, and cannot take in more gradients. Make the optimizer with stream=False, or call "
                "step() first."
            )
        before = self._tasks, self._rule_state
        try:
            if self._split is not None:
                batch, self._split = self._split, None
                self._backward_mixed(batch.check(losses), batch, scaler, retain_graph)
            else:
                self._backward_tasks(losses, scaler, retain_graph)
        except _Partial as partial:
            self._forget()
            self._tasks, self._rule_state = before
            raise partial.__cause__ from None  # type: ignore[misc]

    def _backward_tasks(self, losses: Losses, scaler: torch.amp.GradScaler | None, retain_graph: bool) -> None:
        found = read_losses(losses, self._tasks)
        if self._tasks is None:
            self._set_tasks(task_names(losses))
        assert self._tasks is not None
        index = {name: k for k, name in enumerate(self._tasks)}
        like = self._per_task
        values = like.index_put(
            (self._index(tuple(index[loss.name] for loss in found)),),
            torch.stack([loss.value.detach().reshape(()).to(like) for loss in found]),
        )
        factors, parameters, rows = self._begin(values, [index[loss.name] for loss in found], scaler)
        roots = [
            Root(index[loss.name], loss.name, loss.output, factors[index[loss.name]].to(loss.value).expand(loss.shape))
            for loss in found
        ]
        with _partial():
            self._source(roots, parameters, rows, retain_graph=retain_graph)

    def _backward_mixed(
        self, losses: Tensor, batch: MixedBatch, scaler: torch.amp.GradScaler | None, retain_graph: bool
    ) -> None:
        verify = self._verify and not self.due
        factors, parameters, rows = self._begin(batch.values(losses, self._per_task), batch.present, scaler)
        names = [n for n, p in zip(self._gradients.names, self._gradients.parameters, strict=True) if p.requires_grad]
        seeds = batch.seeds(losses, factors)
        stream = bool(self.streaming) and not verify and self._usual_passes == len(self._passes) > 0
        with _partial():
            new = self._gradients.arena.take if stream else None
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
        trained = [p for p, parameter in enumerate(self._gradients.parameters) if parameter.requires_grad]
        combination = self._combination()
        stream = Stream(self._gradients, combination, [trained[i] for i in single.reached])
        single.run(seeds, retain_graph=retain_graph, complete=lambda i: stream.complete(trained[i]))
        stream.finish()
        self._finish(combination)
        self._streamed = True

    def _begin(
        self, values: Tensor, tasks: Iterable[int], scaler: torch.amp.GradScaler | None
    ) -> tuple[Tensor, list[Tensor], list[Rows]]:
        """What comes before a backward pass: the tasks' factors ``[K]``, and the parameters and rows that are trained."""
        tasks = list(tasks)
        present = torch.zeros_like(values, dtype=torch.bool).index_fill(0, self._index(tuple(tasks)), True)
        factors = torch.ones_like(values)
        if implements(self.rule, "weigh"):
            factors, self._rule_state = self.rule.weigh(values, self._rule_state, active=present)
        gradients = self._gradients
        if scaler is not None:
            self._scale = scaler.scale(torch.ones((), device=gradients.device))
            factors = factors * self._scale
        if not self.due:
            gradients.expect(tasks)
        self._passes.append((values, present))
        trained = [p for p, parameter in enumerate(gradients.parameters) if parameter.requires_grad]
        return factors, [gradients.parameters[p] for p in trained], [gradients.rows[p] for p in trained]

    @torch.no_grad()
    def combine(self) -> None:
        """Lets the rule operate on the rows, adds the result to ``p.grad``, and frees the rows.

        Does nothing if nothing is due. Call it yourself before anything that reads ``p.grad`` ahead of the step, such as
        ``clip_grad_norm_`` or ``GradScaler``.

        Raises:
            FloatingPointError: with ``nonfinite="raise"``, for a gradient that is inf or nan.
        """
        self._streamed = False
        if not self.due:
            return
        assert self._tasks is not None
        if self.nonfinite != "propagate":
            self._gradients.align()
            self._check_finite(self._tasks)
        combination = self._combination()
        combination.add()
        self._finish(combination)

    def _combination(self) -> Combination:
        assert self._tasks is not None
        return Combination(self._gradients, self.rule, self._tasks, self._rule_state, self._generator, self._scale)

    def _finish(self, combination: Combination) -> None:
        self._usual_passes = max(self._usual_passes, len(self._passes))
        losses, present = (torch.stack(values) for values in zip(*self._passes, strict=True))
        self.last, self._rule_state = combination.finish(losses.sum(0).masked_fill(~present.any(0), torch.nan))
        self._forget()
        if implements(self.rule, "observe"):
            self._rule_state = self.rule.observe(self.last, self._rule_state)

    # --- State ------------------------------------------------------------------------------------------------------

    @property
    def groups(self) -> Groups:
        """The surgery groups: name → names of the parameters. Prints as a table."""
        return self._gradients.groups

    @property
    def due(self) -> bool:
        """Whether there are gradients that have not been combined."""
        return bool(self._passes)

    @property
    def streaming(self) -> Streaming:
        """Whether surgery happens inside the backward pass of mixed batches (from the second step on), and if not, why."""
        why = "stream=False" if self._stream is False else self._why_not_streaming()
        return Streaming(not why, why)

    def _why_not_streaming(self) -> str:
        if len(self._gradients.groups) == 1:
            return "there is one surgery group, which is complete at the end of the backward pass"
        if not self.rule.separable:
            return f"{self.rule} needs all surgery groups at a time"
        if self.nonfinite != "propagate":
            return f"nonfinite={self.nonfinite!r} looks at all gradients of a task before any are combined"
        return ""

    @property
    def tasks(self) -> tuple[str, ...] | None:
        """Names of the tasks; None until they are known."""
        return self._tasks

    @property
    def rule_state(self) -> State:
        """What the rule remembers."""
        return self._rule_state

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and under ``"surgery"`` the rule's: its state, the random generator, and the names
        of tasks and groups. Gradients are not in it: save after a step."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = self.optimizer.state_dict()
        state["surgery"] = {
            **self._identity(),
            "state": self._rule_state,
            "generator": self._generator.get_state(),
            "skipped": dict(self.skipped),
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint, bit for bit.

        Raises:
            ValueError: if the checkpoint has another rule, other tasks or other groups, or is one of a plain optimizer.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else dict(replaced)
        surgery = state_dict.pop("surgery", None)
        if surgery is None:
            raise ValueError(
                "This is the checkpoint of a plain optimizer: it has no entry 'surgery'. To start surgery from it, load it "
                "with opt.optimizer.load_state_dict(...)."
            )
        check_match(surgery, self._identity())
        tasks = self._tasks if surgery["tasks"] is None else tuple(surgery["tasks"])
        state = None if tasks is None else self._fresh_state(tasks)
        if state is not None and surgery["tasks"] is not None:  # a checkpoint from before the first step has no tasks
            state = loaded(surgery["state"], state)
        self.optimizer.load_state_dict(state_dict)
        if tasks is not None and state is not None:
            self._set_tasks(tasks)
            self._rule_state = state
        self._generator.set_state(surgery["generator"].cpu())
        self.skipped = dict(surgery["skipped"])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Gradients are not saved; `step` may be a scheduler's wrapper that is bound to this very object.
        left_out = ("_gradients", "_indices", "step", "last")
        return {key: value for key, value in self.__dict__.items() if key not in left_out and "_hooks" not in key}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.last = None
        self._indices = {}
        self._gradients = TaskGradients(self.optimizer, self._model, self._spec)
        self._forget()

    def __repr__(self) -> str:
        tasks = "not known yet" if self._tasks is None else ", ".join(self._tasks)
        lines = [
            f"rule: {self.rule}",
            f"tasks: {tasks}",
            f"source: {self._source}",
            f"streaming: {'yes' if self.streaming else f'no, {self.streaming.why}'}",
            *f"groups:\n{self.groups!r}".replace("\n", "\n  ").split("\n"),
            *f"optimizer: {self.optimizer!r}".split("\n"),
        ]
        return "SurgeryOptimizer(\n  " + "\n  ".join(lines) + "\n)"

    def _identity(self) -> dict[str, Any]:
        return {
            "rule": repr(self.rule),
            "tasks": None if self._tasks is None else list(self._tasks),
            "groups": {group: list(names) for group, names in self.groups.items()},
        }

    def _set_tasks(self, tasks: Iterable[str]) -> None:
        names = tuple(tasks)
        if twice := sorted({repr(name) for name in names if names.count(name) > 1}):
            raise ValueError(f"`tasks` must be distinct. Found {', '.join(twice)} more than once.")
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"`tasks` must be names, at least one. Found {names!r}.")
        self._rule_state = self._fresh_state(names)
        self._tasks = names

    def _fresh_state(self, tasks: tuple[str, ...]) -> State:
        gradients = self._gradients
        return self.rule.init(tasks, tuple(gradients.groups), device=gradients.device, dtype=gradients.dtype)

    def _forget(self) -> None:
        self._gradients.clear()
        self._passes, self._scale, self._split = [], None, None

    @property
    def _per_task(self) -> Tensor:
        """Zeros, one for each task."""
        assert self._tasks is not None
        return torch.zeros(len(self._tasks), dtype=self._gradients.dtype, device=self._gradients.device)

    def _index(self, tasks: tuple[int, ...]) -> Tensor:
        if tasks not in self._indices:
            self._indices[tasks] = torch.tensor(tasks, device=self._gradients.device)
        return self._indices[tasks]

    def _check_finite(self, tasks: tuple[str, ...]) -> None:
        bad = self._gradients.not_finite()
        if bad and self.nonfinite == "raise":
            task, name = bad[0]
            raise FloatingPointError(
                f"The gradient of task {tasks[task]!r} for parameter {name!r} holds inf or nan"
                + (f", and so do {len(bad) - 1} more." if len(bad) > 1 else ".")
            )
        for task, name in dict(reversed(bad)).items():
            self._gradients.drop(task)
            self.skipped[tasks[task]] = self.skipped.get(tasks[task], 0) + 1
            _log.warning(
                "task %r sits out this step (%d so far): its gradient for %r holds inf or nan",
                *(tasks[task], self.skipped[tasks[task]], name),
            )
