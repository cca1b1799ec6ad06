"""FAMO: fast adaptive multi-task optimization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._rule import Rule, State
from ._weighing import adam, check_positive, fresh_adam, positive, softmax, who_is_there


@dataclass(frozen=True)
class FAMO(Rule):
    r"""Weighs the losses so that all of them fall at the same relative rate, which it learns from how they fell.

    With logits ``xi``, and ``z = softmax(xi)``, the weights are

    ``w_i = (z_i / L_i) / sum_j (z_j / L_j)``.

    After the step, with ``delta_i = log L_i(t) - log L_i(t+1)``, the logits descend along ``(dz/dxi)^T delta + decay xi``:
    tasks that fell more lose weight.

    Args:
        lr: learning rate of the logits.
        decay: weight decay of the logits, the paper's ``gamma``.

    State:
        ``"logits"``: ``[K]``; ``"adam"``: its moments, each ``[K]``; ``"log"``: ``[K]``, the log of each task's last loss;
        ``"seen"``: ``[K]``, the tasks that have one.

    Raises:
        ValueError: for settings out of range; when weighing negative losses, on the CPU.

    Example:
        >>> import torch, gradsurgery as gs
        >>> rule = gs.FAMO()
        >>> state = rule.init(["slow", "fast"], ["model"])
        >>> for losses in ([1.0, 1.0], [0.9, 0.5], [0.8, 0.2]):
        ...     weights, state = rule.weigh(torch.tensor(losses), state)
        >>> state["logits"]
        tensor([ 0.0499, -0.0499], dtype=torch.float64)

    Reference:
        Liu, Feng, Stone, Liu, *FAMO: Fast Adaptive Multitask Optimization*, NeurIPS 2023 (arXiv:2306.03792), Algorithm 1;
        Algorithm 2 (Appendix C) for Adam.

    Note:
        ``L_i(t+1)`` is the loss that the *next* step's forward pass gives anyway, as Algorithm 1 is written. The authors'
        code computes it once more on the batch of step ``t``, in a second forward pass, which takes the noise between two
        batches out of ``delta``; ours costs nothing, and that noise has mean zero. As in their code, the logits follow
        Adam, with the decay in its gradient (Algorithm 1 has plain descent). ``delta`` is taken over the tasks that are
        there, each since its own last step. A loss below ``1e-20`` counts as that.
    """

    scale_equivariant: ClassVar[bool] = True

    lr: float = 0.025
    decay: float = 1e-2

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        if not 0 <= self.decay < float("inf"):
            raise ValueError(f"`decay` must not be negative. Found decay={self.decay!r}.")

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        zeros = torch.zeros(len(tasks), device=device, dtype=dtype)
        return {
            "logits": zeros,
            "adam": fresh_adam(len(tasks), device, dtype),
            "log": zeros.clone(),
            "seen": torch.zeros(len(tasks), device=device, dtype=torch.bool),
        }

    def weigh(
        self, losses: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        there = who_is_there(losses, active)
        losses = positive(self, losses, there)
        log = losses.log().to(state["log"].dtype)
        known = there & state["seen"]
        z = softmax(state["logits"], known)
        delta = torch.where(known, state["log"] - log, 0.0)
        gradient = z * (delta - (z * delta).sum())
        logits, moments = adam(state["logits"], gradient, state["adam"], known, self.lr, decay=self.decay)
        shares = softmax(logits, there) / losses
        weights = shares / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)
        new = {
            "logits": logits,
            "adam": moments,
            "log": torch.where(there, log, state["log"]),
            "seen": state["seen"] | there,
        }
        return torch.where(there, weights, 1.0).to(losses.dtype), new
