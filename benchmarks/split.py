"""A whole step to ``p.grad`` on a batch that mixes the sequences of many tasks: the single pass.

The model is a Transformer that predicts a token at each position; each sequence belongs to one task.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchjd.aggregation import GradVac
from torchjd.autojac import backward, jac_to_grad

import gradsurgery as gs

from .report import Figure, Options, faster, overhead
from .timing import Contender, interleaved


@dataclass(frozen=True)
class Sizes:
    """Of the model and the batch. As they are, the model has 5.27 million parameters."""

    tasks: int = 8
    sequences: int = 64
    tokens: int = 32
    width: int = 256
    layers: int = 4
    symbols: int = 4096


class Model(nn.Module):
    """Token embedding, learned positions, a Transformer encoder, and a linear layer to all symbols."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.symbols, sizes.width)
        self.positions = nn.Parameter(torch.randn(sizes.tokens, sizes.width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                sizes.width, 4, 4 * sizes.width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(sizes.layers)
        )
        self.norm = nn.LayerNorm(sizes.width)
        self.output = nn.Linear(sizes.width, sizes.symbols, bias=False)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Of each token, ``[B, tokens]``, as are both arguments."""
        features = self.embedding(x) + self.positions
        for layer in self.layers:
            features = layer(features)
        logits = self.output(self.norm(features))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


class Steps:
    """Ways to make one step's gradients. All see the same model and batch."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Model(sizes)
        self.parameters = list(self.model.parameters())
        self.x, self.targets = torch.randint(sizes.symbols, (2, sizes.sequences, sizes.tokens))
        self.tasks = sizes.tasks
        self.in_order = torch.arange(sizes.sequences) * sizes.tasks // sizes.sequences
        self.at_random = self.in_order[torch.randperm(sizes.sequences)]
        groups = self._optimizer(gs.Sum()).groups
        self._groups = [([self.model.get_parameter(n) for n in names], GradVac(beta=0.01)) for names in groups.values()]
        self._batches = [(self.x[self.in_order == k], self.targets[self.in_order == k]) for k in range(sizes.tasks)]

    def zero_grad(self) -> None:
        """What comes before each of them."""
        self.model.zero_grad()

    def plain(self) -> None:
        """One backward pass of the mean loss."""
        self._losses().mean().backward()

    def single_pass(
        self, rule: gs.Rule | None = None, *, at_random: bool = False, stream: bool | None = None
    ) -> Callable[[], None]:
        """A function that makes the single pass, and surgery per layer, with an optimizer of its own.

        Args:
            rule: GradVac by default.
            at_random: whether the tasks' sequences are all over the batch, instead of one task after the other.
            stream: the optimizer's.
        """
        optimizer = self._optimizer(gs.GradVac(beta=0.01) if rule is None else rule, stream)
        task_ids = self.at_random if at_random else self.in_order

        def run() -> None:
            with optimizer.split(task_ids):
                losses = self._losses()
            optimizer.backward(losses)
            optimizer.combine()

        return run

    def steady(self, rule: gs.Rule | None = None, *, at_random: bool = False) -> Callable[[], None]:
        """The same, as it is after two steps.

        The first one compares with a plain backward pass, and shows that a step has one; the second streams, and shows how
        much memory that takes.
        """
        run = self.single_pass(rule, at_random=at_random)
        for _ in range(2):
            self.zero_grad()
            run()
        return run

    def apart(self) -> list[tuple[Tensor, ...]]:
        """Each task's gradients, from a forward and a backward pass of its own sequences, without any rule."""
        return list(self.gradients())

    def gradients(self) -> Iterator[tuple[Tensor, ...]]:
        """What :meth:`apart` collects, one task after the other."""
        for x, targets in self._batches:
            yield torch.autograd.grad(self.model.losses(x, targets).mean(), self.parameters)

    def torchjd(self, at_a_time: int | None = None) -> None:
        """GradVac per layer, by TorchJD's recipe for groups. Tasks must have equally many sequences."""
        losses = self._losses().view(self.tasks, -1).mean(1)
        backward(list(losses), parallel_chunk_size=at_a_time)
        for parameters, gradvac in self._groups:
            jac_to_grad(parameters, gradvac, optimize_gramian_computation=True)

    def _losses(self) -> Tensor:
        return self.model.losses(self.x, self.targets)

    def _optimizer(self, rule: gs.Rule, stream: bool | None = None) -> gs.SurgeryOptimizer:
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return gs.SurgeryOptimizer(sgd, rule, model=self.model, groups="layer", tasks=self.tasks, stream=stream)
