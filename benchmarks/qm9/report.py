"""Tables of errors, ranks and times, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .data import TARGETS

matplotlib.use("Agg")

import matplotlib.pyplot as plt

PUBLISHED = {"LS": 1.0, "MGDA": 6.8, "PCGrad": 4.0, "CAGrad": 3.3, "IMTL-G": 3.4, "Nash-MTL": 6.6, "FAMO": 1.1}
"""Time per epoch relative to equal weighting, as FAMO's authors report it for their model on a GPU."""

Errors = Mapping[str, Sequence[Sequence[float]]]
"""Method → seed → mean absolute error of each target."""


def deltas(errors: Errors, single: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Delta m%, for each method and seed: the mean over targets of the change against training on each target alone.

    The errors of training alone are the mean over its seeds, so that intervals are of the method's seeds.
    """
    base = np.mean(single, 0)
    return {method: [float(100 * np.mean(np.array(run) / base - 1)) for run in runs] for method, runs in errors.items()}


def mean_ranks(errors: Errors) -> dict[str, float]:
    """The mean over targets of each method's rank, by its mean error over seeds; 1 is the best."""
    means = np.array([np.mean(runs, 0) for runs in errors.values()])
    ranks: NDArray[np.float64] = stats.rankdata(means, axis=0).mean(1)
    return dict(zip(errors, ranks.tolist(), strict=True))


def interval(values: Sequence[float], digits: int = 1) -> str:
    """The mean, and with several values its 95 % interval (Student's t)."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:.{digits}f}"


def tables(errors: Errors, single: Sequence[Sequence[float]], times: Mapping[str, float]) -> str:
    """In Markdown: a summary of all methods, and every error."""
    change, ranks = deltas(errors, single), mean_ranks(errors)
    rows = [["method", "Δm% (lower is better)", "mean rank", "time of a step", "as published"], ["---", *["---:"] * 4]]
    for method in sorted(errors, key=lambda method: statistics.fmean(change[method])):
        published = f"{PUBLISHED[method]:.1f}" if method in PUBLISHED else ""
        time = f"{times[method]:.1f}" if method in times else ""
        rows.append([method, interval(change[method]), f"{ranks[method]:.1f}", time, published])
    units = [f"{name} ({target.unit})" for name, target in TARGETS.items()]
    details = [["method", *units], ["---", *["---:"] * len(units)]]
    for method, runs in {"alone": single, **errors}.items():
        details.append([method, *(_error(values) for values in zip(*runs, strict=True))])
    return (
        "Change of the mean absolute errors on the test set against training on each target alone, and what a step costs "
        f"relative to equal weighting (LS):\n\n{_lines(rows)}\nMean absolute errors on the test set:\n\n{_lines(details)}"
    )


def picture(errors: Errors, single: Sequence[Sequence[float]], file: Path) -> None:
    """Delta m% of each method, every seed as a point, with 95 % intervals."""
    change = deltas(errors, single)
    order = sorted(change, key=lambda method: -statistics.fmean(change[method]))
    figure, ax = plt.subplots(figsize=(7, 0.36 * len(order) + 1.2), layout="constrained")
    for row, method in enumerate(order):
        values = change[method]
        if len(values) > 1:
            half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
            ax.errorbar(statistics.fmean(values), row, xerr=half, color="C0", capsize=3, linewidth=1.5)
        ax.plot(values, [row] * len(values), "o", color="C0", markersize=4, alpha=0.6)
    ax.set_yticks(range(len(order)), order)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel("Δm%: mean change of the error against training on each target alone (lower is better)")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _error(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    digits = 3 if mean < 1 else 2 if mean < 10 else 1
    return interval(values, digits)


def _lines(rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
