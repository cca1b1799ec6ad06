"""Tables of results, in Markdown, and what is claimed of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gradsurgery as gs

from . import studies
from .estimates import Estimate, estimate, gap
from .protocol import Setting
from .runs import Run
from .studies import Cell, Study


class Results:
    """The kept results of a study, read as they are asked for."""

    def __init__(self, study: Study, out: Path) -> None:
        self.study, self.out = study, out
        self._found: dict[Run, dict[str, Any]] = {}

    def of(self, run: Run) -> dict[str, Any]:
        """A run's result."""
        if run not in self._found:
            self._found[run] = run.result(self.out)
        return self._found[run]

    def accuracies(self, runs: Sequence[Run]) -> list[float]:
        """In percent."""
        return [self.of(run)["accuracy"] for run in runs]

    def accuracy(self, runs: Sequence[Run]) -> Estimate:
        """The mean over seeds."""
        return estimate(self.accuracies(runs))

    def gap(self, cell: Cell) -> gs.GapResult:
        """The negative transfer gap of a cell, paired by seed."""
        return gap(self.study.seeds, self.accuracies(cell.runs), self.accuracies(cell.baseline))

    def gain(self, cell: Cell, other: Cell) -> list[float]:
        """By how much a cell is better than another one, for each seed."""
        return [a - b for a, b in zip(self.accuracies(cell.runs), self.accuracies(other.runs), strict=True)]


def short(pair: tuple[str, str]) -> str:
    """A pair's name."""
    return f"{pair[0]} → {pair[1]}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; the first column to the left."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def with_gap(results: Results, cell: Cell) -> str:
    """The accuracy, its interval, and the gap in brackets."""
    return f"{results.accuracy(cell.runs)} ({results.gap(cell).gap:+.1f})"


def table31(results: Results) -> str:
    """DANN and its gated form over rates and labelled shares."""
    study, cells = results.study, studies.table31(results.study)
    epsilons, shares = study.table31
    blocks = []
    for pair in study.main:
        rows = []
        for share in shares:
            plain, gated = ([cells[name, pair, eps, share] for eps in epsilons] for name in ("DANN", "DANN-gate"))
            gains = [estimate(results.gain(b, a)) for a, b in zip(plain, gated, strict=True)]
            for name, ntg, row in (("DANN", "NTG1", plain), ("DANN-gate", "NTG2", gated)):
                means = [results.accuracy(cell.runs) for cell in row]
                average = f"{np.mean([m.mean for m in means]):.1f}"
                rows.append([f"{share:g} % {name}", *map(str, means), average])
                gaps = [results.gap(cell) for cell in row]
                each = (str(Estimate(g.gap, *g.interval)) for g in gaps)
                rows.append([f"{share:g} % {ntg}", *each, f"{np.mean([g.gap for g in gaps]):+.1f}"])
            rows.append([f"{share:g} % Δ", *map(str, gains), f"{np.mean([gain.mean for gain in gains]):+.1f}"])
        head = [short(pair), *(f"ε = {eps:g}" for eps in epsilons), "mean"]
        blocks.append(table(head, rows))
    return "\n".join(blocks)


def table32(results: Results, eps: float = 0.7) -> str:
    """All methods on all pairs."""
    study, cells = results.study, studies.table32(results.study, eps)
    rows = []

    def add(name: str, texts: Sequence[str], last: str) -> None:
        rows.append([name, *texts, last])

    def add_method(name: str) -> None:
        row = [cells[name, pair] for pair in study.pairs]
        average = np.mean([results.accuracy(cell.runs).mean for cell in row])
        ntg = np.mean([results.gap(cell).gap for cell in row])
        add(name, [with_gap(results, cell) for cell in row], f"{average:.1f} ({ntg:+.1f})")

    for name in study.classical:
        add_method(name)
    gains = []
    for name in study.methods:
        add_method(name)
        add_method(f"{name}-gate")
        each = [results.gain(cells[f"{name}-gate", pair], cells[name, pair]) for pair in study.pairs]
        gains.append(each)
        add(f"Δ {name}", [str(estimate(gain)) for gain in each], str(estimate(np.mean(each, 0))))
    by_pair = np.mean(gains, 0)  # [pairs, seeds]
    add("Δ mean", [str(estimate(gain)) for gain in by_pair], str(estimate(by_pair.mean(0))))
    return table(["", *map(short, study.pairs), "mean"], rows)


def table33(results: Results) -> str:
    """Covariate shift: images are perturbed, labels are right."""
    cells = studies.table33(results.study)
    methods, columns = (list(dict.fromkeys(key)) for key in zip(*((k[0], k[1:]) for k in cells), strict=True))
    rows = [[m, *(with_gap(results, cells[m, eps, share]) for eps, share in columns)] for m in methods]
    return table([short(results.study.main[0]), *(f"ε_x = {e:g}, {share:g} %" for e, share in columns)], rows)


def table34(results: Results) -> str:
    """Parts of the gated method."""
    study, cells = results.study, studies.table34(results.study)
    rows = []
    for name in studies.ABLATION:
        each = [results.accuracies(cells[name, eps, share]) for eps, share in study.table34]
        rows.append([name, *(str(estimate(values)) for values in each), str(estimate(np.mean(each, 0)))])
    return table([short(study.main[0]), *(f"{eps:g}, {share:g} %" for eps, share in study.table34), "mean"], rows)


# --- What is claimed --------------------------------------------------------------------------------------------------


def claims(results: Results, asked: Sequence[str]) -> str:
    """Each claim, with its figure and interval, and whether it holds; only those whose runs were asked for."""
    lines: list[str] = []
    if "figure33" in asked or "table31" in asked:
        lines += sign_claim(results, asked)
    if "checks" in asked:
        lines += gate_claims(results) + weight_claims(results)
    if "figure33" in asked and 1.0 in results.study.epsilons:
        lines += useless_claim(results, asked)
    return "\n".join(f"- {line}" for line in lines) + "\n"


FEW = f"{studies.HARD['labelled']:g} %, at most {studies.HARD['at_most']} of a class"


def figure_setting(study: Study, eps: float) -> Setting:
    """Of Figure 3.3(a)."""
    return study.setting(study.main[0], eps, labelled=20.0)


def said(holds: bool) -> str:
    """In a word."""
    return "**met**" if holds else "**not met**"


def sign_claim(results: Results, asked: Sequence[str]) -> list[str]:
    """The gap of DANN is negative for a good source and positive for a bad one."""
    study, lines = results.study, []
    curves: dict[tuple[str, str], dict[float, Cell]] = {}  # pair and labels → rate → cell
    if "figure33" in asked:
        pair = study.main[0]
        curves[short(pair), "20 %"] = {
            eps: studies.cell(study, "DANN", figure_setting(study, eps)) for eps in study.epsilons
        }
    if "table31" in asked:
        for (method, pair, eps, share), cell in studies.table31(study).items():
            if method == "DANN":
                curves.setdefault((short(pair), f"{share:g} %"), {})[eps] = cell
    if "checks" in asked:
        for (method, pair, eps), cell in studies.checks(study).items():
            if method == "DANN":
                curves.setdefault((short(pair), FEW), {})[eps] = cell
    holds = 0
    for (name, labels), cells in sorted(curves.items()):
        gaps = [(eps, results.gap(cell)) for eps, cell in sorted(cells.items())]
        (first, good), (last, bad) = gaps[0], gaps[-1]
        change = good.interval[1] < 0 < bad.interval[0]
        holds += change
        low, high = (Estimate(g.gap, *g.interval).bounds for g in (good, bad))
        lines.append(f"  - {name}, {labels}: {low} at ε = {first:g}, {high} at ε = {last:g}: {said(change)}")
    return [f"NTG of DANN changes sign as ε grows, for {holds} of {len(curves)} curves: {said(holds > 0)}", *lines]


def gate_claims(results: Results) -> list[str]:
    """The gate helps where the source is bad, and does no harm where it is good."""
    study, cells = results.study, studies.checks(results.study)
    gains: Mapping[tuple[str, float], list[float]] = {
        (method, eps): list(
            np.mean([results.gain(cells[f"{method}-gate", pair, eps], cells[method, pair, eps]) for pair in study.pairs], 0)
        )
        for method in study.methods
        for eps in {eps for _, _, eps in cells}
    }
    bad = [eps for eps in sorted({eps for _, eps in gains}) if eps >= 0.3]
    helped = {m: estimate(list(np.mean([gains[m, eps] for eps in bad], 0))) for m in study.methods}
    harmless = {m: estimate(gains[m, 0.0]) for m in study.methods}
    clear = sum(one.low > 0 for one in helped.values())
    needed = min(4, len(study.methods))
    fine = all(one.mean >= -1 for one in harmless.values())
    return [
        f"Gated better than not, mean over ε of {', '.join(f'{eps:g}' for eps in bad)}, clear of zero for {clear} of "
        f"{len(helped)} methods (at least {needed}): {said(clear >= needed)}",
        *(f"  - {m}: {one.bounds}" for m, one in helped.items()),
        f"At ε = 0 the gate costs no more than one point: {said(fine)}",
        *(f"  - {m}: {one.bounds}" for m, one in harmless.items()),
    ]


def weight_claims(results: Results) -> list[str]:
    """Clean source samples weigh at least twice as much as perturbed ones."""
    study, lines, holds = results.study, [], True
    for (method, pair, eps), cell in studies.checks(study).items():
        if method == "DANN-gate" and 0.3 <= eps <= 0.7:
            found = [results.of(run) for run in cell.runs]
            ratio = estimate([one["clean"] / one["perturbed"] for one in found])
            holds &= ratio.mean >= 2
            lines.append(f"  - {short(pair)}, ε = {eps:g}: {ratio.bounds}")
    return [f"Mean weight of clean over perturbed source, DANN-gate, at least 2 for ε in [.3, .7]: {said(holds)}", *lines]


def useless_claim(results: Results, asked: Sequence[str]) -> list[str]:
    """A source that is all wrong does no harm to the gated method."""
    study = results.study
    cells = {f"{short(study.main[0])}, 20 %": studies.cell(study, "DANN-gate", figure_setting(study, 1.0))}
    if "checks" in asked:
        for (method, pair, eps), cell in studies.checks(study).items():
            if method.endswith("-gate") and eps == 1:
                cells[f"{method}, {short(pair)}, {FEW}"] = cell
    gaps = {name: results.gap(cell) for name, cell in cells.items()}
    first = next(iter(gaps.values()))
    lines = [
        f"  - {name}: {Estimate(one.gap, *one.interval).bounds}: {said(one.gap <= 2)}"
        for name, one in list(gaps.items())[1:]
    ]
    text = Estimate(first.gap, *first.interval).bounds
    where = next(iter(gaps))
    return [
        f"At ε = 1, gated DANN within 2 points of target only (NTG at most 2), {where}: {text}: {said(first.gap <= 2)}",
        *lines,
    ]
