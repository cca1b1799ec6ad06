"""The picture of all paths, and the table of where they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch

from .problem import STARTS, distances, losses, pareto_set
from .run import Path2D

matplotlib.use("Agg")

import matplotlib.pyplot as plt

NEAR = 0.1  # an end is at the Pareto set if it is nearer than this

Paths = Mapping[str, Sequence[Path2D]]


def table(paths: Paths) -> str:
    """Where each rule ends, from each start, in Markdown: in bold where that is at the Pareto set."""
    curve = pareto_set()
    rows = [["rule", *(f"from ({x1:g}, {x2:g})" for x1, x2 in STARTS), "at the Pareto set"]]
    rows.append(["---"] * len(rows[0]))
    for name, own in paths.items():
        ends = [path.end for path in own]
        near = distances(ends, curve) < NEAR
        cells = [f"({x1:.2f}, {x2:.2f})" for x1, x2 in ends]
        cells = [f"**{cell}**" if reached else cell for cell, reached in zip(cells, near, strict=True)]
        rows.append([name, *cells, f"{int(near.sum())} of {len(ends)}"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def picture(paths: Paths, file: Path) -> None:
    """A panel for each rule: the mean loss as a background, the paths with their starts and ends, the Pareto set."""
    columns = min(5, len(paths))
    lines = -(-len(paths) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.5 * columns, 2.6 * lines), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    x1, x2 = torch.meshgrid(*[torch.linspace(-11, 11, 221, dtype=torch.float64)] * 2, indexing="xy")
    mean = sum(losses(x1, x2)) / 2
    curve = pareto_set()
    for ax in axes.flat[len(paths) :]:
        ax.set_axis_off()
    for ax, (name, own) in zip(axes.flat, paths.items(), strict=False):
        ax.contourf(x1, x2, mean, levels=24, cmap="Greys_r", vmin=-45)
        ax.plot(*curve.T, color="black", linewidth=3, alpha=0.6, solid_capstyle="round")
        for number, path in enumerate(np.asarray(path.points) for path in own):
            color = f"C{number}"
            ax.plot(*path.T, color=color, linewidth=1.3)
            ax.plot(*path[0], "o", color=color, markersize=4, markeredgecolor="white", markeredgewidth=0.6)
            ax.plot(*path[-1], "*", color=color, markersize=9, markeredgecolor="black", markeredgewidth=0.5)
        ax.set_title(name, fontsize=10)
        ax.set(xlim=(-11, 11), ylim=(-11, 11), xticks=(-7, 0, 7), yticks=(-8, 0, 8))
        ax.tick_params(labelsize=7)
    figure.supxlabel("$x_1$", fontsize=9)
    figure.supylabel("$x_2$", fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)
