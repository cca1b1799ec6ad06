"""The gradient reversal function of adversarial training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Reverse(torch.autograd.Function):
    """The identity, whose gradient is multiplied with ``-mu``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mu: float | Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float | Tensor], output: Tensor) -> None:
        ctx.mu = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * -ctx.mu, None


def reverse_gradient(x: Tensor, mu: float | Tensor = 1.0) -> Tensor:
    """The identity in the forward pass; in the backward pass, ``dL/dx = -mu dL/dy``.

    Between an encoder and a discriminator, it makes the encoder ascend what the discriminator descends. The rule
    :class:`Adversary` does the same to the rows of gradients, where other rules can see them.

    Args:
        x: ``[...]``, of any shape.
        mu: how strongly; a tensor of one element may change without a new graph being compiled.

    Returns:
        ``x``, ``[...]``.

    Example:
        >>> import torch, gradsurgery as gs
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gs.reverse_gradient(x, 0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])

    Reference:
        Ganin and Lempitsky, *Unsupervised Domain Adaptation by Backpropagation*, ICML 2015, Section 3.
    """
    result: Tensor = _Reverse.apply(x, mu)  # type: ignore[no-untyped-call]
    return result
