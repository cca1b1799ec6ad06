"""All rules, what they need and what they claim: the table that ``python -m gradsurgery rules`` prints."""

from __future__ import annotations

import inspect
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import rules
from ._coordinates import AnyRule, CoordinateRule
from ._rule import Rule

BEGIN, END = "<!-- rules -->", "<!-- /rules -->"
BEGIN_NAMES, END_NAMES = "<!-- names of rules -->", "<!-- /names of rules -->"
FLAGS = ("separable", "random", "symmetric", "scale_equivariant", "non_conflicting")
COST = ((1, 4), (50, 32))  # groups and tasks for which a rule alone is timed


@dataclass(frozen=True)
class Entry:
    """A rule.

    Attributes:
        name: of the class.
        what: the first sentence of its docstring.
        sees: ``"losses"``, ``"gradients"``, or both; ``"coordinates"``; empty for the plain sum.
        state: whether it remembers anything.
        flags: claim → whether it is made; None if that depends on the settings.
        paper: the reference in its docstring.
        cost: seconds that it takes by itself, for each size in ``COST``; nan where it was not measured.
    """

    name: str
    what: str
    sees: str
    state: bool
    flags: dict[str, bool | None]
    paper: str
    cost: tuple[float, ...] = ()


def entries(*, timed: bool = False) -> list[Entry]:
    """All rules but ``Chain``, which is made of others: those that see gradients, then losses alone, then coordinates."""
    found = [_entry(getattr(rules, name), timed) for name in rules.__all__ if name != "Chain"]
    return sorted(
        found, key=lambda entry: ("", "gradients", "losses, gradients", "losses", "coordinates").index(entry.sees)
    )


def _entry(rule: type[AnyRule], timed: bool) -> Entry:
    doc = inspect.getdoc(rule) or ""
    looks = {"losses": ("weigh",), "gradients": ("mix", "observe")}
    seen = ["coordinates"]
    if issubclass(rule, Rule):
        seen = [w for w, names in looks.items() if any(getattr(rule, name) is not getattr(Rule, name) for name in names)]
    flags = {flag: value if isinstance(value := getattr(rule, flag), bool) else None for flag in FLAGS}
    return Entry(
        name=rule.__name__,
        what=_first_sentence(doc),
        sees=", ".join(seen),
        state=_remembers(rule),
        flags=flags,
        paper=_section(doc, "Reference"),
        cost=tuple(_seconds(rule, *size) for size in COST) if timed else (),
    )


def _remembers(rule: type[AnyRule]) -> bool:
    """Whether it has a state: with its default settings, if it can do with those."""
    if issubclass(rule, CoordinateRule):
        return False
    try:
        return bool(rule().init(["0", "1"], ["group"]))
    except (TypeError, ValueError):
        return rule.init is not Rule.init


def _first_sentence(doc: str) -> str:
    text = " ".join(doc.partition("\n\n")[0].split()).replace("``", "`")
    return re.split(r"(?<=[.])\s|:$|:\s", text)[0].rstrip(".,")


def _section(doc: str, name: str) -> str:
    found = re.search(rf"^{name}:\n((?:[ ]+.*\n?|\n(?=[ ]))+)", doc, re.MULTILINE)
    return " ".join(found[1].split()).rstrip(".").replace("``", "`") if found else ""


def _seconds(rule: type[AnyRule], groups: int, tasks: int) -> float:
    """Of one call of all moments, on random gradients; nan for rules that cannot do without settings, or Gram matrices."""
    from ._bench.timing import Contender, interleaved

    if issubclass(rule, CoordinateRule):
        return float("nan")
    try:
        made: Any = rule()
        state = made.init([str(k) for k in range(tasks)], [str(g) for g in range(groups)])
    except (TypeError, ValueError):
        return float("nan")
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(groups, tasks, 2 * tasks, generator=generator, dtype=torch.float64)
    gram, losses = jacobian @ jacobian.mT, torch.rand(tasks, generator=generator, dtype=torch.float64) + 0.1

    def run() -> None:
        weighed = made.weigh(losses, state, generator=generator)[1]
        made.mix(gram, weighed, generator=generator)

    return statistics.median(interleaved({"rule": Contender(run)}, 3, rule.__name__)["rule"])


# --- Showing ----------------------------------------------------------------------------------------------------------


def plain(found: Sequence[Entry]) -> str:
    """For a terminal."""
    head = ["rule", "sees", "state", *(flag.replace("_", " ") for flag in FLAGS)]
    timed = any(entry.cost for entry in found)
    if timed:
        head += [f"{groups} × {tasks}" for groups, tasks in COST]
    lines = [[*head, "paper"]]
    for entry in found:
        cells = [entry.name, entry.sees, _mark(entry.state), *(_mark(entry.flags[flag]) for flag in FLAGS)]
        cells += [_time(seconds) for seconds in entry.cost] if timed else []
        lines.append([*cells, entry.paper])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = ([cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)] for line in lines)
    shown = ["  ".join(cells).rstrip() for cells in padded]
    notes = ["", "sees: losses are seen ahead of the backward pass; gradients, as Gram matrices [G, K, K] after it;"]
    notes.append("coordinates, each by itself, from which the combined gradient is made.")
    if timed:
        notes.append("times: the rule alone, groups × tasks, on this machine.")
    return "\n".join([*shown, *notes])


def markdown(found: Sequence[Entry]) -> str:
    """For a page: what depends on no machine."""
    lines = ["| Rule | | Sees | Claims | Paper |", "|---|---|---|---|---|"]
    for entry in found:
        claims = [flag.replace("_", "-") for flag in FLAGS[3:] if entry.flags[flag]]
        claims = (["stateful"] if entry.state else []) + (["random"] if entry.flags["random"] else []) + claims
        lines.append(f"| `{entry.name}` | {entry.what} | {entry.sees} | {', '.join(claims)} | {_linked(entry.paper)} |")
    return "\n".join(lines)


def _linked(paper: str) -> str:
    """``arXiv:2001.06782``, ``doi:10.1016/…`` and addresses as links."""
    paper = re.sub(r"https://([^/\s]+)/[^\s,;)]+", r"[\1](\g<0>)", paper)
    paper = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", paper)
    return re.sub(r"doi:(10\.[^\s,;)]+)", r"[\g<0>](https://doi.org/\1)", paper)


def names(found: Sequence[Entry]) -> str:
    """For the README: the names alone, by what the rules see."""
    lines = ["| Rules that see | |", "|---|---|"]
    for sees in dict.fromkeys(entry.sees for entry in found):
        own = ", ".join(f"`{entry.name}`" for entry in found if entry.sees == sees)
        lines.append(f"| {sees.replace(', ', ' and ') or 'nothing'} | {own} |")
    return "\n".join(lines)


def updated(page: str) -> str:
    """The page, with the tables between their marks as they should be: all about the rules, or their names.

    Raises:
        ValueError: if the page has no such marks.
    """
    for begin, end, text in ((BEGIN, END, markdown), (BEGIN_NAMES, END_NAMES, names)):
        if page.count(begin) == page.count(end) == 1:
            before, rest = page.split(begin)
            return f"{before}{begin}\n{text(entries())}\n{end}{rest.split(end)[1]}"
    raise ValueError(f"The page must hold {BEGIN} and {END} once, around the table; or {BEGIN_NAMES} and {END_NAMES}.")


def update(path: Path) -> bool:
    """Brings a page up to date; returns whether it was not."""
    page = path.read_text(encoding="utf-8")
    new = updated(page)
    path.write_text(new, encoding="utf-8")
    return new != page


def _mark(value: bool | None) -> str:
    return {True: "yes", False: "", None: "settings"}[value]


def _time(seconds: float) -> str:
    if seconds != seconds:
        return "–"
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"
