"""Peak memory of a step, measured in a process of its own for each way to make it: see ``gradsurgery._bench.memory``.

A streaming step keeps memory for the next one's rows. So that it counts, the single pass is measured from what is resident
after two plain steps: it then makes its own two, which take that memory and keep it, and the third one gives the mark.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gradsurgery._bench.memory import elsewhere, measurable, peak

from . import split, step
from .report import Figure, Options


def memory(options: Options) -> list[Figure]:
    """Peak memory of the step of four tasks, against plain training and ``K`` gradients."""
    if not measurable():
        tqdm.write("Peak memory can only be measured on Linux: left out.")
        return []
    sizes = step.Sizes.of(options)
    found, gradients = _measure_all("step", sizes, ("plain", "naive", "ours"), options)
    plain, naive, ours = found.values()
    rows = sizes.tasks * gradients
    label = f"peak memory, K={sizes.tasks}"
    return [
        _compared(f"{label}: ours above plain step, against K gradients", ours - plain, rows, "<= 1.15"),
        _compared(f"{label}: naive loop above plain step, against K gradients", naive - plain, rows),
        _compared(f"{label}: ours, against plain step", ours, plain),
        _compared(f"{label}: ours, against naive loop", ours, naive),
    ]


def memory_split(options: Options) -> list[Figure]:
    """Peak memory of the single pass of up to 32 tasks, with and without streaming, against plain training."""
    if not measurable():
        tqdm.write("Peak memory can only be measured on Linux: left out.")
        return []
    few, many = (split.Sizes.of(options, tasks) for tasks in (8, 32))
    found_few, _ = _measure_all("split", few, ("streaming", "at the end"), options)
    found_many, _ = _measure_all("split", many, ("plain", "streaming", "at the end"), options)
    plain = found_many["plain"]  # which knows of no tasks
    figures = []
    for sizes, found, target in ((few, found_few, None), (many, found_many, "<= 1.5")):
        label = f"peak memory, single pass, K={sizes.tasks}"
        figures += [
            _compared(f"{label}, against plain step", found["streaming"], plain, target),
            _compared(f"{label}, without streaming, against plain step", found["at the end"], plain),
        ]
    return figures


def _compared(name: str, ours: float, reference: float, target: str | None = None) -> Figure:
    ratio = ours / reference if reference else float("nan")  # with tiny sizes, no page may have been new
    return Figure(name, ours, reference, ratio, target=target, unit="B")


def _measure_all(
    what: str, sizes: step.Sizes | split.Sizes, ways: Sequence[str], options: Options
) -> tuple[dict[str, float], float]:
    """For each way the median of its peaks; and the size of one gradient."""
    runs = 1 if options.quick else 3
    bar = tqdm([(way, run) for run in range(runs) for way in ways], desc="memory", leave=False, disable=None)
    found: dict[str, list[float]] = {way: [] for way in ways}
    gradients = 0.0
    for way, _ in bar:
        measured = _measure_elsewhere(what, way, sizes, options)
        found[way].append(measured["peak"])
        gradients = measured["gradients"]
    return {way: statistics.median(peaks) for way, peaks in found.items()}, gradients


def _measure_elsewhere(what: str, way: str, sizes: step.Sizes | split.Sizes, options: Options) -> dict[str, float]:
    job = {"what": what, "way": way, "sizes": asdict(sizes), "seed": options.seed, "threads": options.threads}
    measured: dict[str, float] = elsewhere("benchmarks.memory", job, cwd=Path(__file__).parents[1])
    return measured


def _measure(
    steps: step.Steps | split.Steps, run: Callable[[], object], settle: Callable[[], object] | None = None
) -> dict[str, float]:
    """What the child does. With ``settle``, all counts that is resident since two calls of it; otherwise, of ``run``."""
    gradients = sum(p.numel() * p.element_size() for p in steps.parameters)
    return {"peak": peak(run, steps.zero_grad, settle), "gradients": gradients}


def _way(steps: Any, way: str) -> Callable[[], object]:
    if way in ("streaming", "at the end"):
        return steps.single_pass(stream=way == "streaming")
    return getattr(steps, way)


if __name__ == "__main__":
    import torch

    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    module = {"step": step, "split": split}[job["what"]]
    made = module.Steps(module.Sizes(**job["sizes"]), job["seed"])
    print(json.dumps(_measure(made, _way(made, job["way"]), made.plain if job["what"] == "split" else None)))
