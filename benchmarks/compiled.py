"""Mixed batches and ``torch.compile``: one uncompiled pass for all tasks, or a compiled one for each."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch._dynamo
import torch._functorch.config

import gradsurgery as gs
from gradsurgery._bench.timing import Contender, interleaved

from .report import Figure, Options, overhead
from .split import Model, Sizes


def compiled(options: Options) -> list[Figure]:
    """A mixed batch under torch.compile: uncompiled inside split(), or compiled task by task."""
    figures = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that says what is measured here, and the compiler's own
        before, torch._functorch.config.donated_buffer = torch._functorch.config.donated_buffer, False
        try:
            for tasks in (2, 8):
                figures += _against_plain(Sizes.of(options, tasks), options)
        finally:
            torch._functorch.config.donated_buffer = before
    return figures


def _against_plain(sizes: Sizes, options: Options) -> list[Figure]:
    torch.manual_seed(options.seed)
    torch._dynamo.reset()
    model = Model(sizes)
    losses = torch.compile(model.losses, backend="aot_eager" if options.quick else "inductor")
    x, targets = torch.randint(sizes.symbols, (2, sizes.sequences, sizes.tokens))
    task_ids = torch.arange(sizes.sequences) * sizes.tasks // sizes.sequences

    def plain() -> None:
        losses(x, targets).mean().backward()

    def mixed(stance: str) -> Callable[[], None]:
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer = gs.SurgeryOptimizer(sgd, gs.GradVac(beta=0.01), model=model, groups="layer", tasks=sizes.tasks)

        def run() -> None:
            with optimizer.split(task_ids), torch.compiler.set_stance(stance):
                each = losses(x, targets)
            optimizer.backward(each)
            optimizer.combine()

        run()  # which compares with a plain backward pass
        return run

    runs = {"plain": plain, "uncompiled": mixed("force_eager"), "task by task": mixed("default")}
    contenders = {name: Contender(run, model.zero_grad) for name, run in runs.items()}
    times = interleaved(contenders, options.repeats, "compiled")
    return [
        overhead(f"compiled, K={sizes.tasks}, {how}, against plain compiled step", times[how], times["plain"])
        for how in ("uncompiled", "task by task")
    ]
