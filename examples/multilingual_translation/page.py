"""One self-contained HTML page of what has been run: tables, pictures, commands, versions. It loads nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import STYLE
from .train import Result, write_whole

_INK = "#0a0b0c"  # stands for the page's own text colour
_DRAWN = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "legend.labelcolor": _INK,
}


@dataclass
class Album:
    """Pictures that belong together, each an SVG with what it shows; folded away unless ``shown``."""

    title: str
    pictures: list[tuple[str, str]]
    shown: bool = True


@dataclass
class Section:
    """Part of the page.

    Attributes:
        title: its heading.
        question: what it is about, and how to read it; Markdown, as are all texts.
        text: what was found, with tables.
        albums: pictures.
        numbers: a few that matter most, each with what it is, for the top of the page.
    """

    title: str
    question: str = ""
    text: str = ""
    albums: list[Album] = field(default_factory=list)
    numbers: list[tuple[str, str]] = field(default_factory=list)

    @property
    def markdown(self) -> str:
        """What is printed and written beside the page."""
        return f"{self.question}\n\n{self.text}" if self.question else self.text


def picture(draw: Callable[[Axes], object], size: tuple[float, float], salt: str) -> str:
    """What ``draw`` draws, as SVG that takes its text colour from the page.

    Args:
        draw: draws on axes.
        size: inches.
        salt: makes the ids inside differ from those of other pictures on the page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_DRAWN, "svg.hashsalt": salt}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r' id="(figure|axes|patch|matplotlib|xtick|ytick|text|line2d|legend)[\w.]*"', "", svg)


def save(draws: Sequence[Callable[[Axes], object]], size: tuple[float, float], path: Path) -> None:
    """What each of ``draws`` draws, side by side, as a PNG on white, for documents that are not this page."""
    figure = Figure(figsize=size, layout="constrained")
    for draw, ax in zip(draws, figure.subplots(1, len(draws), squeeze=False)[0], strict=True):
        draw(ax)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())


def write(sections: Sequence[Section], commands: Sequence[str], results: Sequence[Result], wanted: int, path: Path) -> None:
    """Writes the page.

    Args:
        sections: what it is made of.
        commands: that make it again.
        results: of all runs.
        wanted: how many runs there would be if all were made.
        path: of the file.
    """
    facts = {
        "Settings": {", ".join(f"{k}={v}" for k, v in result.job["settings"].items()) for result in results},
        "Texts, by fingerprint": {f"{_texts(result)}: {result.corpus}" for result in results},
        "Metrics": {f"{name.partition(' ')[0]}: {text}" for result in results for name, text in result.signatures.items()},
        "Versions": {", ".join(sorted(f"{name} {version}" for name, version in it.versions.items())) for it in results},
    }
    seeds = ", ".join(map(str, sorted({result.job["seed"] for result in results})))
    steps = sorted({result.job["settings"]["steps"] for result in results})
    links = "".join(f'<a href="#{_slug(section.title)}">{escape(section.title)}</a>' for section in sections)
    numbers = "".join(
        f"<div><b>{_inline(value)}</b><span>{escape(what)}</span></div>"
        for section in sections
        for value, what in section.numbers
    )
    missing = (
        f" The other {wanted - len(results)} have not been made, and their rows say so." if len(results) < wanted else ""
    )
    parts = [
        "<header><h1>Gradient Vaccine on multilingual translation</h1>",
        '<p class="lead">One Transformer translates between English and many languages. Which languages’ gradients agree, '
        "and does it help to make them agree more?</p>",
        f'<p class="note">{len(results)} of {wanted} runs; seeds {seeds}; {_span(steps)} steps each.{missing} ± is the '
        "95 % interval over the seeds; one seed alone says nothing about differences between methods.</p>",
        f'<nav>{links}<a href="#again">How to run it again</a></nav></header>',
        f'<div class="numbers">{numbers}</div>' if numbers else "",
    ]
    for section in sections:
        parts.append(f'<section id="{_slug(section.title)}"><h2>{escape(section.title)}</h2>')
        parts += [html(section.question, "question"), html(section.text), *map(_album, section.albums), "</section>"]
    parts.append('<section id="again"><h2>How to run it again</h2>')
    parts.append(f"<pre>{escape(chr(10).join(commands))}</pre>")
    for title, lines in facts.items():
        parts.append(f"<h3>{title}</h3><pre>{escape(chr(10).join(sorted(lines)))}</pre>")
    head = (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Gradient Vaccine on translation</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    )
    page = f"{head}<style>{STYLE}</style>\n<main>\n" + "\n".join(filter(None, parts)) + "\n</section></main>\n</html>\n"
    write_whole(path, page.encode("utf-8"))


def _texts(result: Result) -> str:
    return ", ".join(result.job["recipe"]["languages"]) if "recipe" in result.job else "treebanks"


def _album(album: Album) -> str:
    shown = "\n".join(f"<figure>{svg}<figcaption>{_inline(what)}</figcaption></figure>" for what, svg in album.pictures)
    shown = f'<div class="album">{shown}</div>'
    if not album.title:
        return shown
    return f"<details{' open' if album.shown else ''}><summary>{escape(album.title)}</summary>{shown}</details>"


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.casefold()).strip("-")


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


# --- Markdown, as our texts have it -------------------------------------------------------------------------------------


def html(text: str, kind: str = "") -> str:
    """Paragraphs, tables and ``**bold**`` as HTML. A paragraph that is bold as a whole is a heading."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        if not lines:
            continue
        if lines[0].startswith("|"):
            found.append(_table(lines))
        elif re.fullmatch(r"\*\*[^*]+\*\*", block):
            found.append(f"<h3>{escape(block.strip('*'), quote=False)}</h3>")
        else:
            found.append(f"<p{f' class={kind}' if kind else ''}>{_inline(' '.join(lines))}</p>")
    return "\n".join(found)


def _table(lines: Sequence[str]) -> str:
    head, marks, *rows = ([cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines)
    kinds = ["" if mark.endswith(":") else ' class="words"' for mark in marks]
    top = "".join(f"<th{kind}>{_inline(cell)}</th>" for kind, cell in zip(kinds, head, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{_inline(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _inline(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text, quote=False))
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
    text = re.sub(r" ± ([\d.]+)", r'<span class="pm"> ± \1</span>', text)
    return '<span class="none">not run yet</span>' if text == "not run yet" else text
