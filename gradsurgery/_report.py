"""One page about a training run: where its tasks were in conflict, what the rule did about it, and what that took."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from . import plots
from ._recorder import Recorder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PAIRS = 15  # in a table of pairs
_LINES = 8  # surgery groups in one picture

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0; }
.figures div { background: #f4f6f8; border-radius: .5rem; padding: .6rem 1rem; }
.figures b { display: block; font-size: 1.5rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; } th:first-child, td:first-child { text-align: left; }
thead { border-bottom: 1px solid #888; } td.bar { min-width: 9rem; }
td.bar i { display: inline-block; height: .7rem; background: #c1554d; margin-right: .4rem; }
td.bar.did i { background: #3f72a6; } img { max-width: 100%; height: auto; } .note { color: #666; }
"""


def report(
    recording: Recorder,
    path: str | PathLike[str],
    *,
    title: str = "Gradient surgery",
    families: Mapping[str, str] | None = None,
    seconds: Mapping[str, Sequence[float]] | None = None,
) -> Path:
    """Writes one self-contained HTML page about a recording: pictures and tables are in it, and it loads nothing.

    It has the mean cosine similarity of all pairs of tasks, how often they were in conflict, by surgery group and by pair,
    which pairs the rule operated on, how similarities and losses went over the steps, and what the steps took.

    Args:
        recording: of any training run.
        path: where to write the page.
        title: heading of the page.
        families: task → family, as for :func:`gradsurgery.plots.cosine_heatmap`.
        seconds: name → the time of each step, as measured by you: the run's, and those of others to compare it with,
            such as plain training. Ratios are to the last one.

    Returns:
        The path.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a recording without steps, or without surgery groups, and for ``seconds`` without a time.

    Example:
        >>> import tempfile, torch, gradsurgery as gs
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.PCGrad(), model=model)
        >>> recorder = gs.Recorder(opt)
        >>> for _ in range(3):
        ...     prediction = model(torch.ones(1, 2)).sum()
        ...     opt.backward({"up": -prediction, "down": 2 * prediction})
        ...     opt.step(); opt.zero_grad()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = gs.report(recorder, f"{folder}/report.html", seconds={"PCGrad": [0.2, 0.3], "plain": [0.2, 0.2]})
        ...     "<b>100%</b> of pairs in conflict" in page.read_text(encoding="utf-8")
        True
    """
    if not len(recording.steps):
        raise ValueError("The recording has no steps. Make the Recorder before the training loop: Recorder(optimizer).")
    if not recording.groups:
        raise ValueError(
            "The recording has no surgery groups: no parameter was shared by two tasks, or the optimizer has measure=False."
        )
    for name, times in (seconds or {}).items():
        if not times:
            raise ValueError(f"`seconds[{name!r}]` must be the times of steps. Found none.")
    cosines, operated, steps = recording.cosines, recording.operated, recording.steps
    measured = np.isfinite(cosines)
    conflict = cosines < 0
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{len(recording.tasks)} tasks, {_count(len(recording.groups), "surgery group")}, '
        f"{_count(len(steps), 'recorded step')} ({steps[0]} to {steps[-1]}).</p>",
        _figures(conflict, operated, measured, cosines, seconds),
        "<h2>Which tasks agree</h2>",
        _picture(
            "Mean cosine similarity of the tasks' gradients",
            lambda ax: plots.cosine_heatmap(recording, families=families, ax=ax),
            (2.2 + 0.45 * len(recording.tasks), 1.6 + 0.4 * len(recording.tasks)),
        ),
        "<p>The mean over all recorded steps and surgery groups. Blue: the tasks' gradients agree; red: they conflict.</p>",
        "<h2>Who is in conflict</h2>",
        _pairs(recording.tasks, cosines, conflict, operated, measured),
        "<h2>Where</h2>",
        _groups(recording.groups, cosines, conflict, operated, measured),
        "<h2>What the rule did</h2>",
        _operations(recording, operated, measured),
        "<h2>Over the steps</h2>",
        _over_steps(recording),
    ]
    if seconds:
        sections += ["<h2>What it took</h2>", _times(seconds)]
    page = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n'
        + "\n".join(sections)
        + "\n</html>\n"
    )
    target = Path(path)
    target.write_text(page, encoding="utf-8")
    return target


Numbers = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


def _figures(
    conflict: Flags, operated: Flags, measured: Flags, cosines: Numbers, seconds: Mapping[str, Sequence[float]] | None
) -> str:
    total = int(measured.sum())
    if not total:
        return "<p>No pair of tasks was measured: in no step did two of them reach the same parameters.</p>"
    shown = [
        (f"{conflict.sum() / total:.0%}", "of pairs in conflict"),
        (f"{operated.sum() / total:.0%}", "of pairs operated on"),
        (f"{np.nanmean(cosines):.2f}", "mean cosine similarity"),
    ]
    if seconds:
        name, times = next(iter(seconds.items()))
        shown.append((_duration(statistics.median(times)), f"a step of {escape(name)}"))
    return '<div class="figures">' + "".join(f"<div><b>{value}</b> {what}</div>" for value, what in shown) + "</div>"


def _pairs(tasks: Sequence[str], cosines: Numbers, conflict: Flags, operated: Flags, measured: Flags) -> str:
    count = measured.sum((0, 1))
    rows = []
    for i, one in enumerate(tasks):
        for j in range(i + 1, len(tasks)):
            if count[i, j]:
                mean = float(np.nanmean(cosines[:, :, i, j]))
                ways = [operated[:, :, a, b].sum() / count[i, j] for a, b in ((i, j), (j, i))]
                rows.append((conflict[:, :, i, j].sum() / count[i, j], -mean, one, tasks[j], ways))
    rows.sort(key=lambda row: row[:2], reverse=True)
    cells = [
        [f"{one} and {other}", _bar(share), f"{-mean:.2f}", *(f"{way:.0%}" for way in ways)]
        for share, mean, one, other, ways in rows[:_PAIRS]
    ]
    heads = ["pair", "in conflict", "mean cosine", "first operated on", "second operated on"]
    more = f'<p class="note">The {_PAIRS} of {len(rows)} pairs that were in conflict most often.</p>'
    return _table(heads, cells) + (more if len(rows) > _PAIRS else "")


def _groups(groups: Sequence[str], cosines: Numbers, conflict: Flags, operated: Flags, measured: Flags) -> str:
    cells = []
    for c, name in enumerate(groups):
        if count := int(measured[:, c].sum()):
            shares = (_bar(conflict[:, c].sum() / count), _bar(operated[:, c].sum() / count, "did"))
            cells.append([name, *shares, f"{np.nanmean(cosines[:, c]):.2f}"])
    return _table(["surgery group", "pairs in conflict", "pairs operated on", "mean cosine"], cells)


def _operations(recording: Recorder, operated: Flags, measured: Flags) -> str:
    if not operated.any():
        return "<p>It added no part of one task's gradient to another's: it only weighs them, or never had a reason to.</p>"
    picture = _picture(
        "Pairs operated on, over the steps", lambda ax: plots.operations({"rule": recording}, ax=ax), (7.5, 3.2)
    )
    cells = [
        [name, _bar(operated[:, :, i].sum() / count, "did"), f"{operated[:, :, :, i].sum() / count:.0%}"]
        for i, name in enumerate(recording.tasks)
        if (count := int(measured[:, :, i].sum()))
    ]
    return picture + _table(["task", "its gradient was changed", "it changed another's"], cells)


def _over_steps(recording: Recorder) -> str:
    groups = recording.groups
    chosen = [groups[c] for c in np.linspace(0, len(groups) - 1, min(len(groups), _LINES)).round().astype(int)]
    picture = _picture(
        "Mean cosine similarity by surgery group",
        lambda ax: plots.similarity(recording, groups=chosen, ax=ax),
        (7.5, 3.8),
    )
    if len(groups) > len(chosen):
        picture += f'<p class="note">{len(chosen)} of the {len(groups)} surgery groups.</p>'

    def losses(ax: Axes) -> None:
        for task, values in zip(recording.tasks, recording.losses.T, strict=True):
            there = np.isfinite(values)
            ax.plot(recording.steps[there], values[there], linewidth=0.9, label=task)
        ax.set(xlabel="step", ylabel="loss", title="Losses, as the optimizer was given them")
        ax.spines[["top", "right"]].set_visible(False)
        if len(recording.tasks) <= 2 * _LINES:
            ax.legend(frameon=False, fontsize=8, ncols=2)

    return picture + _picture("Losses of the tasks", losses, (7.5, 3.8))


def _times(seconds: Mapping[str, Sequence[float]]) -> str:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    last = list(medians)[-1]
    cells = [
        [name, _duration(median), f"{median / medians[last]:.2f}" if medians[last] else "", str(len(seconds[name]))]
        for name, median in medians.items()
    ]
    return _table(["", "median time of a step", f"relative to {last}", "steps"], cells)


# --- HTML ---------------------------------------------------------------------------------------------------------------


class _Bar(str):
    """A cell that is HTML already."""

    kind = ""


def _bar(share: float, kind: str = "") -> _Bar:
    bar = _Bar(f'<i style="width: {6 * share:.2f}rem"></i>{share:.0%}')
    bar.kind = f" {kind}" if kind else ""
    return bar


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        return f'<td class="bar{text.kind}">{text}</td>' if isinstance(text, _Bar) else f"<td>{escape(text)}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _picture(alt: str, draw: Callable[[Axes], object], size: tuple[float, float]) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('A report has pictures, which need matplotlib: pip install "gradsurgery[plots]".') from error
    figure = Figure(figsize=size, layout="constrained")  # without pyplot, which would keep it
    draw(figure.subplots())
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    # As an image of its own: the ids inside one SVG never meet those of another.
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<p><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}"></p>'


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
