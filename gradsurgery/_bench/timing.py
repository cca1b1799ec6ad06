"""Timing in turns: A, B, A, B, … so that a machine that slows down for a while does so for both."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from .progress import progress

_LONG_ENOUGH = 0.02  # seconds: a sample of something quicker is the mean of several calls


@dataclass(frozen=True)
class Contender:
    """Something to be timed.

    Attributes:
        run: what is timed.
        before: what is to be done ahead of each call, outside the timed part.
    """

    run: Callable[[], object]
    before: Callable[[], object] | None = None


def interleaved(contenders: Mapping[str, Contender], repeats: int, label: str = "") -> dict[str, list[float]]:
    """Times contenders in turns, after a warm-up.

    A sample is one call, or, where a call is short and needs nothing ahead of it, the mean of as many as fill 20 ms.

    Args:
        contenders: by name.
        repeats: how many samples of each.
        label: for the progress bar.

    Returns:
        For each contender its samples, in seconds. Those with the same index were taken one right after the other.
    """
    calls = {name: _warm_up(contender) for name, contender in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    with _no_garbage_collection():
        for _ in progress(range(repeats), label):
            for name, contender in contenders.items():
                samples[name].append(_sample(contender, calls[name]))
            gc.collect(0)
    return samples


def ratios(above: list[float], below: list[float]) -> tuple[float, tuple[float, float]]:
    """The median of the pairwise ratios, and their quartiles."""
    pairwise = [a / b for a, b in zip(above, below, strict=True)]
    if len(pairwise) < 2:
        return pairwise[0], (pairwise[0], pairwise[0])
    low, middle, high = statistics.quantiles(pairwise, n=4, method="inclusive")
    return middle, (low, high)


def _warm_up(contender: Contender) -> int:
    """Calls it twice; returns how many calls make a sample."""
    first = _sample(contender, 1)
    if first > 10 * _LONG_ENOUGH:
        return 1  # it is warm enough
    second = _sample(contender, 1)
    return 1 if contender.before else max(1, round(_LONG_ENOUGH / second))


def _sample(contender: Contender, calls: int) -> float:
    if contender.before is not None:
        contender.before()
    start = time.perf_counter()
    for _ in range(calls):
        contender.run()
    return (time.perf_counter() - start) / calls


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
