"""What several processes send each other in a step, counted, against plain data-parallel training."""

from __future__ import annotations

import multiprocessing as mp
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurgery as gs

from .report import Figure, Options

_TASKS = 8
_MIXED = "a mixed batch, streamed"


def wire(options: Options) -> list[Figure]:
    """Bytes that a rank sends in a step of 8 tasks, against DistributedDataParallel: counted, not timed."""
    width = 16 if options.quick else 512
    figures = []
    for ranks in (2,) if options.quick else (2, 4):
        for model in ("a head for each task", "all shared", _MIXED):
            plain, ours = measured(ranks, width, model)
            calls = ", ".join(f"{count} {name}" for name, count in sorted(ours.calls.items()))
            print(f"  {ranks} ranks, {model}: {calls}")
            name = f"bytes sent, K={_TASKS}, {ranks} ranks, {model}"
            target = f"<= {(_TASKS + 1) / 2}" if model == "a head for each task" and not options.quick else None
            figures.append(Figure(name, ours.sent, plain.sent, ours.sent / plain.sent, target=target, unit="B"))
    return figures


@dataclass
class Traffic:
    """What one rank sends.

    Attributes:
        sent: bytes, where each collective takes the least: rings.
        calls: how often each collective was called.
    """

    sent: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)


class Counting(TorchDispatchMode):
    """Counts the collectives that are called inside, by whomever."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.traffic = Traffic()
        self._ranks = ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_").removesuffix("_coalesced")
            first, others = args[0], (self._ranks - 1) / self._ranks
            tensors = first if isinstance(first, (list, tuple)) else [first]
            if name == "reduce_scatter_base":
                tensors = [args[1]]
            size = sum(_bytes(tensor) for tensor in tensors)
            self.traffic.calls[name] += 1
            self.traffic.sent += (2 if name == "allreduce" else 1) * others * size
        return func(*args, **(kwargs or {}))


def _bytes(tensor: Tensor | list[Tensor]) -> int:
    return sum(map(_bytes, tensor)) if isinstance(tensor, list) else tensor.numel() * tensor.element_size()


class Network(nn.Module):
    """A trunk, and a head for each task or one that gives all of their outputs."""

    def __init__(self, width: int, heads: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)
        )
        self.heads = nn.ModuleList(nn.Linear(width, 4 if heads else 4 * _TASKS) for _ in range(_TASKS if heads else 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Each task's loss."""
        features = self.trunk(x)
        outputs = [head(features) for head in self.heads]
        if len(outputs) == 1:  # what all tasks share, they all reach
            outputs = [outputs[0] + k for k in range(_TASKS)]
        return {str(k): (output.square() * (k + 1) + output).mean() for k, output in enumerate(outputs)}


def measured(ranks: int, width: int, model: str) -> tuple[Traffic, Traffic]:
    """What rank 0 sends in a step: with DistributedDataParallel, and with surgery."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = context.Pipe()
        store = str(Path(folder) / "store")
        workers = [
            context.Process(target=_rank, args=(rank, ranks, width, model, store, theirs), daemon=True)
            for rank in range(ranks)
        ]
        for worker in workers:
            worker.start()
        try:
            if not ours.poll(300):
                raise RuntimeError("The processes did not answer within five minutes.")
            found: tuple[Traffic, Traffic] = ours.recv()
        finally:
            for worker in workers:
                worker.join(20)
                worker.kill()
    return found


def _rank(rank: int, ranks: int, width: int, model: str, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    traffic = plain_step(rank, ranks, width, model), surgery_step(rank, ranks, width, model)
    if rank == 0:
        pipe.send(traffic)
    dist.barrier()
    dist.destroy_process_group()


def _new(width: int, model: str) -> nn.parallel.DistributedDataParallel:
    torch.manual_seed(0)
    return nn.parallel.DistributedDataParallel(Network(width, heads=model == "a head for each task"))


def _wide(width: int, model: str) -> int:
    return 2 * width if model == _MIXED else width  # enough for several parts


def plain_step(rank: int, ranks: int, width: int, model: str) -> Traffic:
    """A second step of DistributedDataParallel."""
    width = _wide(width, model)
    network = _new(width, model)
    for step in range(2):
        x = torch.randn(8, width, generator=torch.Generator().manual_seed(10 * step + rank))
        with Counting(ranks) as counting:
            losses: dict[str, Tensor] = network(x)
            torch.stack(list(losses.values())).sum().backward()
    return counting.traffic


def surgery_step(rank: int, ranks: int, width: int, model: str) -> Traffic:
    """A second step with surgery."""
    width = _wide(width, model)
    network = _new(width, model)
    sgd = torch.optim.SGD(network.parameters(), lr=0.01)
    opt = gs.SurgeryOptimizer(sgd, gs.GradVac(), model=network, groups="layer", tasks=_TASKS)
    for step in range(2):
        x = torch.randn(8, width, generator=torch.Generator().manual_seed(10 * step + rank))
        with Counting(ranks) as counting:
            if model == _MIXED:
                with opt.split(torch.arange(8) % _TASKS):
                    losses = network.module.heads[0](network.module.trunk(x)).square().mean(1)
                opt.backward(losses)
            else:
                opt.backward(network(x))
            opt.step()
        opt.zero_grad()
    return counting.traffic
