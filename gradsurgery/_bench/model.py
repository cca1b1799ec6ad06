"""What is measured: the user's model, or a built-in one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._mixed import TaskIds

CONTRACT = """\
--model names a function without arguments that returns
  (model, losses)            losses(): task -> scalar loss, from a forward pass of its own; or
  (model, losses, mixed)     mixed: (samples, task_ids), for the source 'split': samples() -> the losses [B] of a
                             batch that mixes tasks, and task_ids [B] says which sample is whose."""


@dataclass(frozen=True, eq=False)
class Workload:
    """A model and its losses.

    Attributes:
        model: what is trained.
        losses: task → scalar loss.
        samples: losses ``[B]`` of a mixed batch, or None.
        task_ids: ``[B]``.
    """

    model: nn.Module
    losses: Callable[[], Mapping[str, Tensor]]
    samples: Callable[[], Tensor] | None = None
    task_ids: TaskIds = ()

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.losses())

    @property
    def size(self) -> int:
        """How many parameters are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def workload(name: str | None, sizes: Mapping[str, int], seed: int) -> Workload:
    """The user's, ``"package.module:factory"``, or the built-in one of these sizes.

    Raises:
        ValueError: if the name does not lead to a function, or that returns something else.
    """
    torch.manual_seed(seed)
    if name is None:
        return built_in(**sizes)
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"--model must be package.module:factory. Found {name!r}.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {name}: {error}.") from error
    finally:
        sys.path.pop(0)
    return _checked(name, factory())


def _checked(name: str, made: Any) -> Workload:
    fits = isinstance(made, Sequence) and len(made) in (2, 3) and isinstance(made[0], nn.Module) and callable(made[1])
    if not fits:
        raise ValueError(f"{name}() returned {type(made).__name__}. {CONTRACT}")
    if not isinstance(made[1](), Mapping):
        raise ValueError(f"{name}(): losses() returned no mapping. {CONTRACT}")
    return Workload(made[0], made[1], *(made[2] if len(made) == 3 else ()))


class Encoder(nn.Module):
    """A Transformer encoder of tokens, which predicts the next one; all parameters are shared."""

    def __init__(self, width: int, layers: int, symbols: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, tokens]`` → logits ``[B, symbols, tokens]``."""
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden).mT
        return logits


def built_in(tasks: int = 8, width: int = 128, layers: int = 4, sequences: int = 32, tokens: int = 32) -> Workload:
    """A Transformer whose batch mixes sequences of several tasks: alone, or as one loss for each task."""
    symbols = 512
    model = Encoder(width, layers, symbols)
    x, y = torch.randint(symbols, (2, sequences, tokens))
    task_ids = torch.arange(sequences) % tasks

    def samples() -> Tensor:
        return nn.functional.cross_entropy(model(x), y, reduction="none").mean(1)

    def losses() -> dict[str, Tensor]:
        each = samples()
        return {f"task{k}": each[task_ids == k].mean() for k in range(tasks)}

    return Workload(model, losses, samples, task_ids)
