"""The tables of the runs, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from sacrebleu.significance import PairedTest

from examples.translation.report import interval

from .corpus import Corpus
from .jobs import DIRECTIONS, Scale
from .languages import tasks_of
from .methods import ABLATIONS, BILINGUAL, JOINT, LONGER, TABLE_65
from .train import Job, Result, metrics, references_of, scarce

Results = Mapping[Job, Result]

WORDS = {"from-en": "En→Any", "to-en": "Any→En"}
NOT_RUN = "not run yet"


def of_method(results: Results, method: str, tasks: Sequence[str]) -> dict[int, Result]:
    """Seed → result of a method on these tasks; the bilingual models of a seed count as one, if all are there."""
    if method != BILINGUAL:
        return {job.seed: found for job, found in results.items() if job.method == method and job.tasks == tuple(tasks)}
    apart: dict[int, dict[str, Result]] = {}
    for job, found in results.items():
        if job.method == BILINGUAL and job.tasks[0] in tasks:
            apart.setdefault(job.seed, {})[job.tasks[0]] = found
    whole = {seed: [of[task] for task in tasks] for seed, of in apart.items() if set(of) == set(tasks)}
    return {seed: _merged(of) for seed, of in whole.items()}


def _merged(results: Sequence[Result]) -> Result:
    merged = Result(results[0].job, results[0].corpus)
    for found in results:
        for name in ("bleu", "chrf", "f1", "accuracy", "texts"):
            getattr(merged, name).update(getattr(found, name))
        for part, losses in found.loss.items():
            merged.loss.setdefault(part, {}).update(losses)
        merged.milliseconds += found.milliseconds
    return merged


Score = Callable[[Result], Mapping[str, float]]

LOSS = "validation loss (nats per piece)"

SCORES: dict[str, Score] = {
    "BLEU": lambda result: result.bleu,
    "chrF": lambda result: result.chrf,
    LOSS: lambda result: result.loss["valid"],
}


def scores(results: Results, methods: Sequence[str], tasks: Sequence[str], score: Score, digits: int = 2) -> str:
    """A row for each method: each task, the average, and its difference to plain joint training, seed by seed."""
    lines = [
        f"| | {' | '.join(tasks)} | average | vs. {JOINT} | seeds |",
        "|---|" + "--:|" * (len(tasks) + 3),
    ]
    best = _best(results, methods, tasks, score, digits)
    for method in methods:
        found = of_method(results, method, tasks)
        if not found:
            lines.append(f"| {method} | " + " | ".join([NOT_RUN] * (len(tasks) + 2)) + " | 0 |")
            continue
        columns = [[score(one)[task] for one in found.values()] for task in tasks]
        columns.append([statistics.fmean(score(one)[task] for task in tasks) for one in found.values()])
        cells = [interval(values, digits) for values in columns]
        if method != BILINGUAL:
            cells = [
                f"**{cell}**" if round(statistics.fmean(values), digits) == top else cell
                for cell, values, top in zip(cells, columns, best, strict=True)
            ]
        differs = change(results, method, tasks, score, digits) if method != JOINT else ""
        lines.append(f"| {method} | {' | '.join(cells)} | {differs} | {len(found)} |")
    return "\n".join(lines)


def change(results: Results, method: str, tasks: Sequence[str], score: Score | None = None, digits: int = 2) -> str:
    """The average over the tasks minus that of plain joint training, seed by seed; empty if they share no seed."""
    score = SCORES["BLEU"] if score is None else score
    means = {
        name: {
            seed: statistics.fmean(score(one)[task] for task in tasks)
            for seed, one in of_method(results, name, tasks).items()
        }
        for name in (method, JOINT)
    }
    common = sorted(set(means[method]) & set(means[JOINT]))
    return interval([means[method][seed] - means[JOINT][seed] for seed in common], digits) if common else ""


def _best(results: Results, methods: Sequence[str], tasks: Sequence[str], score: Score, digits: int) -> list[float]:
    """The best mean of each column among the multilingual methods; nan where all are the same."""
    top = min if score is SCORES[LOSS] else max
    columns: list[list[float]] = [[] for _ in (*tasks, "average")]
    for method in methods:
        found = [] if method == BILINGUAL else list(of_method(results, method, tasks).values())
        if found:
            means = [statistics.fmean(score(one)[task] for one in found) for task in tasks]
            for column, value in zip(columns, (*means, statistics.fmean(means)), strict=True):
                column.append(round(value, digits))
    return [top(column) if len(set(column)) > 1 else float("nan") for column in columns]


def table_65(results: Results, scale: Scale, corpus: Corpus | None) -> str:
    """Table 6.5 in BLEU, chrF and loss, for both directions, with paired bootstrap tests."""
    parts = []
    for direction in DIRECTIONS:
        tasks = tasks_of(scale.four().languages, direction)
        for name, score in SCORES.items():
            parts.append(f"**{WORDS[direction]}, {name}**\n\n{scores(results, TABLE_65, tasks, score, _digits(name))}")
        if corpus is not None and (found := bootstrap(results, TABLE_65, tasks, corpus)):
            parts.append(f"**{WORDS[direction]}, paired bootstrap against {JOINT}: p-values of BLEU**\n\n{found}")
    return "\n\n".join([*parts, _did(results, scale)])


def ablations(results: Results, scale: Scale) -> str:
    """Tables 6.2 to 6.4."""
    tasks = tasks_of(scale.four().languages, "from-en")
    parts = [
        f"**{title}, {name}**\n\n{scores(results, (JOINT, *rows), tasks, score, _digits(name))}"
        for title, rows in ABLATIONS.items()
        for name, score in SCORES.items()
    ]
    return "\n\n".join([*parts, _did(results, scale)])


def _did(results: Results, scale: Scale) -> str:
    return f"**What each method saw, did and took**\n\n{costs(results, scale)}"


def _digits(name: str) -> int:
    return 3 if name == LOSS else 2


def longer(results: Results, scale: Scale) -> str:
    """The rows of Table 6.5 that were trained longer, and what they saw, did and took."""
    tasks, rows = tasks_of(scale.four().languages, "from-en"), (BILINGUAL, *LONGER)
    parts = [f"**{name}**\n\n{scores(results, rows, tasks, score, _digits(name))}" for name, score in SCORES.items()]
    return "\n\n".join([*parts, _did(results, scale)])


def bootstrap(results: Results, methods: Sequence[str], tasks: Sequence[str], corpus: Corpus, samples: int = 1000) -> str:
    """How likely differences in BLEU to plain joint training are by the choice of test pairs alone.

    The translations of all seeds that two methods share are put together, so that this says nothing about other seeds.
    """
    base = of_method(results, JOINT, tasks)
    rows = []
    for method in methods:
        found = of_method(results, method, tasks)
        common = sorted(set(found) & set(base))
        if method == JOINT or not common:
            continue
        cells = []
        for task in tasks:
            systems = [
                (name, [text for seed in common for text in of[seed].texts[task]])
                for name, of in ((JOINT, base), (method, found))
            ]
            references = [references_of(corpus, task) * len(common)]
            test = PairedTest(systems, {"BLEU": metrics(task)[0]}, references, test_type="bs", n_samples=samples)
            _, scored = test()
            cells.append(f"{scored['BLEU'][1].p_value:.3f}")
        rows.append(f"| {method} | {' | '.join(cells)} |")
    if not rows:
        return ""
    return "\n".join([f"| | {' | '.join(tasks)} |", "|---|" + "--:|" * len(tasks), *rows])


def costs(results: Results, scale: Scale) -> str:
    """What each method saw, did and took, from English."""
    tasks = tasks_of(scale.four().languages, "from-en")
    base = of_method(results, JOINT, tasks)
    lines = [
        f"| | pairs in conflict | pairs operated on | step | relative to {JOINT} | weights of {', '.join(tasks)} |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for method in (*TABLE_65, *(row for rows in ABLATIONS.values() for row in rows if row not in TABLE_65)):
        found = list(of_method(results, method, tasks).values())
        if not found or method == BILINGUAL:
            continue
        conflict, operated = (
            statistics.fmean(getattr(one.recorder, rate)() for one in found) for rate in ("conflict_rate", "operation_rate")
        )
        step = statistics.median(one.step_ms for one in found)
        relative = f"{step / statistics.median(one.step_ms for one in base.values()):.2f}" if base else ""
        weights = ", ".join(f"{statistics.fmean(one.weights[task] for one in found):.2f}" for task in tasks)
        lines.append(f"| {method} | {conflict:.1%} | {operated:.1%} | {step:.0f} ms | {relative} | {weights} |")
    return "\n".join(lines) if len(lines) > 2 else NOT_RUN


def massive(results: Results, jobs: Sequence[Job], corpora: Mapping[Job, Corpus]) -> str:
    """Table 6.6: mean BLEU over the languages with many training pairs, with few, and over all."""
    parts = []
    for direction in DIRECTIONS:
        lines = [f"| {WORDS[direction]} | many pairs | few pairs | all | runs |", "|---|--:|--:|--:|--:|"]
        rows: dict[str, list[Job]] = {}
        for job in jobs:
            if job.tasks == tasks_of(job.recipe.languages, direction):
                rows.setdefault(_row(job), []).append(job)
        for name, of_row in rows.items():
            found = [job for job in of_row if job in results]
            if not found:
                lines.append(f"| {name} | {NOT_RUN} | {NOT_RUN} | {NOT_RUN} | 0 |")
                continue
            cells: list[list[float]] = [[], [], []]
            for job in found:
                bleu, few = results[job].bleu, set(scarce(corpora[job], job.tasks))
                for cell, its in zip(cells, (bleu.keys() - few, few, bleu.keys()), strict=True):
                    cell.append(statistics.fmean(bleu[task] for task in its) if its else float("nan"))
            lines.append(f"| {name} | {' | '.join(interval(cell, 2) for cell in cells)} | {len(found)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _row(job: Job) -> str:
    temperature = f"T={job.settings.temperature:g}"
    return temperature if job.method == JOINT else f"{job.method}, {temperature}"
