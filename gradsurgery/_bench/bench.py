"""Step time and peak memory of rules, by source and surgery groups, against a plain step."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import rules as all_rules
from .._coordinates import AnyRule
from .._optimizer import SurgeryOptimizer
from . import memory
from .model import Workload, workload
from .progress import progress
from .timing import Contender, interleaved, ratios

SOURCES = ("autograd", "batched", "split")


@dataclass(frozen=True)
class Way:
    """One way to make a step: a rule, a source and surgery groups."""

    rule: str
    source: str
    groups: str


@dataclass(frozen=True)
class Row:
    """What was measured of a way.

    Attributes:
        way: the way; None is the plain step.
        seconds: of a step, the median.
        times: how many plain steps that is, the median of ratios in turns.
        peak: bytes above what lives between steps; None where it was not measured.
        failed: the error that stopped it, or empty.
    """

    way: Way | None
    seconds: float = float("nan")
    times: float = float("nan")
    peak: int | None = None
    failed: str = ""


@dataclass(frozen=True)
class Settings:
    """How to measure: the model, its sizes if it is the built-in one, and what the command line says."""

    model: str | None
    sizes: dict[str, int]
    repeats: int
    seed: int
    threads: int
    memory: bool


def rule_named(name: str) -> AnyRule:
    """The rule of this name, with its default settings; ``A+B`` is a chain.

    Raises:
        ValueError: if there is none, or it cannot do without settings.
    """
    parts = []
    for part in name.split("+"):
        if part not in all_rules.__all__ or part == "Chain":
            known = ", ".join(sorted(set(all_rules.__all__) - {"Chain"}))
            raise ValueError(f"There is no rule {part!r}. The rules are {known}; join them by + for a chain.")
        try:
            parts.append(getattr(all_rules, part)())
        except TypeError as error:
            raise ValueError(f"{part} needs settings: {error}. It cannot be measured from the command line.") from error
    return parts[0] if len(parts) == 1 else all_rules.Chain(*parts)


def plain(work: Workload) -> Callable[[], object]:
    """One backward pass of the summed losses."""
    parameters = [parameter for parameter in work.model.parameters() if parameter.requires_grad]

    def run() -> None:
        losses = torch.stack([loss.reshape(()) for loss in work.losses().values()])
        gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    return run


def surgery(work: Workload, way: Way) -> Callable[[], object]:
    """A step to ``p.grad`` with surgery.

    Raises:
        ValueError: if the workload has no mixed batch, and the source is the single pass.
    """
    sgd = torch.optim.SGD(work.model.parameters(), lr=0.0)
    source = "autograd" if way.source == "split" else way.source
    rule = rule_named(way.rule)
    opt = SurgeryOptimizer(sgd, rule, model=work.model, groups=way.groups, tasks=work.tasks, source=source)
    samples = work.samples
    if way.source == "split" and samples is None:
        raise ValueError("there is no mixed batch: the factory must return (model, losses, (samples, task_ids))")

    def run() -> None:
        if way.source == "split" and samples is not None:
            with opt.split(work.task_ids):
                losses = samples()
            opt.backward(losses)
        else:
            opt.backward(work.losses())
        opt.combine()

    return run


def bench(ways: Sequence[Way], settings: Settings) -> list[Row]:
    """Measures the plain step and all ways."""
    torch.set_num_threads(settings.threads)
    work = workload(settings.model, settings.sizes, settings.seed)
    drop = _dropper(work)
    contenders, failed = {"plain": Contender(plain(work), drop)}, {}
    for way in ways:
        try:
            run = surgery(work, way)
            run()  # what a model or a rule cannot do shows in the first steps
            run()
            contenders[repr(way)] = Contender(run, drop)
        except Exception as error:  # the user's model may fail in any way, and the other ways are still of interest
            failed[way] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        drop()
    times = interleaved(contenders, settings.repeats, "step time")
    measured = [way for way in ways if way not in failed]
    peaks = _peaks([None, *measured], settings) if settings.memory and memory.measurable() else {}
    rows = [Row(None, statistics.median(times["plain"]), 1.0, peaks.get(None))]
    for way in ways:
        if way in failed:
            rows.append(Row(way, failed=failed[way]))
            continue
        samples = times[repr(way)]
        rows.append(Row(way, statistics.median(samples), ratios(samples, times["plain"])[0], peaks.get(way)))
    return rows


def _dropper(work: Workload) -> Callable[[], object]:
    return lambda: work.model.zero_grad(set_to_none=True)


def _peaks(ways: Sequence[Way | None], settings: Settings) -> dict[Way | None, int]:
    found = {}
    for way in progress(ways, "peak memory"):
        job = {"way": None if way is None else asdict(way), "settings": asdict(settings)}
        found[way] = int(memory.elsewhere("gradsurgery._bench.bench", job))
    return found


def _measure(job: dict[str, Any]) -> int:
    """What the child does."""
    settings = Settings(**job["settings"])
    torch.set_num_threads(settings.threads)
    work = workload(settings.model, settings.sizes, settings.seed)
    step = plain(work) if job["way"] is None else surgery(work, Way(**job["way"]))
    return memory.peak(step, _dropper(work), plain(work))


# --- Showing ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    cells = [["rule", "source", "groups", "step", "in plain steps", "peak memory", "in plain peaks"]]
    base = _base(rows)
    for row in rows:
        name = ["plain step", "", ""] if row.way is None else [row.way.rule, row.way.source, row.way.groups]
        if row.failed:
            cells.append([*name, row.failed.replace("|", "/"), "", "", ""])
            continue
        size = "" if row.peak is None else f"{row.peak / 2**20:.1f} MiB"
        share = "" if row.peak is None or not base else f"{row.peak / base:.2f}×"
        cells.append([*name, f"{row.seconds * 1e3:.2f} ms", f"{row.times:.2f}×", size, share])
    widths = [max(len(line[i]) for line in cells if not (i == 3 and line[4] == "" and line[3])) for i in range(7)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells)


def _base(rows: Sequence[Row]) -> int | None:
    """What peaks are compared with; None below a MiB, which is a question of single pages."""
    peak = rows[0].peak
    return peak if peak is not None and peak >= 2**20 else None


def picture(rows: Sequence[Row], path: Path) -> None:
    """Bars of time and of peak memory, in plain steps.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The picture needs matplotlib: pip install "gradsurgery[plots]".') from error
    shown = [row for row in rows if row.way is not None and not row.failed]
    labels = [f"{row.way.rule}, {row.way.source}, {row.way.groups}" for row in shown if row.way is not None]
    base = _base(rows)
    columns = [("time of a step", [row.times for row in shown], "#2a6fbb")]
    if base:
        columns.append(("peak memory", [(row.peak or 0) / base for row in shown], "#c4653d"))
    figure = Figure(figsize=(5 * len(columns) + 2, 1.2 + 0.28 * max(len(shown), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, (title, values, colour) in zip(axes, columns, strict=True):
        bars = ax.barh(range(len(values)), values, color=colour)
        ax.bar_label(bars, [f"{value:.2f}×" for value in values], padding=3, fontsize=8)
        ax.axvline(1, color="0.4", linewidth=1, linestyle=":")
        ax.set_yticks(range(len(labels)), labels)
        ax.set_title(f"{title}, in plain steps")
        ax.margins(x=0.15)
        ax.spines[["top", "right"]].set_visible(False)
    if len(shown):
        axes[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
