"""The picture of all paths, and the table of where they end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .problem import STARTS, distances, losses, pareto_set, valleys
from .run import Path2D

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.lines import Line2D

NEAR = 0.1  # an end is at the Pareto set if it is nearer than this
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b0408c", "#c98a00")  # one for each start, which the colour-blind tell apart
GROUND = LinearSegmentedColormap.from_list("ground", ["#aebccb", "#e9edf1", "#ffffff"])
SET = "#1b1f24"

Paths = Mapping[str, Sequence[Path2D]]


def table(paths: Paths) -> str:
    """Where each rule ends, from each start, in Markdown: in bold at the Pareto set, with an arrow where it still moves."""
    curve = pareto_set()
    rows = [["rule", *(f"from ({x1:g}, {x2:g})" for x1, x2 in STARTS), "at the Pareto set", "steps"]]
    rows.append(["---", *["---:"] * (len(STARTS) + 2)])
    for name, own in paths.items():
        near = reached(own, curve)
        cells = [_cell(path, bool(there)) for path, there in zip(own, near, strict=True)]
        rows.append([name, *cells, f"{int(near.sum())} of {len(own)}", f"{max(path.steps for path in own):,}"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(path: Path2D, there: bool) -> str:
    if not math.isfinite(sum(path.end)):
        return "diverged"
    text = "({:.2f}, {:.2f})".format(*(round(x, 2) + 0.0 for x in path.end))  # no minus zero
    return (f"**{text}**" if there else text) + (" →" if path.rests is None else "")


def reached(paths: Sequence[Path2D], curve: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which paths end at the Pareto set; one that has diverged does not."""
    near: NDArray[np.bool_] = distances([path.end for path in paths], curve) < NEAR
    return near


def picture(paths: Paths, file: Path) -> None:
    """A panel for each rule: the mean loss as a background, the paths with their starts and ends, the Pareto set."""
    columns = min(6, len(paths) + 1)
    lines = -(-(len(paths) + 1) // columns)  # the last panel is the legend
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(2.05 * columns, 2.25 * lines),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    x1, x2 = torch.meshgrid(*[torch.linspace(-11, 11, 221, dtype=torch.float64)] * 2, indexing="xy")
    mean = sum(losses(x1, x2)) / 2
    levels = np.quantile(mean, np.linspace(0, 1, 17))  # of equal areas, or the valleys could not be seen beside the bowls
    curve = pareto_set()
    for ax in axes.flat[len(paths) :]:
        ax.set_axis_off()
    for ax, (name, own) in zip(axes.flat, paths.items(), strict=False):
        ax.contourf(x1, x2, mean, levels=levels, cmap=GROUND, norm=BoundaryNorm(levels, GROUND.N))
        ax.plot(*curve.T, color=SET, linewidth=3.5, alpha=0.55, solid_capstyle="round")
        for valley in valleys():
            ax.plot(*valley.T, ":", color=SET, linewidth=1, alpha=0.5)
        near = reached(own, curve)
        for path, there, color in zip(own, near, COLORS, strict=True):
            _draw(ax, path, bool(there), color)
        ax.set_title(f"{name}  {int(near.sum())}/{len(own)}", fontsize=9)
        ax.set(xlim=(-11, 11), ylim=(-11, 11), xticks=(-7, 0, 7), yticks=(-8, 0, 8), aspect="equal")
        ax.tick_params(labelsize=7, length=2, color="#8a929a")
        ax.spines[:].set_color("#8a929a")
    axes.flat[len(paths)].legend(
        handles=[
            Line2D([], [], color=SET, alpha=0.55, linewidth=3.5, label="Pareto set"),
            Line2D([], [], color=SET, alpha=0.5, linewidth=1, linestyle=":", label="valley of a loss"),
            Line2D([], [], color="0.4", marker="o", linestyle="", markersize=5, label="start"),
            Line2D(
                [],
                [],
                color="0.4",
                marker="*",
                linestyle="",
                markersize=10,
                markeredgecolor="black",
                label="end, at the set",
            ),
            Line2D(
                [], [], color="0.4", marker="X", linestyle="", markersize=7, markeredgecolor="black", label="end, elsewhere"
            ),
        ],
        loc="center",
        frameon=False,
        fontsize=8,
        labelspacing=0.9,
    )
    figure.supxlabel("$x_1$", fontsize=9)
    figure.supylabel("$x_2$", fontsize=9)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=130)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(128).save(file, optimize=True)


def _draw(ax: Axes, path: Path2D, there: bool, color: str) -> None:
    points = np.asarray(path.points)
    points = points[np.isfinite(points).all(1)]
    ax.plot(*points.T, color=color, linewidth=1.4)
    ax.plot(*points[0], "o", color=color, markersize=4.5, markeredgecolor="white", markeredgewidth=0.7)
    marker, size = ("*", 10) if there else ("X", 6.5)
    ax.plot(*points[-1], marker, color=color, markersize=size, markeredgecolor="black", markeredgewidth=0.6, zorder=3)
