"""One self-contained HTML page of what has been run: tables, pictures, commands, versions."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gradsurgery as gs

from .languages import FAMILY, other
from .study import PARTS
from .train import Result, write_whole

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; } pre { background: #f4f6f8; padding: .8rem; overflow-x: auto; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead { border-bottom: 1px solid #888; }
img { max-width: 100%; height: auto; }
"""


@dataclass
class Section:
    """Part of the page: text with tables, in Markdown, and pictures with what they show."""

    title: str
    text: str = ""
    pictures: list[tuple[str, bytes]] = field(default_factory=list)


def picture(draw: Callable[[Axes], object], size: tuple[float, float]) -> bytes:
    """An SVG file of what ``draw`` draws."""
    figure, buffer = Figure(figsize=size, layout="constrained"), io.BytesIO()
    draw(figure.subplots())
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def of_geometry(name: str, recorder: gs.Recorder) -> list[tuple[str, bytes]]:
    """Heat maps of both halves (Figures 6.2 and 6.5), and similarities by layer over the steps (Figure 6.4)."""
    size = (2.2 + 0.32 * len(recorder.tasks), 1.8 + 0.3 * len(recorder.tasks))
    families = {task: FAMILY[other(task)] for task in recorder.tasks}
    found = []
    for part, groups in PARTS.items():

        def heatmap(ax: Axes, part: str = part, groups: Sequence[str] = groups) -> None:
            gs.plots.cosine_heatmap(recorder, groups=groups, families=families, ax=ax)
            ax.set_title(f"{name}: {part}")

        found.append((f"{name}: cosine similarity of {part} gradients on the same sentences", picture(heatmap, size)))
    layers = [group for group in recorder.groups if re.match(r"(en|de)coder\.", group)]
    lines = picture(lambda ax: gs.plots.similarity(recorder, groups=layers, window=1, ax=ax), (7.5, 3.8))
    return [*found, (f"{name}: mean similarity by layer, at the checkpoints", lines)]


def of_operations(results: Mapping[str, Result]) -> list[tuple[str, bytes]]:
    """How many pairs each rule operated on over the steps (Figure 6.7)."""
    recordings = {name: result.recorder for name, result in results.items() if result.recorder.operated.any()}
    if not recordings:
        return []
    return [("Pairs operated on", picture(lambda ax: gs.plots.operations(recordings, ax=ax), (7.5, 3.8)))]


def write(sections: Sequence[Section], commands: Sequence[str], results: Sequence[Result], path: Path) -> None:
    """Writes the page; it loads nothing."""
    versions = sorted({f"{name} {version}" for result in results for name, version in result.versions.items()})
    signatures = sorted({f"{name}: {text}" for result in results for name, text in result.signatures.items()})
    settings = sorted({", ".join(f"{k}={v}" for k, v in result.job["settings"].items()) for result in results})
    corpora = sorted({f"{', '.join(result.job['recipe']['languages'])}: {result.corpus}" for result in results})
    seeds = sorted({result.job["seed"] for result in results})
    parts = [
        "<h1>Gradient Vaccine on multilingual translation</h1>",
        f"<p>{len(results)} runs, seeds {', '.join(map(str, seeds))}. ± is the 95 % interval over the seeds; one seed "
        "alone says nothing about differences between methods. What was not run says so.</p>",
    ]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        parts.append(html(section.text))
        for caption, svg in section.pictures:
            data = base64.b64encode(svg).decode("ascii")
            parts.append(
                f'<p><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}"><br>{escape(caption)}.</p>'
            )
    parts += ["<h2>How to run it again</h2>", f"<pre>{escape(chr(10).join(commands))}</pre>"]
    for title, lines in (
        ("Settings", settings), ("Versions", versions), ("Texts, by fingerprint", corpora), ("Metrics", signatures)
    ):  # fmt: skip
        parts.append(f"<h3>{title}</h3><pre>{escape(chr(10).join(lines))}</pre>")
    head = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Gradient Vaccine on translation</title>\n'
    page = f"{head}<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    write_whole(path, page.encode("utf-8"))


def html(text: str) -> str:
    """Markdown as our tables have it, paragraphs, pipes and ``**bold**``, as HTML."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        if not lines:
            continue
        if lines[0].startswith("|"):
            head, _, *rows = ([_inline(cell.strip()) for cell in line.strip("| ").split(" | ")] for line in _filled(lines))
            body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
            top = "".join(f"<th>{cell}</th>" for cell in head)
            found.append(f'<div class="table"><table><thead><tr>{top}</tr></thead>\n{body}</table></div>')
        else:
            found.append(f"<p>{_inline(' '.join(lines))}</p>")
    return "\n".join(found)


def _filled(lines: Sequence[str]) -> list[str]:
    """With something in empty cells, so that none is lost."""
    return [re.sub(r"\|(?=\s*\|)", "| \u00a0 ", line) for line in lines]


def _inline(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text, quote=False))
