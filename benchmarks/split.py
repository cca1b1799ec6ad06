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
from gradsurgery._bench.timing import Contender, interleaved

from .report import Figure, Options, faster, overhead


@dataclass(frozen=True)
class Sizes:
    """Of the model and the batch. As they are, the model has 5.27 million parameters."""

    tasks: int = 8
    sequences: int = 64
    tokens: int = 32
    width: int = 256
    layers: int = 4
    symbols: int = 4096

    @classmethod
    def of(cls, options: Options, tasks: int, sequences: int = 64) -> Sizes:
        """Those of the figures, or with a tiny model."""
        tiny = {"tokens": 4, "width": 16, "layers": 2, "symbols": 32} if options.quick else {}
        return cls(tasks, sequences, **tiny)


class Model(nn.Module):
    """Token embedding, learned positions, a Transformer encoder, and a linear layer to all symbols."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.symbols, sizes.width)
        self.positions = nn.Parameter(torch.randn(sizes.tokens, sizes.width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(sizes.width, 4, 4 * sizes.width, dropout=0.0, batch_first=True, norm_first=True)
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
        self.loss().backward()

    def loss(self) -> Tensor:
        """The mean over the batch."""
        return self._losses().mean()

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

    def apart_with_surgery(self) -> Callable[[], None]:
        """A function that makes a pass for each task, of its own sequences, and then surgery per layer."""
        optimizer = self._optimizer(gs.GradVac(beta=0.01))

        def run() -> None:
            for k, (x, targets) in enumerate(self._batches):
                optimizer.backward({str(k): self.model.losses(x, targets).mean()})
            optimizer.combine()

        return run

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


def split(options: Options) -> list[Figure]:
    """Single pass of a batch that mixes up to 100 tasks, and GradVac per layer, against plain and task-by-task training."""
    figures = _against_torchjd(Sizes.of(options, 8), options)
    figures += _against_apart(Sizes.of(options, 32), options)
    figures += _against_plain(Sizes.of(options, 100, 256), options)
    return figures


def check(sizes: Sizes, seed: int) -> None:
    """The rule ``Sum`` has to give the sum of the tasks' gradients, and where tasks are of one size, a plain step's.

    Raises:
        AssertionError: if it does not.
    """
    steps = Steps(sizes, seed)
    expected = [torch.zeros_like(parameter) for parameter in steps.parameters]
    for gradients in steps.gradients():
        torch._foreach_add_(expected, gradients)
    _check_close(steps, steps.single_pass(gs.Sum()), expected, "the sum of the tasks'")
    if sizes.sequences % sizes.tasks == 0:  # then it does not matter whose which sequence is
        plain = [sizes.tasks * gradient for gradient in torch.autograd.grad(steps.loss(), steps.parameters)]
        for at_random in (False, True):
            _check_close(steps, steps.single_pass(gs.Sum(), at_random=at_random), plain, "a plain step's")


def _check_close(steps: Steps, run: Callable[[], None], expected: list[Tensor], what: str) -> None:
    for _ in range(3):  # the second step streams, and the third one does so in memory that is there
        steps.zero_grad()
        run()
        for (name, parameter), gradient in zip(steps.model.named_parameters(), expected, strict=True):
            if parameter.grad is None or not (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm():
                raise AssertionError(f"The gradient of {name} is not {what}.")


def _against_torchjd(sizes: Sizes, options: Options) -> list[Figure]:
    """Against a plain step, and TorchJD."""
    check(sizes, options.seed)
    steps = Steps(sizes, options.seed)
    times = _times(
        steps,
        {
            "plain": steps.plain,
            "ours": steps.steady(),
            "at random": steps.steady(at_random=True),
            "torchjd": steps.torchjd,
            "torchjd, one loss at a time": lambda: steps.torchjd(at_a_time=1),
        },
        options,
    )
    label = _label(sizes)
    return [
        overhead(f"{label}, against plain step", times["ours"], times["plain"], 1.35),
        overhead(f"{label}, sequences in random order, against plain step", times["at random"], times["plain"]),
        faster(f"{label}, against TorchJD's", times["ours"], times["torchjd"], 5),
        faster(f"{label}, against TorchJD's, one loss at a time", times["ours"], times["torchjd, one loss at a time"]),
    ]


def _against_apart(sizes: Sizes, options: Options) -> list[Figure]:
    """Against a plain step, and one step for each task."""
    check(sizes, options.seed)
    steps = Steps(sizes, options.seed)
    times = _times(
        steps,
        {
            "plain": steps.plain,
            "ours": steps.steady(),
            "at random": steps.steady(at_random=True),
            "sum": steps.steady(gs.Sum()),
            "apart": steps.apart,
            "apart, with surgery": steps.apart_with_surgery(),
        },
        options,
    )
    label = _label(sizes)
    return [
        overhead(f"{label}, against plain step", times["ours"], times["plain"], 1.35),
        overhead(f"{label}, sequences in random order, against plain step", times["at random"], times["plain"]),
        overhead(f"{_label(sizes, 'rule Sum')}, against plain step", times["sum"], times["plain"]),
        faster(f"{label}, against the same from a pass for each task", times["ours"], times["apart, with surgery"], 2),
        faster(f"{label}, against a pass for each task without any rule", times["ours"], times["apart"]),
    ]


def _against_plain(sizes: Sizes, options: Options) -> list[Figure]:
    """Against a plain step."""
    check(sizes, options.seed)
    steps = Steps(sizes, options.seed)
    times = _times(steps, {"plain": steps.plain, "ours": steps.steady()}, options)
    return [overhead(f"{_label(sizes)}, against plain step", times["ours"], times["plain"], 1.6)]


def _times(steps: Steps, ways: Mapping[str, Callable[[], object]], options: Options) -> dict[str, list[float]]:
    contenders = {way: Contender(run, steps.zero_grad) for way, run in ways.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # some of TorchJD's use of vmap
        return interleaved(contenders, options.repeats, f"single pass, K={steps.tasks}")


def _label(sizes: Sizes, what: str = "GradVac per layer") -> str:
    return f"single pass, K={sizes.tasks}, {sizes.sequences} sequences, {what}"
