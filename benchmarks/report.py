"""Figures, and how they are shown and written."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from gradsurgery._bench.timing import ratios


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        repeats: samples of each contender.
        seed: of all random numbers.
        quick: tiny sizes, to see that everything works; the figures then mean nothing.
        threads: that PyTorch computes with.
        out: folder of what is written.
    """

    repeats: int = 15
    seed: int = 0
    quick: bool = False
    threads: int = 2
    out: Path = Path("out/bench")


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        name: what was measured.
        ours: seconds or bytes.
        reference: seconds or bytes of what it is compared with.
        ratio: how many times faster we are where ``target`` is at least something; otherwise how many times the
            reference we take.
        quartiles: of the ratio; None if it was measured once.
        target: as ``">= 20"`` or ``"<= 1.1"``; None for a figure that is there for information.
        unit: ``"s"`` or ``"B"``.
    """

    name: str
    ours: float
    reference: float
    ratio: float
    quartiles: tuple[float, float] | None = None
    target: str | None = None
    unit: str = "s"

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None without one."""
        if self.target is None:
            return None
        comparison, bound = self.target.split()
        return self.ratio >= float(bound) if comparison == ">=" else self.ratio <= float(bound)

    def cells(self) -> list[str]:
        """What the table shows."""
        ratio = _short(self.ratio) + "×"
        if self.quartiles is not None:
            ratio += f" ({_short(self.quartiles[0])}–{_short(self.quartiles[1])})"
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        show = _time if self.unit == "s" else _size
        return [self.name, show(self.ours), show(self.reference), ratio, self.target or "", met]


def faster(name: str, ours: list[float], reference: list[float], target: float | None = None) -> Figure:
    """How many times faster than the reference we are."""
    ratio, quartiles = ratios(reference, ours)
    goal = None if target is None else f">= {target:g}"
    return Figure(name, statistics.median(ours), statistics.median(reference), ratio, quartiles, goal)


def overhead(name: str, ours: list[float], reference: list[float], target: float | None = None) -> Figure:
    """How many times the reference's time we take."""
    ratio, quartiles = ratios(ours, reference)
    goal = None if target is None else f"<= {target:g}"
    return Figure(name, statistics.median(ours), statistics.median(reference), ratio, quartiles, goal)


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table."""
    head = ["figure", "ours", "reference", "ratio (quartiles)", "target", "met"]
    rows = [head, *(figure.cells() for figure in figures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rows.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def write(figures: Sequence[Figure], options: Options) -> None:
    """Writes ``figures.md`` and ``figures.json``."""
    about = environment(options)
    options.out.mkdir(parents=True, exist_ok=True)
    text = f"{table(figures)}\n\n{', '.join(f'{key} {value}' for key, value in about.items())}\n"
    (options.out / "figures.md").write_text(text, encoding="utf-8")
    content = {"environment": about, "figures": [{**asdict(figure), "met": figure.met} for figure in figures]}
    (options.out / "figures.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def environment(options: Options) -> dict[str, str | int]:
    """What the figures were measured with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchjd": version("torchjd"),
        "threads": options.threads,
        "cores": os.cpu_count() or 0,
        "cpu": _cpu(),
        "repeats": options.repeats,
        "seed": options.seed,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def _size(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
