"""Steps without surgery: the last mixing, reused by one weighted backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._gradients import TaskGradients, apart
from ._step import Step

_RIDGE = 1e-3


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

    @property
    def rests(self) -> bool:
        """Whether the step that comes is one backward pass of weighted losses."""
        return not self.every or (len(self.weights) > 0 and self.steps % self.every != 0)

    def learn(self, step: Step, gradients: TaskGradients, shared: Sequence[int]) -> None:
        """Takes over the weights that a step with surgery found."""
        if self.every > 1:
            self.weights = nearest_weights(step)
            self.own = torch.ones_like(self.weights)
            if step.loss_weights is not None:
                self.own, self.weights = step.loss_weights, self.weights * step.loss_weights
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
        trained = [p for p, parameter in enumerate(gradients.parameters) if parameter.requires_grad]
        shared = [p for p in trained if gradients.names[p] in self.shared]
        alone = [p for p in trained if gradients.names[p] not in self.shared]
        for chosen, starts, keep in ((alone, own, bool(shared) or retain_graph), (shared, weighted, retain_graph)):
            if chosen:
                parameters = [gradients.parameters[p] for p in chosen]
                found = torch.autograd.grad(outputs, parameters, starts, retain_graph=keep, allow_unused=True)
                for p, gradient in zip(chosen, apart(found, starts), strict=True):
                    if gradient is not None:
                        add(p, gradient)

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
