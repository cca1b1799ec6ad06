"""Peak memory of a step, measured in a process of its own for each way to make it.

The child makes two steps, so that everything that lives on is there (PyTorch's threads and scratch memory, the rules'
state, the layout of the rows), and drops the gradients. It then reads its resident set, resets the kernel's high-water
mark of it by writing ``5`` to ``/proc/self/clear_refs``, makes one more step to ``p.grad``, and reads the mark (``VmHWM``
in ``/proc/self/status``). The difference of the two is what the step needs at its peak. So that freed memory goes back to
the system at once instead of blurring both, the C library is told to map every allocation above 64 KiB on its own.

A streaming step keeps memory for the next one's rows. So that it counts, the single pass is measured from what is resident
after two plain steps: it then makes its own two, which take that memory and keep it, and the third one gives the mark.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import split, step
from .report import Figure, Options

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def memory(options: Options) -> list[Figure]:
    """Peak memory of the step of four tasks, against plain training and ``K`` gradients."""
    if not Path("/proc/self/clear_refs").exists():
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
    if not Path("/proc/self/clear_refs").exists():
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
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(job)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **_MALLOC},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _measure(
    steps: step.Steps | split.Steps, run: Callable[[], object], settle: Callable[[], object] | None = None
) -> dict[str, float]:
    """What the child does. With ``settle``, all counts that is resident since two calls of it; otherwise, of ``run``."""
    _twice(steps, run if settle is None else settle)
    before = _status("VmRSS")
    if settle is not None:
        _twice(steps, run)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    kept = run()
    peak = _status("VmHWM")
    del kept
    return {"peak": peak - before, "gradients": sum(p.numel() * p.element_size() for p in steps.parameters)}


def _twice(steps: step.Steps | split.Steps, run: Callable[[], object]) -> None:
    for _ in range(2):
        run()
        steps.zero_grad()


def _status(field: str) -> int:
    """A field of ``/proc/self/status``, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}.")


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
