"""What the runs of each part come to: a section of the page, which is also printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gradsurgery as gs

from . import study, tables
from .corpus import Corpus, Recipe, prepare
from .jobs import Scale, results_of
from .languages import tasks_of
from .methods import BEST
from .page import Section, of_geometry, of_operations
from .train import Job

_SOURCES = {"help": "LibreOffice's help", "verses": "verses", "django": "Django's messages"}
_DIRECTIONS = {"from-en": "En→Any", "to-en": "Any→En", "both": "Any→Any"}


class Summary:
    """Makes the sections; each has a method of its part's name.

    Args:
        scale: of the runs.
        out: where the runs are.
        cache: where the texts are.
        check: whether texts must be those that the example was made with.
        device: to compute gradients on.
    """

    def __init__(self, scale: Scale, out: Path, cache: Path, *, check: bool, device: str) -> None:
        self._scale, self._out, self._device = scale, out, device
        self._prepared: dict[Recipe, Corpus] = {}
        self._prepare: Callable[[Recipe], Corpus] = lambda recipe: prepare(recipe, cache, check=check)

    def table(self, jobs: Sequence[Job]) -> Section:
        """Table 6.5, its costs, and Figure 6.7."""
        results = results_of(jobs, self._out)
        recipe = self._scale.four()
        text = tables.table_65(results, self._scale, self._corpus(recipe) if results else None)
        section = Section(
            "Four languages (Table 6.5)", f"{text}\n\n**What it cost**\n\n{tables.costs(results, self._scale)}"
        )
        tasks = tasks_of(recipe.languages, "from-en")
        first = {
            method: min(found.items())[1]
            for method in ("PCGrad, all_layer", BEST)
            if (found := tables.of_method(results, method, tasks))
        }
        section.pictures += of_operations(first)
        return section

    def ablations(self, jobs: Sequence[Job]) -> Section:
        """Tables 6.2 to 6.4."""
        return Section("Ablations (Tables 6.2 to 6.4)", tables.ablations(results_of(jobs, self._out), self._scale))

    def massive(self, jobs: Sequence[Job]) -> Section:
        """Table 6.6."""
        results = results_of(jobs, self._out)
        corpora = {job: self._corpus(job.recipe) for job in results}
        return Section("All languages (Table 6.6)", tables.massive(results, list(jobs), corpora))

    def study(self, jobs: Sequence[Job]) -> Section:
        """Table of similarities and families; Figures 6.2 and 6.4 to 6.6."""
        recordings: dict[str, gs.Recorder] = {}
        largest = max(job.settings.batch for job in jobs)
        for job in results_of(jobs, self._out):
            found = study.of_run(job, self._corpus(job.recipe), self._out, count=study.SENTENCES, device=self._device)
            small = "" if job.settings.batch == largest else ", small batches"
            recordings[f"{self._kind(job)}{small}, seed {job.seed}"] = found
        section = Section("Loss geometry (Section 6.2)")
        section.text = study.table(recordings) if recordings else tables.NOT_RUN
        for name, recorder in recordings.items():
            section.pictures += of_geometry(name, recorder)
        return section

    def trilingual(self, jobs: Sequence[Job]) -> Section:
        """Figure 6.3 (b), for each seed."""
        section, parts = Section("Similarity against performance (Figure 6.3)"), []
        of_seed: dict[int, dict[str, tuple[gs.Recorder, float]]] = {}
        for job, result in results_of(jobs, self._out).items():
            first, second = job.tasks
            recorder = study.of_run(job, self._corpus(job.recipe), self._out, count=study.SENTENCES, device=self._device)
            of_seed.setdefault(job.seed, {})[second] = (recorder, result.bleu[first])
        for seed, runs in of_seed.items():
            table, correlation = study.against_performance(runs)
            parts.append(f"**Seed {seed}**: rank correlation {correlation:.2f}, over {len(runs)} models\n\n{table}")
        section.text = "\n\n".join(parts) or tables.NOT_RUN
        return section

    def _kind(self, job: Job) -> str:
        tasks = {name: tasks_of(job.recipe.languages, name) for name in _DIRECTIONS}
        direction = next(_DIRECTIONS[name] for name, its in tasks.items() if its == job.tasks)
        return f"{_SOURCES[job.recipe.source]}, {direction}"

    def _corpus(self, recipe: Recipe) -> Corpus:
        if recipe not in self._prepared:
            self._prepared[recipe] = self._prepare(recipe)
        return self._prepared[recipe]
