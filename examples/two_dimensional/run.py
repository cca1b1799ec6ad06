"""One rule's paths from all starts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch

import gradsurgery as gs

from .problem import STARTS, Losses

Path2D = list[tuple[float, float]]


def rules() -> dict[str, gs.Rule]:
    """All rules of the library that need no settings, by name."""
    found = {}
    for name in gs.__all__:
        kind = getattr(gs, name)
        if not (inspect.isclass(kind) and issubclass(kind, gs.Rule)) or kind in (gs.Rule, gs.Chain):
            continue
        needed = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
        if not needed:
            found[name] = kind()
    return found


def run(rule: gs.Rule, *, steps: int, lr: float, seed: int) -> list[Path2D]:
    """The paths of all starts, as some two hundred points each."""
    torch.set_num_threads(1)
    if type(rule).weigh is gs.Rule.weigh:
        return _run(rule, STARTS, steps, lr, seed)
    return [path for start in STARTS for path in _run(rule, [start], steps, lr, seed)]


def _run(rule: gs.Rule, starts: Sequence[tuple[float, float]], steps: int, lr: float, seed: int) -> list[Path2D]:
    points = [torch.nn.Parameter(torch.tensor(start, dtype=torch.float64)) for start in starts]
    opt = gs.SurgeryOptimizer(torch.optim.Adam(points, lr=lr), rule, groups="tensor", tasks=["L1", "L2"], seed=seed)
    paths: list[Path2D] = [[start] for start in starts]
    keep = max(1, steps // 200)
    for step in range(1, steps + 1):
        opt.backward(Losses.apply(*points))
        opt.step()
        opt.zero_grad()
        if step % keep == 0 or step == steps:
            for path, point in zip(paths, points, strict=True):
                path.append(tuple(point.tolist()))
    return paths
