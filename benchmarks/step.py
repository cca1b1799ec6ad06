"""A whole step to ``p.grad``, on a Transformer encoder that four tasks share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchjd.aggregation import GradVac
from torchjd.autojac import jac_to_grad, mtl_backward

import gradsurgery as gs
from gradsurgery._bench.timing import Contender, interleaved

from .report import Figure, Options, overhead


@dataclass(frozen=True)
class Sizes:
    """Of the model and the batch. As they are, the trunk has 4.74 million parameters."""

    width: int = 256
    hidden: int = 1024
    layers: int = 6
    tasks: int = 4
    labels: int = 32
    sequences: int = 16
    tokens: int = 32

    @classmethod
    def of(cls, options: Options) -> Sizes:
        """Those of the figures, or tiny ones."""
        return cls(width=16, hidden=32, layers=2, labels=4, sequences=2, tokens=4) if options.quick else cls()


class Model(nn.Module):
    """A shared Transformer encoder, and for each task a linear classifier of tokens."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(sizes.width, 4, sizes.hidden, dropout=0.0, batch_first=True)
            for _ in range(sizes.layers)
        )
        self.heads = nn.ModuleList(nn.Linear(sizes.width, sizes.labels) for _ in range(sizes.tasks))

    def features(self, x: Tensor) -> Tensor:
        """``[B, tokens, width]`` of the same shape."""
        for layer in self.layers:
            x = layer(x)
        return x

    def losses(self, features: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Of each task, given ``targets`` ``[K, B, tokens]``."""
        pairs = zip(self.heads, targets, strict=True)
        return {f"task{k}": functional.cross_entropy(head(features).mT, y) for k, (head, y) in enumerate(pairs)}


class Steps:
    """Ways to make one step's gradients. All see the same model and batch."""

    def __init__(self, sizes: Sizes, seed: int, rule: gs.Rule | None = None) -> None:
        torch.manual_seed(seed)
        self.model = Model(sizes)
        self.parameters = list(self.model.parameters())
        self.x = torch.randn(sizes.sequences, sizes.tokens, sizes.width)
        self.targets = torch.randint(sizes.labels, (sizes.tasks, sizes.sequences, sizes.tokens))
        sgd = torch.optim.SGD(self.parameters, lr=0.1)
        rule = gs.GradVac(beta=0.01) if rule is None else rule
        self.optimizer = gs.SurgeryOptimizer(sgd, rule, model=self.model, groups="layer")
        self._gradvacs = [GradVac(beta=0.01) for _ in range(sizes.layers)]

    def zero_grad(self) -> None:
        """What comes before each of them."""
        self.optimizer.zero_grad()

    def plain(self) -> None:
        """One backward pass of the summed losses."""
        torch.stack(list(self._losses().values())).sum().backward()

    def naive(self) -> list[tuple[Tensor | None, ...]]:
        """The loop that one writes to get each task's gradients, without any rule."""
        losses = list(self._losses().values())
        last = len(losses) - 1
        return [
            torch.autograd.grad(loss, self.parameters, retain_graph=k < last, allow_unused=True)
            for k, loss in enumerate(losses)
        ]

    def ours(self) -> None:
        """GradVac per layer."""
        self.optimizer.backward(self._losses())
        self.optimizer.combine()

    def torchjd(self, at_a_time: int | None = None) -> None:
        """GradVac per layer, by TorchJD's recipe for groups."""
        features = self.model.features(self.x)
        losses = list(self.model.losses(features, self.targets).values())
        mtl_backward(losses, features=features, parallel_chunk_size=at_a_time)
        for layer, gradvac in zip(self.model.layers, self._gradvacs, strict=True):
            jac_to_grad(layer.parameters(), gradvac, optimize_gramian_computation=True)

    def _losses(self) -> dict[str, Tensor]:
        return self.model.losses(self.model.features(self.x), self.targets)


def step(options: Options) -> list[Figure]:
    """Forward, backward and GradVac per layer, against nothing but the naive loop over ``torch.autograd.grad``."""
    sizes = Sizes.of(options)
    check(sizes, options.seed)
    steps = Steps(sizes, options.seed)
    ways: Mapping[str, Callable[[], object]] = {
        "ours": steps.ours,
        "naive": steps.naive,
        "plain": steps.plain,
        "torchjd": steps.torchjd,
        "torchjd, one loss at a time": lambda: steps.torchjd(at_a_time=1),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # some of TorchJD's use of vmap
        times = interleaved({way: Contender(run, steps.zero_grad) for way, run in ways.items()}, options.repeats, "step")
    label = f"step, K={sizes.tasks}, GradVac per layer, against"
    return [
        overhead(f"{label} naive loop without any rule", times["ours"], times["naive"], 1.10),
        overhead(f"{label} TorchJD's", times["ours"], times["torchjd"]),
        overhead(f"{label} TorchJD's, one loss at a time", times["ours"], times["torchjd, one loss at a time"]),
        overhead(f"{label} plain step", times["ours"], times["plain"]),
        overhead(f"naive loop, K={sizes.tasks}, against plain step", times["naive"], times["plain"]),
    ]


def check(sizes: Sizes, seed: int) -> None:
    """The rule ``Sum`` has to give the sum of the naive loop's gradients, and a plain step's.

    Raises:
        AssertionError: if it does not.
    """
    steps = Steps(sizes, seed, gs.Sum())
    naive = [sum(g for g in gradients if g is not None) for gradients in zip(*steps.naive(), strict=True)]
    steps.plain()
    plain = [parameter.grad for parameter in steps.parameters]
    for _ in range(2):  # the second step's rows have their place in a block
        steps.zero_grad()
        steps.ours()
        for name, parameter, *expected in zip(steps.model.state_dict(), steps.parameters, naive, plain, strict=True):
            for gradient in expected:
                if not torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6):
                    raise AssertionError(f"The gradient of {name} is not the sum of those of the losses.")
