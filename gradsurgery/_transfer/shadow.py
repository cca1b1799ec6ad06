"""A target-only run beside the real one: the negative transfer gap, as training goes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._optimizer import SurgeryOptimizer


class GapRecord(NamedTuple):
    """One measurement of a :class:`Shadow`.

    Attributes:
        step: how many steps the shadow had taken.
        with_source: the risk of the model.
        target_only: the risk of the shadow.
    """

    step: int
    with_source: float
    target_only: float

    @property
    def gap(self) -> float:
        """Positive where the other tasks have done harm so far."""
        return self.with_source - self.target_only


class Shadow:
    r"""Trains a copy of the model on one task alone, beside the real training: what the model would be without the others.

    ``gap = R(model) - R(shadow)`` is then the negative transfer gap so far, on the same initial weights, batches, learning
    rates and dropout masks. It costs a copy of the model and of the optimizer's state, and one more forward and backward
    pass of the target's loss per step.

    Args:
        optimizer: of the real training, made with ``model=``; its inner optimizer is copied, with whatever it remembers.
        target: the task whose loss :meth:`step` is given; for messages, and to be checked where tasks are known.

    Attributes:
        model: the copy that is trained on the target alone.
        optimizer: the copy of the inner optimizer that steps it.
        target: the task.
        steps: how many steps it has taken.
        history: what :meth:`gap` has measured.

    Raises:
        TypeError: if ``optimizer`` is no SurgeryOptimizer.
        ValueError: if it was made without a model, trains with other processes, is LBFGS inside, or does not know the task.

    Example:
        >>> import torch, gradsurgery as gs
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.Sum(), model=model)
        >>> shadow, x = gs.Shadow(opt, target="up"), torch.ones(4, 2)
        >>> up = lambda model: (model(x) - 3).square().mean()
        >>> for _ in range(5):
        ...     shadow.step(up)  # ahead of the forward pass of the real step
        ...     opt.backward({"up": up(model), "down": (model(x) + 3).square().mean()})
        ...     opt.step(); opt.zero_grad()
        >>> shadow.gap(lambda model: up(model).item()) > 0  # "down" has done harm
        True

    Note:
        Dropout masks are the same where the forward pass that follows :meth:`step` is that of the same loss; in a forward
        pass of several tasks' samples at a time they are drawn alike, and differ. A GradScaler is not followed: the shadow
        trains in the precision of its loss. Parameter groups that are added later need a new shadow.
    """

    def __init__(self, optimizer: SurgeryOptimizer, *, target: str) -> None:
        if not isinstance(optimizer, SurgeryOptimizer):
            raise TypeError(f"`optimizer` must be a SurgeryOptimizer. Found {type(optimizer).__name__}.")
        model = optimizer._model
        if model is None:
            raise ValueError("A shadow copies the model: make the optimizer with model=.")
        if optimizer.ranks > 1:
            raise ValueError(f"A shadow trains by itself, and cannot follow a training on {optimizer.ranks} processes.")
        if isinstance(optimizer.optimizer, torch.optim.LBFGS):
            raise ValueError("A shadow needs an optimizer that steps without a closure. Found LBFGS.")
        if optimizer.tasks is not None and target not in optimizer.tasks:
            raise ValueError(f"`target` must be one of the tasks {list(optimizer.tasks)}. Found {target!r}.")
        self._main = model
        self._followed = optimizer
        self.target = target
        # Together, so that the copied optimizer holds the copied parameters. Gradients are not copied.
        memo: dict[int, Any] = {id(p.grad): None for p in model.parameters() if p.grad is not None}
        self.model: nn.Module = copy.deepcopy(model, memo)
        self.optimizer: torch.optim.Optimizer = copy.deepcopy(optimizer.optimizer, memo)
        self.optimizer.zero_grad()
        self.steps = 0
        self.history: list[GapRecord] = []

    def step(
        self,
        loss: Callable[[nn.Module], Tensor],
        *,
        before_step: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        """One step on the target's loss, ahead of the real forward pass of it: random numbers are put back.

        Args:
            loss: the model to be used → the target's loss on this batch, a scalar.
            before_step: gets the shadow between its backward pass and its step, for clipping.

        Raises:
            ValueError: for a loss that is no scalar with a graph of the shadow's parameters, and if the real optimizer has
                other parameter groups by now.
        """
        self._follow()
        own = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            with self._same_random_numbers(), torch.enable_grad():
                value = loss(self.model)
                if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                    found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(
                        f"The loss of {self.target!r} must be a scalar with a graph, of the model that is passed. "
                        f"Found {found}."
                    )
                if own:  # and no gradient reaches the real model, whatever the loss was computed with
                    value.backward(inputs=own)  # type: ignore[no-untyped-call]
            if all(parameter.grad is None for parameter in own):
                raise ValueError(
                    f"The loss of {self.target!r} reaches no parameter of the shadow: compute it with the model that is "
                    "passed, not with the real one."
                )
            if before_step is not None:
                before_step(self.model)
            self.optimizer.step()
        finally:  # after an error too, so that the next step has gradients of its own
            self.optimizer.zero_grad()
        self.steps += 1

    def gap(self, risk: Callable[[nn.Module], float]) -> float:
        """The negative transfer gap so far: ``risk(model) - risk(shadow)``, appended to :attr:`history`.

        Args:
            risk: model → risk on the target, such as a validation error. It is called on both, in evaluation mode, without
                gradients, with the same random numbers, which are put back.
        """
        found = []
        for model in (self._main, self.model):
            modes = [(module, module.training) for module in model.modules()]
            model.eval()
            try:
                with self._same_random_numbers(), torch.no_grad():
                    found.append(float(risk(model)))
            finally:
                for module, training in modes:
                    module.training = training
        self.history.append(GapRecord(self.steps, *found))
        return self.history[-1].gap

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the copies of model and optimizer, and the history."""
        return {
            "target": self.target,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "history": [tuple(record) for record in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint, bit for bit.

        Raises:
            ValueError: if it is of another target.
        """
        if state["target"] != self.target:
            raise ValueError(f"The checkpoint's shadow is of {state['target']!r}, this one is of {self.target!r}.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        self.history = [GapRecord(*record) for record in state["history"]]

    def __repr__(self) -> str:
        return f"Shadow(target={self.target!r}, {self.steps} steps, {len(self.history)} measurements)"

    def _follow(self) -> None:
        """Modes, frozen parameters, learning rates, and whatever else a scheduler sets, are those of the real training."""
        for module, our_module in zip(self._main.modules(), self.model.modules(), strict=True):
            our_module.training = module.training
        for parameter, our_parameter in zip(self._main.parameters(), self.model.parameters(), strict=True):
            our_parameter.requires_grad_(parameter.requires_grad)
        theirs, ours = self._followed.param_groups, self.optimizer.param_groups
        if [len(group["params"]) for group in theirs] != [len(group["params"]) for group in ours]:
            raise ValueError("The real optimizer has other parameter groups than the shadow. Make a new shadow.")
        for their, our in zip(theirs, ours, strict=True):
            for key, value in their.items():
                if key != "params":
                    our[key] = value.clone() if isinstance(value, Tensor) else copy.copy(value)

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        devices = {p.device for p in self.model.parameters() if p.device.type not in ("cpu", "meta")}
        kind = next(iter(devices)).type if devices else "cuda"
        indices = [device.index for device in devices]
        with torch.random.fork_rng(indices, device_type=kind):
            yield
