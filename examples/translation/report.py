"""Tables and pictures of the runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

import gradsurgery as gs

from .data import FAMILY
from .train import Run

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def interval(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and with several values its 95 % interval."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {half_width(values):.{digits}f}"


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval around the mean of several values (Student's t)."""
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def blocks(milliseconds: Sequence[float], size: int) -> list[float]:
    """The mean time of each ``size`` steps in turn, so that each figure has its share of the steps with surgery."""
    size = min(size, len(milliseconds))
    return [statistics.fmean(milliseconds[i : i + size]) for i in range(0, len(milliseconds) - size + 1, size)]


def tables(runs: Sequence[Run]) -> str:
    """What the demo prints at the end."""
    methods = list(dict.fromkeys(run.method for run in runs))
    of = {method: [run for run in runs if run.method == method] for method in methods}
    languages = list(runs[0].loss)
    lines = [
        "Validation loss per character (nats; lower is better) and chrF of greedy translations (higher is better):",
        "",
    ]
    rows = [["", *(f"{method} {what}" for what in ("loss", "chrF") for method in methods)]]
    for language in languages:
        losses = [interval([run.loss[language] for run in of[method]]) for method in methods]
        chrfs = [interval([run.chrf[language] for run in of[method]], 1) for method in methods]
        rows.append([language, *losses, *chrfs])
    losses = [interval([run.average for run in of[method]]) for method in methods]
    chrfs = [interval([statistics.fmean(run.chrf.values()) for run in of[method]], 1) for method in methods]
    rows.append(["average", *losses, *chrfs])
    lines += _aligned(rows)

    seldom = " in the steps with surgery" if any(run.every > 1 for run in runs) else ""
    lines += ["", f"What the rules saw and did{seldom}, and what it cost:", ""]
    step = {method: _step(found) for method, found in of.items()}
    rows = [["", "pairs in conflict", "pairs operated on", "step", f"relative to {methods[0]}"]]
    for method in methods:
        conflict = statistics.fmean(run.recorder.conflict_rate() for run in of[method])
        operated = statistics.fmean(run.recorder.operation_rate() for run in of[method])
        relative = step[method] / step[methods[0]]
        rows.append([method, f"{conflict:.1%}", f"{operated:.1%}", f"{step[method]:.0f} ms", f"{relative:.2f}"])
    lines += _aligned(rows)

    if len(of[methods[0]]) > 1 and len(methods) > 1:
        lines += ["", f"Difference of the average loss to {methods[0]}, with the same seeds (negative is better):", ""]
        for method in methods[1:]:
            pairs = zip(of[method], of[methods[0]], strict=True)
            lines.append(f"  {method:<8} {interval([a.average - b.average for a, b in pairs])}")
    lines += [
        "",
        "A demo of this size shows how surgery works and what it costs, not that one method wins: differences between",
        "methods are to be read against those between seeds (--seeds 5). One seed alone says nothing about them.",
    ]
    return "\n".join(lines)


def pictures(runs: Sequence[Run], out: Path) -> list[Path]:
    """Draws the pictures of the first seed, and returns where they are."""
    first = {run.method: run.recorder for run in runs if run.seed == runs[0].seed}
    recorder = first["Sum"] if "Sum" in first else next(iter(first.values()))
    drawn = {
        "cosines": gs.plots.cosine_heatmap(recorder, groups=["encoder.*"], families=FAMILY),
        "similarity": gs.plots.similarity(recorder),
        "operations": gs.plots.operations({name: found for name, found in first.items() if name != "Sum"} or first),
        "losses": _losses([run for run in runs if run.seed == runs[0].seed]),
    }
    drawn["cosines"].set_title("Cosine similarity of encoder gradients, English into …")
    paths = []
    for name, ax in drawn.items():
        paths.append(out / f"{name}.png")
        ax.figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
        plt.close(ax.figure)
    return paths


def results(runs: Sequence[Run], out: Path) -> None:
    """Writes ``results.json``."""
    content = [
        {
            "method": run.method,
            "seed": run.seed,
            "every": run.every,
            "loss": run.loss,
            "chrf": run.chrf,
            "conflict_rate": run.recorder.conflict_rate(),
            "operation_rate": run.recorder.operation_rate(),
            "median_step_ms": _step([run]),
        }
        for run in runs
    ]
    (out / "results.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _losses(runs: Sequence[Run]) -> plt.Axes:
    ax = plt.subplots(figsize=(7, 4), layout="constrained")[1]
    for run in runs:
        window = max(1, len(run.training) // 40)
        smooth = np.convolve(run.training, np.ones(window) / window, "valid")
        ax.plot(np.arange(window - 1, len(run.training)), smooth, label=run.method)
    ax.set(xlabel="step", ylabel="training loss per character (nats)", title="Mean loss of all languages")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return ax


def _step(runs: Sequence[Run]) -> float:
    """The median time of a step; of the steps from one surgery to the next, the mean."""
    return statistics.median(ms for run in runs for ms in blocks(run.milliseconds, run.every))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
