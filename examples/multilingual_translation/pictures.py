"""The pictures of the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes

import gradsurgery as gs

from . import study
from .languages import FAMILY, other
from .page import picture, save
from .train import Result

_WIDE = (7.5, 3.8)


def _heatmap(recorder: gs.Recorder, part: str, ax: Axes) -> None:
    families = {task: FAMILY[other(task)] for task in recorder.tasks}
    gs.plots.cosine_heatmap(recorder, groups=study.PARTS[part], families=families, ax=ax)
    ax.set_title(part)


def _heatmaps(recorder: gs.Recorder) -> tuple[dict[str, Callable[[Axes], None]], tuple[float, float]]:
    """Part of the model → what draws it, and the size of one."""
    draws = {part: partial(_heatmap, recorder, part) for part in study.PARTS}
    return draws, (2.2 + 0.32 * len(recorder.tasks), 1.8 + 0.3 * len(recorder.tasks))


def save_heatmaps(recorder: gs.Recorder, path: Path) -> None:
    """Both halves (Figures 6.2 and 6.5) as a PNG."""
    draws, (width, height) = _heatmaps(recorder)
    save(list(draws.values()), (2 * width, height), path)


def of_geometry(name: str, recorder: gs.Recorder) -> list[tuple[str, str]]:
    """Heat maps of both halves (Figures 6.2, 6.5 and 6.6), similarities over the checkpoints, by layer (6.4 b) and of two
    pairs of tasks (6.4 c), and a heat map of the difference of the halves (6.4 a); each with what it shows."""
    draws, size = _heatmaps(recorder)
    found = [(_said(recorder, part), picture(draw, size, f"{name} {part}")) for part, draw in draws.items()]
    layers = study.layers_of(recorder)

    def by_layer(ax: Axes) -> None:
        gs.plots.similarity(recorder, groups=layers, window=1, ax=ax)

    found.append(("Mean over all pairs, by layer, at the checkpoints (Figure 6.4 b).", picture(by_layer, _WIDE, name)))
    if pairs := _near_and_far(recorder.tasks):
        ends = [layers[0], next(layer for layer in layers if layer.startswith("decoder"))]

        def of_pairs(ax: Axes) -> None:
            gs.plots.similarity(recorder, pairs=pairs, groups=ends, window=1, ax=ax)

        found.append(("A pair of one family and a pair of two, in the first blocks (Figure 6.4 c).",
                      picture(of_pairs, _WIDE, f"{name} pairs")))  # fmt: skip
    said = "Encoder minus decoder: where blue, gradients are more similar in the encoder (Figure 6.4 a)."
    found.append((said, picture(lambda ax: _difference(recorder, ax), size, f"{name} difference")))
    return found


def _said(recorder: gs.Recorder, part: str) -> str:
    """What a heat map shows, with its numbers."""
    said = [f"Cosine similarity of {part} gradients on the same sentences; frames are families."]
    for direction, tasks in study.directions_of(recorder).items():
        its = study.clustering(recorder, part, tasks)
        compared = f", **{its.difference:+.3f}** within families against between (p = {its.p:.4f})"
        said.append(f"{direction}: {its.mean:.3f} on average{'' if np.isnan(its.p) else compared}.")
    return " ".join(said)


def _difference(recorder: gs.Recorder, ax: Axes) -> None:
    one, two = (study.similarities(recorder, groups) for groups in study.PARTS.values())
    values = one - two
    limit = max(float(np.nanmax(np.abs(values), initial=0.0)), 1e-3)
    colours = matplotlib.colormaps["RdBu"].with_extremes(bad="0.93")
    image = ax.imshow(values, cmap=colours, vmin=-limit, vmax=limit)
    names = recorder.tasks
    ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.04).outline.set_visible(False)
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("encoder minus decoder")


def _near_and_far(tasks: Sequence[str]) -> list[tuple[str, str]]:
    """The first task with the next one of its family, and with Hindi, or the last one; empty if that is not to be had."""
    first = tasks[0]
    alike = [task for task in tasks[1:] if FAMILY[other(task)] == FAMILY[other(first)] and other(task) != other(first)]
    far = [task for task in tasks if FAMILY[other(task)] != FAMILY[other(first)]]
    hindi = [task for task in far if other(task) == "hi"]
    return [(first, alike[0]), (first, (hindi or far[-1:])[0])] if alike and far else []


def of_operations(results: Mapping[str, Result], path: Path) -> list[tuple[str, str]]:
    """How many pairs each rule operated on over the steps (Figure 6.7), with what it shows; and as a PNG."""
    recordings = {name: result.recorder for name, result in results.items() if result.recorder.operated.any()}
    if not recordings:
        return []
    draw = partial(_operations, recordings)
    save([draw], _WIDE, path)
    svg = picture(draw, _WIDE, "operations")
    shares = ", ".join(f"{name} **{its.operation_rate():.1%}**" for name, its in recordings.items())
    return [
        (
            f"Pairs operated on in each recorded step, over all surgery groups (Figure 6.7). Share of all pairs: {shares}.",
            svg,
        )
    ]


def _operations(recordings: Mapping[str, gs.Recorder], ax: Axes) -> None:
    gs.plots.operations(recordings, ax=ax)
