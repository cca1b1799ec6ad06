"""Surgery at the trunk's output against surgery at its parameters, on a Transformer encoder that many tasks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

import gradsurgery as gs
from gradsurgery._bench.timing import Contender, interleaved

from .report import Figure, Options, faster, overhead
from .step import Model, Sizes

TASKS = (4, 16)


class FeatureSteps:
    """Ways to make one step's gradients by MGDA. All see the same model and batch."""

    def __init__(self, sizes: Sizes, seed: int, rule: gs.Rule | None = None) -> None:
        torch.manual_seed(seed)
        self.model = Model(sizes)
        self.x = torch.randn(sizes.sequences, sizes.tokens, sizes.width)
        self.targets = torch.randint(sizes.labels, (sizes.tasks, sizes.sequences, sizes.tokens))
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.optimizer = gs.SurgeryOptimizer(sgd, gs.MGDA() if rule is None else rule, model=self.model)

    def plain(self) -> None:
        """One backward pass of the summed losses."""
        torch.stack(list(self.model.losses(self.model.features(self.x), self.targets).values())).sum().backward()

    def surgery(self, *, at_features: bool) -> None:
        """MGDA-UB, one pass through the trunk; or MGDA, one for each task."""
        z = self.model.features(self.x)
        self.optimizer.backward(self.model.losses(z, self.targets), features=z if at_features else None)
        self.optimizer.combine()


def features(options: Options) -> list[Figure]:
    """A step with ``features=``, MGDA-UB, against one without."""
    figures = []
    for tasks in TASKS:
        sizes = replace(Sizes.of(options), tasks=tasks)
        check(sizes, options.seed)
        steps = FeatureSteps(sizes, options.seed)
        ways: Mapping[str, Callable[[], object]] = {
            "features": lambda steps=steps: steps.surgery(at_features=True),
            "parameters": lambda steps=steps: steps.surgery(at_features=False),
            "plain": steps.plain,
        }
        contenders = {way: Contender(run, steps.optimizer.zero_grad) for way, run in ways.items()}
        times = interleaved(contenders, options.repeats, f"features, K={tasks}")
        figures += [
            faster(f"features=, MGDA, K={tasks}, against without", times["features"], times["parameters"]),
            overhead(f"features=, MGDA, K={tasks}, against plain step", times["features"], times["plain"]),
        ]
    return figures


def check(sizes: Sizes, seed: int) -> None:
    """The rule ``Sum`` has to give a plain step's gradients.

    Raises:
        AssertionError: if it does not.
    """
    steps = FeatureSteps(sizes, seed, gs.Sum())
    steps.plain()
    plain = {name: parameter.grad for name, parameter in steps.model.named_parameters()}
    steps.optimizer.zero_grad()
    steps.surgery(at_features=True)
    for name, parameter in steps.model.named_parameters():
        if not torch.allclose(parameter.grad, plain[name], rtol=1e-4, atol=1e-6):
            raise AssertionError(f"The gradient of {name} is not that of the sum of the losses.")
