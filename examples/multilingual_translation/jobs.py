"""The runs that tables and pictures are made of: which there are, what they will take, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Protocol, TypeVar

import torch
from tqdm import tqdm

from .corpus import Corpus, Recipe, prepare
from .languages import FAMILY, FOUR, tasks_of
from .methods import ABLATIONS, BEST, BILINGUAL, JOINT, LONGER, TABLE_65
from .sources import languages_of
from .train import Job, Result, Settings, Trainer

DIRECTIONS = ("from-en", "to-en")


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        settings: of the runs of Tables 6.2 to 6.5.
        massive: of the runs on all languages.
        vocabulary: of the four languages, and of all.
        scarce: training pairs of Turkish, which would not be scarce here, for Tables 6.2 to 6.5.
        longest: pieces.
        evaluated: pairs to validate with, and to test with.
        source: ``"help"``, or ``"django"`` without downloads.
    """

    settings: Settings
    massive: Settings
    vocabulary: tuple[int, int]
    scarce: int = 4000
    longest: int = 40
    evaluated: int = 200
    source: str = "help"

    def four(self) -> Recipe:
        """The corpus of Tables 6.2 to 6.5."""
        if self.source == "django":  # which is small, and has no Czech
            cut = (("hi", 120), ("tr", 120))
            return Recipe("django", ("fr", "pl", "hi", "tr"), 600, self.longest, self.evaluated, cut)
        return Recipe(self.source, FOUR, self.vocabulary[0], self.longest, self.evaluated, (("tr", self.scarce),))

    def all(self, source: str | None = None) -> Recipe:
        """The corpus of Table 6.6 and of the study."""
        source = source or self.source
        return Recipe(source, languages_of(source), self.vocabulary[1], self.longest, self.evaluated)


SCALES = {
    "quick": Scale(
        Settings(steps=20, batch=16, warmup=10, save=10),
        Settings(steps=20, batch=48, warmup=10, save=10, keep=10),
        vocabulary=(2000, 6000),
        longest=24,
        evaluated=10,
    ),
    "tiny": Scale(
        Settings(steps=500),
        Settings(steps=500, batch=128, keep=100),
        vocabulary=(4000, 12_000),
        longest=24,
    ),
    "small": Scale(
        Settings("small", steps=20_000, batch=128, rate=1e-3, warmup=2000, record=20, save=500),
        Settings("small", steps=40_000, batch=512, rate=1e-3, warmup=4000, record=50, save=500, keep=4000),
        vocabulary=(8000, 32_000),
        longest=80,
        evaluated=1000,
    ),
    "big": Scale(
        Settings("big", steps=100_000, batch=1024, rate=1e-3, warmup=30_000, record=100, save=1000),
        Settings("big", steps=500_000, batch=4096, rate=1e-3, warmup=30_000, record=100, save=1000, keep=1000),
        vocabulary=(32_000, 64_000),
        longest=80,
        evaluated=1000,
    ),
}
"""``tiny`` is what two cores train in hours, ``small`` asks for a day or a small GPU, ``big`` is the thesis' model."""


def table_jobs(scale: Scale, seeds: Iterable[int], directions: Sequence[str] = DIRECTIONS) -> list[Job]:
    """Table 6.5: every method in both directions, and a bilingual model for each pair of languages."""
    recipe, jobs = scale.four(), []
    for seed in seeds:
        for direction in directions:
            tasks = tasks_of(recipe.languages, direction)
            for method in TABLE_65:
                for its in [(task,) for task in tasks] if method == BILINGUAL else [tasks]:
                    jobs.append(Job(method, its, seed, scale.settings, recipe))
    return jobs


def ablation_jobs(scale: Scale, seeds: Iterable[int]) -> list[Job]:
    """Tables 6.2 to 6.4, from English, and what they are compared with; their common runs once."""
    recipe = scale.four()
    methods = dict.fromkeys((JOINT, *(method for rows in ABLATIONS.values() for method in rows)))
    tasks = tasks_of(recipe.languages, "from-en")
    return [Job(method, tasks, seed, scale.settings, recipe) for seed in seeds for method in methods]


def longer_jobs(scale: Scale, seeds: Iterable[int]) -> list[Job]:
    """Joint models from English, for as many steps as the bilingual ones take together; and those."""
    recipe = scale.four()
    tasks = tasks_of(recipe.languages, "from-en")
    settings = replace(scale.settings, steps=len(tasks) * scale.settings.steps)
    jobs = []
    for seed in seeds:
        jobs += [Job(method, tasks, seed, settings, recipe) for method in LONGER]
        jobs += [Job(BILINGUAL, (task,), seed, scale.settings, recipe) for task in tasks]
    return jobs


def massive_jobs(scale: Scale, seeds: Iterable[int], directions: Sequence[str] = DIRECTIONS) -> list[Job]:
    """Table 6.6: all languages, sampled with T=1, with T=5, and with T=5 and GradVac."""
    recipe, settings = scale.all(), scale.massive
    return [
        Job(method, tasks_of(recipe.languages, direction), seed, replace(settings, temperature=temperature), recipe)
        for seed in seeds
        for direction in directions
        for method, temperature in ((JOINT, 1.0), (JOINT, 5.0), (BEST, 5.0))
    ]


def study_jobs(scale: Scale, seeds: Iterable[int]) -> list[Job]:
    """Section 6.2: joint models whose gradients are looked at. Both directions apart and in one model, a model of small
    batches, and models of the verses, where all languages say the same."""
    seeds, settings = list(seeds), scale.massive
    sources = [scale.source] if scale.source == "django" else [scale.source, "verses"]
    jobs = []
    for seed in seeds:
        for source in sources:
            recipe = scale.all(source)
            jobs += [Job(JOINT, tasks_of(recipe.languages, direction), seed, settings, recipe) for direction in DIRECTIONS]
        recipe = scale.all()
        jobs.append(Job(JOINT, tasks_of(recipe.languages, "both"), seed, settings, recipe))
        small = replace(settings, batch=max(8, settings.batch // 4))
        jobs.append(Job(JOINT, tasks_of(recipe.languages, "from-en"), seed, small, recipe))
    return jobs


def trilingual_jobs(scale: Scale, seeds: Iterable[int]) -> list[Job]:
    """Figure 6.3 (b): English to French together with one other language each, the first of each family."""
    recipe = scale.all()
    first, *rest = recipe.languages
    partners = {FAMILY[code]: code for code in reversed(rest)}
    settings = replace(scale.settings, keep=max(1, scale.settings.steps // 5), temperature=1e9)  # equal shares for all
    return [
        Job(JOINT, (f"en-{first}", f"en-{code}"), seed, settings, recipe)
        for seed in seeds
        for code in sorted(partners.values(), key=rest.index)
    ]


PARTS = {
    "table": table_jobs,
    "ablations": ablation_jobs,
    "longer": longer_jobs,
    "massive": massive_jobs,
    "study": study_jobs,
    "trilingual": trilingual_jobs,
}
"""Name on the command line → its runs."""


# --- Running ----------------------------------------------------------------------------------------------------------


class Named(Protocol):
    """A run that has a name."""

    @property
    def name(self) -> str:
        """Of its folder."""
        ...


J = TypeVar("J", bound=Named)


def folder_of(job: Named, out: Path) -> Path:
    """Where a run's files are."""
    return out / "runs" / job.name


def results_of(jobs: Iterable[J], out: Path) -> dict[J, Result]:
    """The results of those that are complete."""
    found = {job: Result.read(folder_of(job, out)) for job in dict.fromkeys(jobs)}
    return {job: result for job, result in found.items() if result is not None}


def run_all(jobs: Sequence[Job], out: Path, cache: Path, *, processes: int, device: str, check: bool) -> None:
    """Runs what is not complete yet, some at a time; each continues from its checkpoint."""
    todo = [job for job in dict.fromkeys(jobs) if not (folder_of(job, out) / "result.json").exists()]
    for recipe in dict.fromkeys(job.recipe for job in todo):
        prepare(recipe, cache, check=check)  # once, before several processes would
    pooled(partial(run_one, out=out, cache=cache, device=device, check=check), todo, processes)


def pooled(perform: Callable[[J], float], jobs: Sequence[J], processes: int) -> None:
    """Makes runs in processes of one thread each; ``perform`` returns a number to show, such as a loss.

    No more than ``processes`` are handed out at once, so that an error, or an interruption, waits for those alone.
    """
    if not jobs:
        return
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as
        pool,
        tqdm(total=len(jobs), unit="run", disable=None, dynamic_ncols=True) as bar,
    ):  # fmt: skip
        later = iter(jobs)
        running = {pool.submit(perform, job): job for job in islice(later, processes)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                bar.set_postfix_str(f"{running.pop(future).name}: {future.result():.3f}")
                bar.update()
                running |= {pool.submit(perform, job): job for job in islice(later, 1)}


def run_one(job: Job, out: Path, cache: Path, device: str = "cpu", check: bool = True) -> float:
    """Runs or continues one, and returns its mean validation loss. Checkpoints of a complete run are removed."""
    folder = folder_of(job, out)
    result = Trainer(job, prepare(job.recipe, cache, check=check), folder, device).run()
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return fmean(result.loss["valid"].values())


def sizes(corpora: Mapping[str, Corpus]) -> str:
    """How many pairs each corpus has, in Markdown."""
    lines = []
    for name, corpus in corpora.items():
        lines += [f"{name}: {corpus.size} pieces, {len(corpus.aligned['en'])} held-out texts in all languages", ""]
        lines += ["| language | train | validate | test |", "|---|--:|--:|--:|"]
        lines += [
            f"| {code} | {len(corpus.train[code].english)} | {len(corpus.valid[code].english)} | "
            f"{len(corpus.test[code].english)} |"
            for code in corpus.recipe.languages
        ] + [""]
    return "\n".join(lines)
