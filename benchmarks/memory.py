"""Peak memory of a step, measured in a process of its own for each way to make it.

The child makes two steps, so that everything that lives on is there (PyTorch's threads and scratch memory, the rules'
state, the layout of the rows), and drops the gradients. It then reads its resident set, resets the kernel's high-water
mark of it by writing ``5`` to ``/proc/self/clear_refs``, makes one more step to ``p.grad``, and reads the mark (``VmHWM``
in ``/proc/self/status``). The difference of the two is what the step needs at its peak. So that freed memory goes back to
the system at once instead of blurring both, the C library is told to map every allocation above 64 KiB on its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from .report import Figure, Options
from .step import Sizes, Steps

_WAYS = ("plain", "naive", "ours")
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def memory(options: Options) -> list[Figure]:
    """Peak memory of the step of four tasks, against plain training and ``K`` gradients."""
    if not Path("/proc/self/clear_refs").exists():
        tqdm.write("Peak memory can only be measured on Linux: left out.")
        return []
    sizes = Sizes.of(options)
    runs = 1 if options.quick else 3
    bar = tqdm([(way, run) for run in range(runs) for way in _WAYS], desc="memory", leave=False, disable=None)
    found: dict[str, list[float]] = {way: [] for way in _WAYS}
    gradients = 0.0
    for way, _ in bar:
        measured = _measure_elsewhere(way, sizes, options)
        found[way].append(measured["peak"])
        gradients = measured["gradients"]
    plain, naive, ours = (statistics.median(found[way]) for way in _WAYS)
    rows = sizes.tasks * gradients
    label = f"peak memory, K={sizes.tasks}"
    return [
        _compared(f"{label}: ours above plain step, against K gradients", ours - plain, rows, "<= 1.15"),
        _compared(f"{label}: naive loop above plain step, against K gradients", naive - plain, rows),
        _compared(f"{label}: ours, against plain step", ours, plain),
        _compared(f"{label}: ours, against naive loop", ours, naive),
    ]


def _compared(name: str, ours: float, reference: float, target: str | None = None) -> Figure:
    ratio = ours / reference if reference else float("nan")  # with tiny sizes, no page may have been new
    return Figure(name, ours, reference, ratio, target=target, unit="B")


def _measure_elsewhere(way: str, sizes: Sizes, options: Options) -> dict[str, float]:
    arguments = json.dumps({"way": way, "sizes": asdict(sizes), "seed": options.seed, "threads": options.threads})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **_MALLOC},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _measure(way: str, sizes: Sizes, seed: int) -> dict[str, float]:
    """What the child does."""
    steps = Steps(sizes, seed)
    step = getattr(steps, way)
    for _ in range(2):
        step()
        steps.zero_grad()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    kept = step()
    peak = _status("VmHWM")
    del kept
    return {"peak": peak - before, "gradients": sum(p.numel() * p.element_size() for p in steps.parameters)}


def _status(field: str) -> int:
    """A field of ``/proc/self/status``, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}.")


if __name__ == "__main__":
    import torch

    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    print(json.dumps(_measure(given["way"], Sizes(**given["sizes"]), given["seed"])))
