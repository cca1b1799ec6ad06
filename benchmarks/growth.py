"""How cost grows: the single pass of a mixed batch over the number of tasks, the width and the depth of the model.

The batch is 128 sequences of 16 tokens, so that there can be 128 tasks. All that has the same model is measured in one run,
with one plain step in each turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gradsurgery._bench.timing import Contender, interleaved, ratios

from .report import Figure, Options, overhead
from .split import Sizes, Steps

_REPEATS = 5  # enough for a picture

Times = dict[str, list[float]]
Curve = Mapping[int, float]


def growth(options: Options) -> list[Figure]:
    """How the cost of the single pass grows with tasks, width and depth; also as a picture: ``growth.png``."""
    if options.quick:
        base = Sizes(sequences=4, tokens=4, width=16, layers=2, symbols=32)
        tasks, few, widths, depths = (1, 2, 4), (2, 4), (8, 16), (1, 2)
    else:
        base = Sizes(sequences=128, tokens=16)
        tasks, few, widths, depths = (1, 2, 4, 8, 16, 32, 64, 128), (8, 32), (64, 128, 256, 512), (1, 2, 4, 8)
    measured = {base: _times(base, tasks, options, with_apart=True)}
    by_width = {width: replace(base, width=width) for width in widths}
    by_depth = {layers: replace(base, layers=layers) for layers in depths}
    for sizes in [*by_width.values(), *by_depth.values()]:
        if sizes not in measured:
            measured[sizes] = _times(sizes, few, options)
    _draw(
        {way: {k: _ratio(measured[base], f"{way}, K={k}") for k in tasks} for way in ("ours", "apart")},
        {k: {width: _ratio(measured[sizes], f"ours, K={k}") for width, sizes in by_width.items()} for k in few},
        {k: {layers: _ratio(measured[sizes], f"ours, K={k}") for layers, sizes in by_depth.items()} for k in few},
        options.out,
    )
    return [
        overhead(f"growth, width {sizes.width}, {sizes.layers} layers, {_NAMES[way]}, K={k}", times[key], times["plain"])
        for sizes, times in measured.items()
        for way in _NAMES
        for k in tasks
        if (key := f"{way}, K={k}") in times
    ]


_NAMES = {"ours": "single pass, GradVac per layer", "apart": "each task's batch by itself"}


def _times(sizes: Sizes, tasks: Sequence[int], options: Options, with_apart: bool = False) -> Times:
    """Of a plain step, and for each number of tasks of the single pass and, if asked for, of a step for each task."""
    plain = Steps(replace(sizes, tasks=tasks[0]), options.seed)
    contenders = {"plain": Contender(plain.plain, plain.zero_grad)}
    for k in tasks:
        steps = Steps(replace(sizes, tasks=k), options.seed)
        contenders[f"ours, K={k}"] = Contender(steps.steady(), steps.zero_grad)
        if with_apart:
            contenders[f"apart, K={k}"] = Contender(steps.apart, steps.zero_grad)
    label = f"growth, width {sizes.width}, {sizes.layers} layers"
    return interleaved(contenders, min(options.repeats, _REPEATS), label)


def _ratio(times: Times, way: str) -> float:
    return ratios(times[way], times["plain"])[0]


def _draw(by_tasks: Mapping[str, Curve], by_width: Mapping[int, Curve], by_depth: Mapping[int, Curve], out: Path) -> None:
    """Three panels, of one height: ``growth.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    plt.rcParams.update({"font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold"})
    figure, axes = plt.subplots(1, 3, figsize=(10, 4), layout="constrained", sharey=True)
    axes[0].plot(*_xy(by_tasks["ours"]), "o-", color="#2a6fbb", lw=2.2, ms=5, label="single pass, GradVac per layer")
    axes[0].plot(
        *_xy(by_tasks["apart"]), "s--", color="#c4653d", lw=1.6, ms=4, label="each task's batch by itself, no rule"
    )
    axes[0].set(title="tasks", xlabel="tasks K")
    for ax, curves, title, what in ((axes[1], by_width, "width", "width"), (axes[2], by_depth, "depth", "layers")):
        for (k, curve), colour in zip(curves.items(), ("#4c9be8", "#0b3c6f"), strict=True):
            ax.plot(*_xy(curve), "o-", color=colour, lw=2.2, ms=5, label=f"single pass, K = {k}")
        ax.set(title=title, xlabel=what)
    for ax in axes:
        ticks = sorted({int(x) for line in ax.lines for x in line.get_xdata()})
        ax.axhline(1, color="0.4", lw=1, ls=":")
        ax.set(xscale="log", yscale="log", xticks=ticks)
        ax.set_xticklabels([str(x) for x in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.25, lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, loc="upper left")
    low, high = axes[0].get_ylim()
    shown = [y for y in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32) if low <= y <= high * 1.6]
    axes[0].set(yticks=shown, ylim=(low, high * 1.6), ylabel="time of a step, in plain steps")  # room for the legend
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "growth.png", dpi=150)
    plt.close(figure)


def _xy(curve: Curve) -> tuple[list[int], list[float]]:
    return list(curve), list(curve.values())
