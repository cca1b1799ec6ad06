"""Pictures of a recording, after those of the thesis' chapter 6. Needs matplotlib: ``pip install "gradsurgery[plots]"``.

Every function draws on the axes given, or on new ones, and returns them; ``ax.figure.savefig(...)`` writes the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from ._recorder import Recorder
from .rules._transference import TransferMatrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["cosine_heatmap", "operations", "similarity", "transference"]


def cosine_heatmap(
    recorder: Recorder,
    *,
    groups: Sequence[str] | None = None,
    order: Sequence[str] | None = None,
    families: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A heat map of the cosine similarities between tasks, averaged over steps and groups (thesis, Figures 6.2 and 6.5).

    Args:
        recorder: the recording.
        groups: names of surgery groups, or patterns such as ``"encoder.*"``; None means all.
        order: the tasks to show, in order; None means all.
        families: task → family. Tasks of a family are put together, with a frame around them.
        ax: where to draw.

    Raises:
        ValueError: for a task or group that the recording does not have.
    """
    names = _tasks(recorder, order)
    if families is not None:
        seen = list(dict.fromkeys(families.get(name, "") for name in names))
        names = sorted(names, key=lambda name: seen.index(families.get(name, "")))
    index = [recorder.tasks.index(name) for name in names]
    cosines = _mean(recorder.cosines[:, recorder.select(groups)], (0, 1))[np.ix_(index, index)]

    limit = max(float(np.nanmax(np.abs(cosines), initial=0.0)), 1e-3)
    ax = _heatmap(cosines, names, limit, "cosine similarity", "{:.2f}", ax)
    if families is not None:
        _frame_families(ax, [families.get(name, "") for name in names])
    ax.set_title("Cosine similarity of the tasks' gradients")
    return ax


def similarity(
    recorder: Recorder,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    groups: Sequence[str] | None = None,
    window: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Cosine similarities over the steps, a line for each surgery group (thesis, Figure 6.4).

    Args:
        recorder: the recording.
        pairs: pairs of tasks; a line is then drawn for each pair and group. None means the average over all pairs.
        groups: as in :func:`cosine_heatmap`.
        window: average over so many recorded steps; None means a fortieth of the recording.
        ax: where to draw.

    Raises:
        ValueError: for a task or group that the recording does not have.
    """
    cosines, steps = recorder.cosines, recorder.steps
    window = max(1, len(steps) // 40) if window is None else window
    chosen = recorder.select(groups)
    ax = _axes(ax, width=7.0, height=4.0)
    colours = _sequence(len(chosen))
    styles = ("-", "--", ":", "-.")
    for colour, c in zip(colours, chosen, strict=True):
        name = recorder.groups[c]
        if pairs is None:
            ax.plot(steps, _smooth(_mean(cosines[:, c], (1, 2)), window), color=colour, label=name)
            continue
        for style, (one, other) in zip(styles * len(pairs), pairs, strict=False):
            i, j = (recorder.tasks.index(task) for task in _tasks(recorder, (one, other)))
            ax.plot(
                steps,
                _smooth(cosines[:, c, i, j], window),
                color=colour,
                linestyle=style,
                label=f"{name}: {one}, {other}",
            )
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xlabel("step")
    ax.set_ylabel("cosine similarity")
    ax.set_title("Similarity of the tasks' gradients by surgery group")
    _finish(ax)
    return ax


def operations(
    recordings: Mapping[str, Recorder],
    *,
    groups: Sequence[str] | None = None,
    window: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """How many pairs each rule operated on, over the steps (thesis, Figure 6.7).

    Args:
        recordings: name of the rule → its recording.
        groups: as in :func:`cosine_heatmap`.
        window: average over so many recorded steps; None means a fortieth of the recording.
        ax: where to draw.

    Raises:
        ValueError: for a group that a recording does not have.
    """
    ax = _axes(ax, width=7.0, height=4.0)
    for name, recorder in recordings.items():
        counts = recorder.operated[:, recorder.select(groups)].sum((1, 2, 3)).astype(np.float32)
        smoothed = _smooth(counts, max(1, len(counts) // 40) if window is None else window)
        ax.plot(recorder.steps, smoothed, label=f"{name} ({recorder.operation_rate(groups):.0%} of pairs)")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("step")
    ax.set_ylabel("pairs operated on")
    ax.set_title("Active operations")
    _finish(ax)
    return ax


def transference(transfer: TransferMatrix, *, order: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """A heat map of what each task has done for each other one, over all steps and surgery groups.

    Args:
        transfer: what :meth:`Transference.read` returned.
        order: the tasks to show, in order; None means all.
        ax: where to draw.

    Raises:
        ValueError: for a task that was not measured.
    """
    names = list(transfer.tasks if order is None else order)
    matrix = np.array(
        [[transfer.of(source, target) if source != target else np.nan for target in names] for source in names]
    )
    limit = max(float(np.nanmax(np.abs(matrix), initial=0.0)), np.finfo(np.float64).tiny)
    ax = _heatmap(matrix, names, limit, "loss that the source takes from the target", "{:+.2g}", ax)
    ax.set_xlabel("target")
    ax.set_ylabel("source")
    ax.set_title("Transference")
    return ax


def _heatmap(
    values: npt.NDArray[np.float64],
    names: Sequence[str],
    limit: float,
    label: str,
    form: str,
    ax: Axes | None,
) -> Axes:
    """``[K, K]`` in colours around zero, with figures where there is room."""
    ax = _axes(ax, width=1.6 + 0.55 * len(names), height=1.2 + 0.5 * len(names))
    image = ax.imshow(values, cmap=_colours(), vmin=-limit, vmax=limit)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.04)
    bar.ax.spines["outline"].set_visible(False)
    bar.set_label(label)
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    if len(names) <= 12:
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "white" if abs(value) > 0.65 * limit else "black"
                ax.text(
                    j, i, form.format(value).replace("-0.00", "0.00"), ha="center", va="center", fontsize=8, color=colour
                )
    return ax


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "gradsurgery[plots]".') from error
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _finish(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    handles, _ = ax.get_legend_handles_labels()
    if handles:
        ax.legend(frameon=False, fontsize=8, ncols=1 if len(handles) <= 10 else 2)


def _colours() -> Any:
    import matplotlib

    return matplotlib.colormaps["RdBu"].with_extremes(bad="0.93")


def _sequence(count: int) -> npt.NDArray[np.float64]:
    import matplotlib

    return cast("npt.NDArray[np.float64]", matplotlib.colormaps["viridis"](np.linspace(0, 0.92, max(count, 1))[:count]))


def _frame_families(ax: Axes, families: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    start = 0
    for i in range(1, len(families) + 1):
        if i == len(families) or families[i] != families[start]:
            size = i - start
            frame = Rectangle((start - 0.5, start - 0.5), size, size, fill=False, edgecolor="black", linewidth=1.6)
            ax.add_patch(frame)
            start = i


def _tasks(recorder: Recorder, names: Sequence[str] | None) -> list[str]:
    names = list(recorder.tasks if names is None else names)
    if unknown := [name for name in names if name not in recorder.tasks]:
        raise ValueError(f"The recording has no task {', '.join(map(repr, unknown))}. It has {list(recorder.tasks)}.")
    return names


def _mean(values: npt.NDArray[np.float32], axes: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """The mean of the finite values; nan where there is none."""
    finite = np.isfinite(values)
    count = finite.sum(axes)
    total = np.where(finite, values, 0).sum(axes, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _smooth(values: npt.NDArray[Any], window: int) -> npt.NDArray[np.float64]:
    """The mean over up to ``window`` neighbouring values, ends included; gaps stay gaps only where all is missing."""
    half = window // 2
    padded = np.pad(values.astype(np.float64), (half, window - 1 - half), constant_values=np.nan)
    if len(values) == 0:
        return padded[:0]
    return _mean(np.lib.stride_tricks.sliding_window_view(padded, window).astype(np.float32), (1,))
