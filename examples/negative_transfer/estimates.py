"""Means with 95 % intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

import gradsurgery as gs


class Estimate(NamedTuple):
    """A mean, and the bounds of its 95 % interval by Student's t; infinite for one seed."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return self.high - self.mean

    def __str__(self) -> str:
        return f"{self.mean:.1f}±{self.half:.1f}" if math.isfinite(self.half) else f"{self.mean:.1f}"

    @property
    def bounds(self) -> str:
        """The mean, and the interval in brackets."""
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Of one value for each seed."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - half, mean + half)


def gap(seeds: Sequence[int], accuracies: Sequence[float], baseline: Sequence[float]) -> gs.GapResult:
    """The negative transfer gap in points of accuracy: risks are errors in percent."""
    with_source, target_only = (tuple(100 - a for a in values) for values in (accuracies, baseline))
    return gs.GapResult(tuple(seeds), with_source, target_only)
