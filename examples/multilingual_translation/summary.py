"""What the runs of each part come to: a section of the page, which is also printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gradsurgery as gs
from gradsurgery._bench.timing import ratios

from . import cost, study, tables
from .corpus import Corpus, Recipe, prepare
from .jobs import Scale, results_of
from .languages import tasks_of
from .methods import BEST
from .page import Album, Section
from .pictures import of_geometry, of_operations, save_heatmaps
from .train import Job

NOT_MEASURED = "Not measured yet: `python -m examples.multilingual_translation cost`."

_QUESTIONS = {
    "cost": """\
All directions go through the model in one mixed batch, and one backward pass gives the gradient of each. What does that
take, with surgery in each layer, beside plain joint training of the very same batches?""",
    "table": """\
Which way to train one model on four language pairs is best? Two of the languages have many texts, and two have few. The
bilingual models have all of their steps for one pair, and share nothing. The best multilingual method of a column is
bold, whether or not it is better than chance. Each p-value is of one comparison: of all those on this page, one in twenty
would be below .05 if all methods were alike.""",
    "ablations": """\
What of GradVac matters: which tasks are operated on, how finely the model is divided into surgery groups, or how slowly
the targets follow the similarities?""",
    "longer": """\
In Table 6.5 a bilingual model has as many steps for one pair as a joint one has for all. Here joint models take as many
steps as all bilingual ones together. Does a rule do more in models that are trained longer?""",
    "massive": """\
All languages in one model. T=1 samples them as they come, T=5 gives those with few texts more than their share. Scores
are means over languages; few pairs are those with less than half as many as the largest.""",
    "study": """\
Are the gradients of related languages more alike? They are taken at checkpoints of plain joint training, on held-out
sentences that all languages have. Whether a family’s languages agree more than others is tested by permuting the
languages (a Mantel test, one-sided): within − between is the difference of mean similarities, and correlation that of
similarity with being of one family. A family is also a script, and loan words; this cannot tell them apart.""",
    "trilingual": """\
Does a language do better in the company of one whose gradients are like its own? The first language is trained with one
of each family in turn, in equal shares.""",
}

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

    def cost(self) -> Section:
        """What a step on all languages costs."""
        measured = cost.Costs.read(self._out)
        section = Section("What it costs", _QUESTIONS["cost"], NOT_MEASURED if measured is None else measured.table)
        if measured is not None:
            ratio = ratios(measured.seconds[BEST], measured.seconds[cost.PLAIN])[0]
            section.numbers.append(
                (f"{ratio:.2f}×", f"the time of a plain step: {BEST}, {measured.tasks} directions at once")
            )
        return section

    def table(self, jobs: Sequence[Job]) -> Section:
        """Table 6.5, its costs, and Figure 6.7."""
        results = results_of(jobs, self._out)
        recipe = self._scale.four()
        text = tables.table_65(results, self._scale, self._corpus(recipe) if results else None)
        section = Section("Four languages (Table 6.5)", _QUESTIONS["table"], text)
        for direction in tables.DIRECTIONS:
            tasks = tasks_of(recipe.languages, direction)
            if change := tables.change(results, BEST, tasks):
                what = f"BLEU: {BEST} minus plain joint training, {_DIRECTIONS[direction]}, four languages"
                section.numbers.append((change, what))
        tasks = tasks_of(recipe.languages, "from-en")
        first = {
            method: min(found.items())[1]
            for method in ("PCGrad, all_layer", BEST)
            if (found := tables.of_method(results, method, tasks))
        }
        if pictures := of_operations(first, self._out / "operations.png"):
            section.albums.append(Album("", pictures))
        return section

    def ablations(self, jobs: Sequence[Job]) -> Section:
        """Tables 6.2 to 6.4."""
        text = tables.ablations(results_of(jobs, self._out), self._scale)
        return Section("Ablations (Tables 6.2 to 6.4)", _QUESTIONS["ablations"], text)

    def longer(self, jobs: Sequence[Job]) -> Section:
        """Joint models that are trained longer."""
        text = tables.longer(results_of(jobs, self._out), self._scale)
        return Section("Trained longer", _QUESTIONS["longer"], text)

    def massive(self, jobs: Sequence[Job]) -> Section:
        """Table 6.6."""
        results = results_of(jobs, self._out)
        corpora = {job: self._corpus(job.recipe) for job in results}
        text = tables.massive(results, list(jobs), corpora)
        return Section("All languages (Table 6.6)", _QUESTIONS["massive"], text)

    def study(self, jobs: Sequence[Job]) -> Section:
        """Tables of similarities by family and by layer; Figures 6.2 and 6.4 to 6.6."""
        recordings: dict[str, gs.Recorder] = {}
        largest = max(job.settings.batch for job in jobs)
        for job in results_of(jobs, self._out):
            found = study.of_run(job, self._corpus(job.recipe), self._out, count=study.SENTENCES, device=self._device)
            small = "" if job.settings.batch == largest else ", small batches"
            recordings[f"{self._kind(job)}{small}, seed {job.seed}"] = found
        section = Section("Loss geometry (Section 6.2)", _QUESTIONS["study"], tables.NOT_RUN)
        if recordings:
            by_layer = f"**Mean similarity by layer**\n\n{study.by_layer(recordings)}"
            save_heatmaps(next(iter(recordings.values())), self._out / "languages.png")
            section.text = f"**Do families cluster?**\n\n{study.table(recordings)}\n\n{by_layer}"
        for n, (name, recorder) in enumerate(recordings.items()):
            section.albums.append(Album(name, of_geometry(name, recorder), shown=n < 2))
            for direction, tasks in study.directions_of(recorder).items() if n < 2 else ():
                its = study.clustering(recorder, "encoder", tasks)
                if its.p == its.p:
                    what = (
                        f"cosine similarity within families minus between, encoder, {direction}, {name} (p = {its.p:.4f})"
                    )
                    section.numbers.append((f"{its.difference:+.3f}", what))
        return section

    def trilingual(self, jobs: Sequence[Job]) -> Section:
        """Figure 6.3 (b), for each seed."""
        section, parts = Section("Similarity against performance (Figure 6.3)", _QUESTIONS["trilingual"]), []
        of_seed: dict[int, dict[str, tuple[gs.Recorder, float]]] = {}
        for job, result in results_of(jobs, self._out).items():
            first, second = job.tasks
            recorder = study.of_run(job, self._corpus(job.recipe), self._out, count=study.SENTENCES, device=self._device)
            of_seed.setdefault(job.seed, {})[second] = (recorder, result.bleu[first])
        for seed, runs in of_seed.items():
            table, correlation, p = study.against_performance(runs)
            said = f"Rank correlation {correlation:.2f} (p = {p:.2f}), over {len(runs)} models."
            parts.append(f"**Seed {seed}**\n\n{said}\n\n{table}")
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
