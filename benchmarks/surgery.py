"""Surgery alone: Gram matrices, rule and combination, on gradients that are there already.

The floor is what nothing can be faster than that looks at each row twice: two reads of all rows. Beside them the first
floor writes as much as was read once, and the second one combined gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery._bench.timing import Contender, interleaved

from .report import Figure, Options, overhead


class Surgery:
    """An optimizer whose rows can be filled without a backward pass, and the floors on memory of the same sizes."""

    def __init__(self, tasks: int, width: int, hidden: int, layers: int, seed: int) -> None:
        torch.manual_seed(seed)
        small = [width] * 5 + [hidden]
        layer = [(width, width)] * 4 + [(width, hidden)] * 2 + [(size,) for size in small]
        shapes = [layer] * layers + [[(width, width)] * 2]
        self._parameters = [nn.Parameter(torch.zeros(shape)) for group in shapes for shape in group]
        named = [
            (f"{g}.{i}", parameter)
            for (g, i), parameter in zip(
                [(g, i) for g, group in enumerate(shapes) for i in range(len(group))], self._parameters, strict=True
            )
        ]
        groups = {f"layer{g}": [f"{g}.*"] for g in range(len(shapes))}
        names = [f"task{k}" for k in range(tasks)]
        sgd = torch.optim.SGD(named, lr=0.1)
        self._optimizer = gs.SurgeryOptimizer(sgd, gs.GradVac(beta=0.01), groups=groups, tasks=names)
        self._tasks = tuple(range(tasks))
        self._blocks = [torch.randn(tasks, *parameter.shape) for parameter in self._parameters]
        self._written = [torch.empty_like(block) for block in self._blocks]
        self._present = torch.zeros(tasks, dtype=torch.float64), torch.ones(tasks, dtype=torch.bool)

    @property
    def size(self) -> int:
        """How many parameters there are."""
        return sum(parameter.numel() for parameter in self._parameters)

    def fill(self, fresh: bool) -> None:
        """What a source does, for nothing: each parameter's rows, in one block."""
        self._optimizer.zero_grad(set_to_none=fresh)
        for rows, block in zip(self._optimizer._surgery.gradients.rows, self._blocks, strict=True):
            rows.add_block(self._tasks, block)
        self._optimizer._surgery.passes.append(self._present)

    def operate(self) -> None:
        """What is timed."""
        self._optimizer.combine()

    def floor(self) -> None:
        """Two reads and one write of all rows."""
        self._read()
        for block in self._written:
            block.fill_(1.0)

    def strict_floor(self) -> None:
        """Two reads of all rows, and one write of the combined gradient."""
        self._read()
        for block in self._written:
            block[0].fill_(1.0)

    def check(self) -> None:
        """A rule that does nothing has to give the sum of the rows, in both variants.

        Raises:
            AssertionError: if it does not.
        """
        rule, self._optimizer._surgery.rule = self._optimizer.rule, gs.Sum()
        for fresh in (True, False):
            self.fill(fresh)
            self.operate()
            for parameter, block in zip(self._parameters, self._blocks, strict=True):
                gradient: Tensor | None = parameter.grad
                if gradient is None or not torch.allclose(gradient, block.sum(0), rtol=1e-4, atol=1e-5):
                    raise AssertionError("The combined gradient is not the sum of the rows.")
        self._optimizer._surgery.rule = rule

    def _read(self) -> None:
        for _ in range(2):
            for block in self._blocks:
                block.sum()


def surgery(options: Options) -> list[Figure]:
    """Eight tasks, five million parameters, GradVac per layer, against two reads and one write of the rows."""
    made = Surgery(3, 8, 16, 2, options.seed) if options.quick else Surgery(8, 256, 1024, 6, options.seed)
    made.check()
    contenders = {
        "steady": Contender(made.operate, lambda: made.fill(fresh=False)),
        "fresh": Contender(made.operate, lambda: made.fill(fresh=True)),
        "floor": Contender(made.floor, _nothing),
        "strict": Contender(made.strict_floor, _nothing),
    }
    times = interleaved(contenders, options.repeats, "surgery alone")
    label = f"surgery alone, K={len(made._tasks)} D={made.size / 1e6:.1f}M"
    floor, strict = "2 reads + 1 write of the rows", "2 reads of the rows + 1 write of p.grad"
    return [
        overhead(f"{label}, p.grad kept, against {floor}", times["steady"], times["floor"], 2),
        overhead(f"{label}, p.grad fresh, against {floor}", times["fresh"], times["floor"], 2),
        overhead(f"{label}, p.grad kept, against {strict}", times["steady"], times["strict"]),
        overhead(f"{label}, p.grad fresh, against {strict}", times["fresh"], times["strict"]),
    ]


def _nothing() -> None:
    """So that one sample is one call, as with the others."""
