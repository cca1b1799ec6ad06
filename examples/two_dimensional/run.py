"""One rule's paths from all starts.

A step here is what a :class:`gradsurgery.SurgeryOptimizer` does, on the rule's contract alone: of each start, both tasks'
gradients and their Gram matrix; the rule's mixing matrices; the combined gradients; Adam. A wrapper that finds its way
around any model takes a millisecond or so to prepare a step, which is nothing beside a backward pass, and five times the
rule here, where the model is two numbers. The tests compare each rule's paths with those of a wrapper for each start.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradsurgery as gs

from .problem import STARTS, Pair, by_hand

TASKS = ("L1", "L2")
STILL, WINDOW = 1e-6, 1000  # a point rests if it has moved by no more than this, for so many steps


@dataclass
class Path2D:
    """The way from one start.

    Attributes:
        points: on the way, a few hundred, with start and end.
        steps: how many were taken.
        rests: the step since which it has not moved by more than 1e-6; None if it moved in the last thousand.
    """

    points: list[Pair] = field(default_factory=list)
    steps: int = 0
    rests: int | None = None

    @property
    def end(self) -> Pair:
        """The last point."""
        return self.points[-1]


def rules() -> dict[str, gs.Rule]:
    """All rules of the library that need no settings, by name, without those that only look on."""
    found = {}
    for name in gs.__all__:
        kind = getattr(gs, name)
        if not (inspect.isclass(kind) and issubclass(kind, gs.Rule)) or kind in (gs.Rule, gs.Chain):
            continue
        needed = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
        changes = kind.weigh is not gs.Rule.weigh or kind.mix is not gs.Rule.mix
        looks_on = kind.observe is not gs.Rule.observe and not changes
        if not needed and not looks_on:
            found[name] = kind()
    return found


def batched(rule: gs.Rule) -> bool:
    """Whether starts can be surgery groups of one run, because the rule keeps groups apart.

    Gram matrices have a group's dimension, losses and their weights have none; nor does what ``observe`` sees of losses.
    Random rules draw for each group, so that each start has numbers of its own.
    """
    kind = type(rule)
    return rule.separable and kind.weigh is gs.Rule.weigh and kind.observe is gs.Rule.observe


class _Part(NamedTuple):
    """Starts that the rule operates on in one call, and what it remembers of them."""

    starts: slice
    state: gs.State
    generator: torch.Generator


class Result(NamedTuple):
    """A rule's paths, or why it refuses; and the seconds of a core that it took."""

    paths: list[Path2D]
    refused: str | None
    seconds: float


def attempt(rule: gs.Rule, **settings: Any) -> Result:
    """As :func:`run`, for a rule that may refuse: some need positive losses, which these are not everywhere."""
    started = time.process_time()
    try:
        return Result(run(rule, **settings), None, time.process_time() - started)
    except ValueError as error:
        return Result([], str(error), time.process_time() - started)


@torch.no_grad()
def run(
    rule: gs.Rule,
    starts: Sequence[Pair] = STARTS,
    *,
    steps: int,
    lr: float = 1e-3,
    seed: int = 0,
    scale: float = 1.0,
    still: float = STILL,
) -> list[Path2D]:
    """The paths from all starts, by Adam, until all of them rest.

    Args:
        rule: what operates on the gradients.
        starts: the ``G`` starts.
        steps: at most so many.
        lr: Adam's learning rate.
        seed: of a random rule's generator; where starts cannot be batched, each has a generator of this seed.
        scale: of the first loss.
        still: how far a point may move within a thousand steps and be at rest; 0 never stops early.

    Raises:
        ValueError: if the rule cannot do with the losses, which are negative in places.
    """
    torch.set_num_threads(1)
    x = torch.nn.Parameter(torch.tensor(starts, dtype=torch.float64))  # [G, 2]
    adam = torch.optim.Adam([x], lr=lr, fused=True)  # acts on each coordinate by itself
    slices = [slice(0, len(starts))] if batched(rule) else [slice(g, g + 1) for g in range(len(starts))]
    parts = [
        _Part(own, rule.init(TASKS, [str(g) for g in range(len(starts))[own]]), torch.Generator().manual_seed(seed))
        for own in slices
    ]
    paths = [Path2D([(float(x1), float(x2))]) for x1, x2 in starts]
    points, anchors, moved = x.tolist(), x.tolist(), [0.0] * len(starts)
    keep = max(1, steps // 400)
    factor = torch.tensor([scale, 1.0], dtype=torch.float64)
    for step in range(1, steps + 1):
        values, gradients = zip(*(by_hand(*point) for point in points), strict=True)
        losses = torch.tensor(values, dtype=torch.float64) * factor  # [G, K]
        rows = torch.tensor(gradients, dtype=torch.float64) * factor[:, None]  # [G, K, 2]
        combined = []
        for n, part in enumerate(parts):
            new, state = _operate(rule, losses[part.starts], rows[part.starts], part)
            combined.append(new)
            parts[n] = part._replace(state=state)
        x.grad = torch.cat(combined)
        adam.step()
        points = x.tolist()
        moved = [max(far, abs(a - c), abs(b - d)) for far, (a, b), (c, d) in zip(moved, points, anchors, strict=True)]
        if step % keep == 0 or step == steps:
            for path, point in zip(paths, points, strict=True):
                path.points.append(tuple(point))
        if step % WINDOW == 0:
            for path, point, far in zip(paths, points, moved, strict=True):
                since = step - WINDOW if path.rests is None else path.rests
                path.rests = since if far < still and math.isfinite(sum(point)) else None
            if all(path.rests is not None for path in paths):
                break
            anchors, moved = points, [0.0] * len(starts)
    for path, point in zip(paths, points, strict=True):
        path.steps = step
        if path.end != tuple(point):
            path.points.append(tuple(point))
    return paths


def _operate(rule: gs.Rule, losses: Tensor, rows: Tensor, part: _Part) -> tuple[Tensor, gs.State]:
    """One step of the rule: ``[g, K]`` losses and ``[g, K, 2]`` gradients → ``[g, 2]`` combined ones, and the new state."""
    kind, state, weights = type(rule), part.state, None
    if kind.weigh is not gs.Rule.weigh:
        weights, state = rule.weigh(losses[0], state, generator=part.generator)  # not batched: there is one group
        rows = rows * weights[:, None]
    gram = torch.bmm(rows, rows.mT)
    mixing, state = rule.mix(gram, state, generator=part.generator)
    if kind.observe is not gs.Rule.observe:
        active = torch.ones_like(losses, dtype=torch.bool)
        groups = tuple(str(g) for g in range(len(losses)))
        state = rule.observe(gs.Step(TASKS, groups, active, gram, mixing, losses[0], weights), state)
    return torch.bmm(mixing.sum(-2, keepdim=True), rows).squeeze(1), state
