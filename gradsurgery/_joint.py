"""One loss that stands for those of all tasks, for training loops that call ``backward`` themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def joint_loss(value: Tensor, run: Callable[[Tensor], None]) -> Tensor:
    """A scalar whose backward pass is ``run``.

    Args:
        value: of the scalar.
        run: called once, with the gradient ``[]`` that arrives at the scalar: the product of all that a training loop
            multiplied it with.
    """
    # The losses' own graphs hang on `run`, not on the scalar: the engine does not walk through them, `run` does.
    hook = torch.zeros((), device=value.device, requires_grad=True)
    with torch.enable_grad():
        joint: Tensor = _Joint.apply(hook, value, run)  # type: ignore[no-untyped-call]
    return joint


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hook: Tensor, value: Tensor, run: Callable[[Tensor], None]) -> Tensor:
        ctx.run = run
        return value.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        run, ctx.run = ctx.run, None  # which frees the losses' graphs, whoever keeps the scalar
        if run is None:
            raise RuntimeError("backward() through a joint loss for the second time. Make a new one from new losses.")
        with torch.enable_grad():
            run(gradient)
        return None, None, None
