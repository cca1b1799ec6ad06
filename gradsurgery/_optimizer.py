"""The optimizer wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, overload

import torch
from torch import nn

from ._compile import is_compiled, left_out, prepare, say, uncompiled
from ._coordinates import AnyRule, CoordinateRule
from ._features import FeatureSpec
from ._gradients import TaskGradients
from ._groups import Groups, GroupSpec, unwrap
from ._losses import Losses
from ._mixed import MixedBatch, TaskIds
from ._ranks import ProcessGroup, ranks_of, source_for
from ._rule import Rule, State
from ._settings import check_settings
from ._snapshot import restore, snapshot
from ._state import carried
from ._step import Step
from ._stream import Streaming
from ._surgery import Surgery
from .sources._named import source_named

T = TypeVar("T")


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
        rule: what happens to the gradients, such as ``GradVac()`` or ``Chain(PCGrad(), Mean())``; or a
            :class:`CoordinateRule`, such as ``GradDrop()``.
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
        every: surgery at each ``every``-th step. In the steps between, the mixing that it found is reused by a single
            backward pass of weighted losses, with no rows, no Gram matrix and no call of the rule: :attr:`last`, the
            rule's weights of losses and its state stay as they are. Exact for one surgery group. With several, whose
            weights differ, one set of weights serves all: the one whose combined gradient was nearest to theirs.
        measure: compute each task's gradient also where the rule does not need it. With False, and a rule that weighs
            losses and does no more, or does nothing (``Sum``), a step is as cheap as plain training: one backward pass of
            the weighted losses. :attr:`last` then knows losses and weights only, and the weights of a step of several
            backward passes are those of its first.
        process_group: the data-parallel processes that train the model together; each task's gradient is then the mean over
            the samples of all of them, and all step alike. A process group of ``torch.distributed``; True for the default
            one; False for a process that trains by itself; None for that of the DistributedDataParallel that ``model`` is.
            Where parameters are sharded (FSDP2, tensor parallelism), all processes that hold a part; None for the default.
        reduce: what is added up over the processes: ``"rows"``, each task's gradients, exact; or ``"result"``, cheap: Gram
            matrices are estimated by the mean over the processes of those of their own rows.
        check_ranks: look after each step whether the rule's state, the random generator, parameters and gradients are equal
            on all processes. For debugging: it reads all of them.

    Attributes:
        optimizer: the optimizer inside.
        groups: the partition of the parameters; prints as a table.

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

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: AnyRule,
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
        every: int = 1,
        measure: bool = True,
        process_group: ProcessGroup = None,
        reduce: str = "rows",
        check_ranks: bool = False,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer. Found {type(optimizer).__name__}.")
        if isinstance(optimizer, SurgeryOptimizer):
            raise TypeError("`optimizer` is a SurgeryOptimizer already. To apply several rules, use Chain(rule, rule).")
        if not isinstance(rule, (Rule, CoordinateRule)):
            raise TypeError(f"`rule` must be a gradsurgery rule, such as PCGrad(). Found {rule!r}.")
        check_settings(rule, nonfinite=nonfinite, every=every, measure=measure, source=source)
        prepare()
        self.optimizer = optimizer
        self._compiled = model is not None and is_compiled(model)
        self._model = None if model is None else unwrap(model)
        self._wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
        self._spec = groups
        self._surgery = Surgery(
            TaskGradients(optimizer, self._model, groups),
            rule,
            source_for(model, source_named(source, chunk_size), every, measure),
            ranks_of(model, optimizer, process_group, reduce=reduce, check=check_ranks),
            nonfinite=nonfinite,
            seed=seed,
            verify=verify,
            stream=stream,
            every=every,
            measure=measure,
        )
        coordinates = self._surgery.coordinates
        if coordinates is not None and self.ranks > 1 and (coordinates.random or reduce == "result"):
            why = "its random numbers would be others on each" if coordinates.random else "reduce='result' has only sums"
            raise ValueError(f"{coordinates} cannot be used in {self.ranks} processes: {why}.")
        if tasks is not None:
            self._surgery.set_tasks(map(str, range(tasks)) if isinstance(tasks, int) else tasks)
        if stream and not self.streaming:
            raise ValueError(f"`stream` is True, but surgery cannot be streamed: {self.streaming.why}.")
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
        old, surgery = list(self.groups), self._surgery
        try:
            surgery.gradients = TaskGradients(self.optimizer, self._model, self._spec)
        except BaseException:
            self.optimizer.param_groups.pop()
            raise
        surgery.ranks.renew()
        if surgery.tasks is not None:
            surgery.state = carried(surgery.state, old, surgery.fresh_state(surgery.tasks), list(self.groups))

    @left_out
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets ``p.grad``, and forgets gradients that have not been combined."""
        self.optimizer.zero_grad(set_to_none)
        self._surgery.forget()
        self._surgery.ranks.reopen()

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
            self._surgery.ranks.reopen()
            return self.optimizer.step()

        def evaluate() -> Any:
            self._surgery.ranks.reopen()
            with torch.enable_grad():
                value = closure()
            self.combine()
            return value

        result = self.optimizer.step(evaluate)
        self._surgery.ranks.reopen()
        return result

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
            way of their own are repeated for each task, in the backward pass; there, nan in one task's samples may reach
            the gradients of others, and ``nonfinite`` name them too.
        """
        surgery = self._surgery
        if surgery.tasks is None:
            raise ValueError("split() needs to know the tasks: make the optimizer with tasks=[...], their names or number.")
        if surgery.ranks.why_not_split:
            raise ValueError(f"split() cannot be used: {surgery.ranks.why_not_split}.")
        if surgery.split is not None:
            raise ValueError(
                "split() again, before the losses of the last one were passed to backward(). Call backward(losses) after "
                "each split(), or zero_grad() to forget it."
            )
        surgery.split = MixedBatch(task_ids, surgery.tasks, reduction)
        if self._compiled:
            say(
                "Inside split(), compiled models run as they are: one backward pass for all tasks takes less than a "
                "compiled one for each."
            )
        try:
            with uncompiled():
                yield
        except BaseException:
            surgery.split = None
            raise

    @left_out
    def backward(
        self,
        losses: Losses,
        *,
        scaler: torch.amp.GradScaler | None = None,
        retain_graph: bool = False,
        samples: Mapping[str, float] | None = None,
        features: FeatureSpec | None = None,
    ) -> None:
        """Computes each task's gradients, and adds them to its rows.

        Args:
            losses: task → scalar loss; or one scalar loss per task, in order; or a 1-D tensor of them. A step may hold
                only some of the tasks; in a sequence, None marks the others. After :meth:`split`: a tensor ``[B]`` or
                ``[B, ...]`` of each sample's losses.
            scaler: a ``GradScaler``: the gradients are those of the scaled losses, while rules see them unscaled. Call
                :meth:`combine` before ``scaler.unscale_`` or ``scaler.step``. Losses scaled by hand,
                ``scaler.scale(loss)``, also work with rules for which a common factor makes no difference.
            retain_graph: keep the graph of the last loss too.
            samples: task → number of samples (or of tokens, or what its loss is the mean of), for a ``process_group``: what
                this process's loss counts among those of all. Without it, all processes on which the task is present count
                alike. Mixed batches are counted anyway. One process by itself has no use for it.
            features: the tensor, or tensors, through which the losses depend on the shared layers. The rule then sees the
                gradients *there*, ``[K, features.numel()]``, and :meth:`combine` sends the combined one through the shared
                layers: one backward pass, however many tasks there are. With ``MGDA`` this is MGDA-UB. For one surgery
                group, in one process.

        Raises:
            ValueError: without losses, and for a loss that is no scalar, has no graph, is of an unknown task, or reaches
                none of the parameters; after :meth:`split`, if samples of different tasks interact; for ``features`` that
                a loss does not depend on, or that do not part the parameters into those ahead of them and those past
                them; and if a step has passes with and without.
            RuntimeError: if the first single pass does not agree with a plain backward pass.

        Example:
            >>> import torch, gradsurgery as gs
            >>> model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ("trunk", "depth", "normal")})
            >>> opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.MGDA(), model=model)
            >>> z = model["trunk"](torch.randn(8, 3)).tanh()
            >>> opt.backward({task: model[task](z).square().mean() for task in ("depth", "normal")}, features=z)
            >>> opt.step()
            >>> opt.last.groups
            ('features',)

        Reference:
            Sener and Koltun, *Multi-Task Learning as Multi-Objective Optimization*, NeurIPS 2018, Section 3.3 (MGDA-UB).

        Note:
            An error in a backward pass, or a loss that reaches nothing, leaves some rows added to and others not: all
            gradients of the step are then forgotten. In steps without rows (with ``measure=False``, and between those of
            ``every``) some are in ``p.grad`` by then: call :meth:`zero_grad`.

            With ``features``, the graph of the shared layers stays in memory until :meth:`combine`: that of each pass, in a
            step of several. The rows of all passes are then side by side, and their Gram matrices add up. Parameters past
            the features that several tasks reach are combined with the same coefficients; a coordinate rule sees their own
            rows. Steps that need no Gram matrix (with ``measure=False``, or between those of ``every``) make no use of
            features.

            In a 1-D tensor, each task reaches whatever the tensor depends on, except directly behind ``torch.stack`` or
            ``torch.cat`` where the tasks are still apart. With heads of their own, pass a mapping.
        """
        self._surgery.backward(losses, scaler, retain_graph, samples, features)

    @left_out
    def joint_loss(
        self,
        losses: Losses,
        *,
        scaler: torch.amp.GradScaler | None = None,
        combine: bool = False,
        samples: Mapping[str, float] | None = None,
        features: FeatureSpec | None = None,
    ) -> torch.Tensor:
        """One loss for all tasks, for a loop that calls ``loss.backward()`` itself: it does what :meth:`backward` does.

        Whatever the loop multiplies the loss with before (one over the number of accumulated passes, a scaler's scale), the
        tasks' gradients are multiplied with. Further terms that are added to it reach ``p.grad`` past the rule.

        Args:
            losses: as for :meth:`backward`, after :meth:`split` too. Every forward pass has one joint loss.
            scaler: the ``GradScaler`` that will scale the loss, if any: rules see the gradients without its scale.
            combine: whether the backward pass ends with :meth:`combine`, for a loop that leaves no place for it. No more
                gradients may then come before the step.
            samples, features: as for :meth:`backward`.

        Returns:
            The sum of the tasks' losses, without their graphs.

        Raises:
            ValueError: as :meth:`backward`, now or in the backward pass.
            RuntimeError: in the backward pass, if it is the second, or if the step's gradients were combined before.

        Example:
            >>> import torch, gradsurgery as gs
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.PCGrad(), model=model)
            >>> x = torch.randn(8, 2)
            >>> loss = opt.joint_loss({"up": -model(x).mean(), "down": model(x).square().mean()})
            >>> (loss / 4).backward()
            >>> opt.step()
        """
        return self._surgery.joint_loss(losses, scaler, combine, samples, features)

    @left_out
    def combine(self) -> None:
        """Lets the rule operate on the rows, adds the result to ``p.grad``, and frees the rows.

        Does nothing if nothing is due. Call it yourself before anything that reads ``p.grad`` ahead of the step, such as
        ``clip_grad_norm_`` or ``GradScaler``.

        Raises:
            FloatingPointError: with ``nonfinite="raise"``, for a gradient that is inf or nan.
        """
        self._surgery.combine()

    # --- State ------------------------------------------------------------------------------------------------------

    @property
    def rule(self) -> AnyRule:
        """What happens to the gradients."""
        return self._surgery.given

    @property
    def groups(self) -> Groups:
        """The surgery groups: name → names of the parameters. Prints as a table."""
        return self._surgery.gradients.groups

    @property
    def tasks(self) -> tuple[str, ...] | None:
        """Names of the tasks; None until they are known."""
        return self._surgery.tasks

    @property
    def ranks(self) -> int:
        """How many processes train the model together, as ``process_group`` says."""
        return self._surgery.ranks.size

    @property
    def wrapped(self) -> bool:
        """Whether ``model`` is a DistributedDataParallel, whose own adding up of gradients is then off."""
        return self._wrapped

    @property
    def due(self) -> bool:
        """Whether there are gradients that have not been combined."""
        return self._surgery.due

    @property
    def last(self) -> Step | None:
        """What the last combination saw and did; None before the first."""
        return self._surgery.last

    @property
    def skipped(self) -> dict[str, int]:
        """How often each task sat out a step."""
        return self._surgery.skipped

    @property
    def streaming(self) -> Streaming:
        """Whether surgery happens inside the backward pass of mixed batches (from the second step on), and if not, why."""
        return self._surgery.streaming

    @property
    def rule_state(self) -> State:
        """What the rule remembers."""
        return self._surgery.state

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and under ``"surgery"`` the rule's: its state, the random generator, and the names
        of tasks and groups. Gradients are not in it: save after a step."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._surgery.settle()
        state = self.optimizer.state_dict()
        state["surgery"] = self.surgery_state()
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
        saved = state_dict.pop("surgery", None)
        self._surgery.settle()
        if saved is None:
            raise ValueError(
                "This is the checkpoint of a plain optimizer: it has no entry 'surgery'. To start surgery from it, load it "
                "with opt.optimizer.load_state_dict(...)."
            )
        self.load_surgery(saved, inner=state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def surgery_state(self) -> dict[str, Any]:
        """The part of :meth:`state_dict` that is not the inner optimizer's."""
        return snapshot(self._surgery)

    def load_surgery(self, saved: dict[str, Any], *, inner: dict[str, Any] | None = None) -> None:
        """Continues from what :meth:`surgery_state` returned, with the inner optimizer's state where that is given.

        Raises:
            ValueError: if it is of another rule, other tasks or other groups.
        """
        restore(self._surgery, saved, None if inner is None else partial(self.optimizer.load_state_dict, inner))

    def __getstate__(self) -> dict[str, Any]:
        # `step` may be a scheduler's wrapper that is bound to this very object.
        return {key: value for key, value in self.__dict__.items() if key != "step" and "_hooks" not in key}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._surgery.gradients = TaskGradients(self.optimizer, self._model, self._spec)
        self._surgery.forget()

    def __repr__(self) -> str:
        tasks = "not known yet" if self.tasks is None else ", ".join(self.tasks)
        lines = [
            f"rule: {self.rule}",
            f"tasks: {tasks}",
            f"source: {self._surgery.source}",
            f"streaming: {'yes' if self.streaming else f'no, {self.streaming.why}'}",
            *f"groups:\n{self.groups!r}".replace("\n", "\n  ").split("\n"),
            *f"optimizer: {self.optimizer!r}".split("\n"),
        ]
        return "SurgeryOptimizer(\n  " + "\n  ".join(lines) + "\n)"
