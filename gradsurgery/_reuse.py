"""Steps without surgery: one backward pass of weighted losses, by the last mixing or by a rule that weighs losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._gradients import TaskGradients, apart
from ._rule import Rule, State, implements
from ._state import guarded
from ._step import Step

_RIDGE = 1e-3


class Weighed(NamedTuple):
    """Losses that were weighed ahead of backward passes.

    Attributes:
        losses: ``[K]``, of the step so far; zero for tasks that are not there.
        present: ``[K]``, the tasks that are there.
        weights: ``[K]``; None if the rule weighs none.
        state: the rule's new one.
    """

    losses: Tensor
    present: Tensor
    weights: Tensor | None
    state: State


class Reuse:
    """Surgery at every ``n``-th step, and what it found for those in between; or no surgery at all.

    Args:
        every: ``n``; 0 if there is none, and the weights are set for each step.

    Attributes:
        steps: how many steps there have been.
        weights: of the tasks' losses in between, ``[K]``, for shared parameters.
        own: the weights for parameters of one task alone, ``[K]``: the rule's weights of losses.
        shared: names of the shared parameters.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.steps = 0
        self.weights = self.own = torch.empty(0)
        self.shared: frozenset[str] = frozenset()
        self.forget()

    def forget(self) -> None:
        """Forgets everything about the step that is under way."""
        self._weighed: Weighed | None = None

    @property
    def rests(self) -> bool:
        """Whether the step that comes is one backward pass of weighted losses."""
        return not self.every or (len(self.weights) > 0 and self.steps % self.every != 0)

    def learn(self, step: Step, gradients: TaskGradients, shared: Sequence[int]) -> None:
        """Takes over the weights that a step with surgery found.

        One that is not finite, which a ``GradScaler`` skips, finds none: those from before stay, or there is the plain sum.
        """
        if self.every > 1:
            weights, own = nearest_weights(step), torch.ones_like(step.losses)
            if step.loss_weights is not None:
                own, weights = step.loss_weights, weights * step.loss_weights
            fine = step.gram.isfinite().all() & weights.isfinite().all() & own.isfinite().all()
            known = len(self.weights) > 0
            self.weights = torch.where(fine, weights, self.weights if known else 1.0)
            self.own = torch.where(fine, own, self.own if known else 1.0)
            self.shared = frozenset(gradients.names[p] for p in shared)

    def gradients(
        self,
        outputs: Sequence[Any],
        own: Sequence[Tensor],
        weighted: Sequence[Tensor],
        gradients: TaskGradients,
        retain_graph: bool,
        add: Callable[[int, Tensor], None],
    ) -> None:
        """Hands ``add`` each gradient: from weighted seeds for shared parameters, from the others for those of one task."""
        trained = gradients.trained
        shared = [p for p in trained if gradients.names[p] in self.shared]
        alone = [p for p in trained if gradients.names[p] not in self.shared]
        for chosen, starts, keep in ((alone, own, bool(shared) or retain_graph), (shared, weighted, retain_graph)):
            if chosen and outputs:
                parameters = [gradients.parameters[p] for p in chosen]
                found = torch.autograd.grad(outputs, parameters, starts, retain_graph=keep, allow_unused=True)
                for p, gradient in zip(chosen, apart(found, starts), strict=True):
                    if gradient is not None:
                        add(p, gradient)

    def weigh(self, rule: Rule, losses: Tensor, present: Tensor, state: State, generator: torch.Generator) -> None:
        """Weighs losses ahead of a backward pass: in a step's first one, for all of the step.

        Args:
            rule: what weighs them; without surgery it is all that a rule does.
            losses: ``[K]``, of the pass.
            present: ``[K]``, the tasks that are there.
            state: the rule's.
            generator: that it draws from.
        """
        before = self._weighed
        if before is not None:
            self._weighed = before._replace(losses=before.losses + losses, present=before.present | present)
            return
        weights = None
        if implements(rule, "weigh"):
            weights, state = rule.weigh(losses, state, active=present, generator=generator)
        self.weights = self.own = torch.ones_like(losses) if weights is None else weights
        self._weighed = Weighed(losses, present, weights, state)

    def finish(self, gradients: TaskGradients, tasks: tuple[str, ...], state: State) -> tuple[State, Step | None]:
        """Ends a step without surgery.

        Args:
            gradients: whose ``p.grad`` are complete.
            tasks: names of the tasks.
            state: the rule's.

        Returns:
            The rule's new state, which is the old one where a gradient or a loss is not finite, and what is known of the
            step: its losses and their weights, if they were weighed ahead.
        """
        self.steps += 1
        if self._weighed is None:
            return state, None
        losses, present, weights, new = self._weighed
        if state:
            found = [parameter.grad for parameter in gradients.parameters if parameter.grad is not None]
            values = [losses, *(gradient._values() if gradient.is_sparse else gradient for gradient in found)]
            finite = [value.isfinite().all().to(gradients.device) for value in values]
            state = guarded(finite, old=state, new=new)
        none = losses.new_zeros(0, len(tasks), len(tasks))
        return state, Step(tasks, (), none[:, 0].bool(), none, none, losses.masked_fill(~present, torch.nan), weights)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"steps": self.steps, "weights": self.weights, "own": self.own, "shared": sorted(self.shared)}

    def load_state_dict(self, state: dict[str, Any], gradients: TaskGradients) -> None:
        """Continues from a checkpoint; afresh from one that has nothing of it."""
        self.steps = state.get("steps", 0)
        saved = state.get("weights")
        self.weights = (torch.empty(0) if saved is None else saved).to(gradients.device, gradients.dtype)
        self.own = state.get("own", torch.ones_like(self.weights)).to(self.weights)
        self.shared = frozenset(state.get("shared", ()))


def nearest_weights(step: Step) -> Tensor:
    """The task weights ``[K]`` whose combined gradient is nearest to what surgery made of all groups together.

    With one group these are the column sums of its mixing matrix, exactly. With several, whose column sums ``c_g`` differ,
    ``w`` minimises ``sum_g || sum_k (w_k - c_gk) g_gk ||^2``, which the Gram matrices are enough for:
    ``(sum_g G_g) w = sum_g G_g c_g``, slightly drawn to the mean of the ``c_g``. A task that was absent has weight one.
    """
    columns = torch.where(step.active, (step.mixing * step.active[:, :, None]).sum(-2), torch.zeros_like(step.losses))
    there = step.active.any(0)
    if len(columns) > 1:
        mean = columns.sum(0) / step.active.sum(0).clamp_min(1)
        gram = step.gram.sum(0)
        ridge = _RIDGE * gram.diagonal().clamp_min(0) + torch.finfo(gram.dtype).tiny ** 0.5
        right = (step.gram @ columns[..., None]).sum(0).squeeze(-1) + ridge * mean
        columns = torch.linalg.solve_ex(gram + torch.diag(ridge), right[:, None]).result.mT
    return torch.where(there, columns.sum(0), torch.ones_like(step.losses))
