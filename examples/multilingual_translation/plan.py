"""How long runs will take: from times that are measured here, in as many processes at once as there will be."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

from . import study
from .corpus import Recipe, prepare
from .jobs import folder_of
from .train import Job, Settings, Trainer

GEOMETRY = ("study", "trilingual")
"""The parts that look at gradients of kept checkpoints."""

_POOL = 16  # batches of all lengths, which are drawn together
_FEW = 8  # sentences


class Times(NamedTuple):
    """Seconds.

    Attributes:
        start: to read the corpus and make the model.
        step: of training, the mean over batches of all lengths.
        evaluation: of one task: its losses on two parts, and its translations.
        geometry: of one checkpoint; 0 if it is not looked at.
    """

    start: float
    step: float
    evaluation: float
    geometry: float


def timed(job: Job, cache: Path, device: str, check: bool, geometry: bool) -> Times:
    """A few steps of a run, the evaluation of its first task, and a look at the geometry."""
    begun = time.perf_counter()
    corpus = prepare(job.recipe, cache, check=check)
    trainer = Trainer(job, corpus, None, device)
    start = time.perf_counter() - begun
    for _ in range(2):  # the first is checked, and shows how many backward passes there are
        trainer.advance()
    trainer.step = _POOL
    step = _seconds(lambda: [trainer.advance() for _ in range(_POOL)]) / _POOL
    evaluation = _seconds(lambda: trainer.evaluate(job.tasks[:1]))
    look = 0.0
    if geometry:
        looked, few = (min(count, len(corpus.aligned["en"])) for count in (study.SENTENCES, _FEW))
        look = _seconds(lambda: study.geometry(trainer.model, corpus, job.tasks, count=few)) * looked / few
    return Times(start, step, evaluation, look)


def _seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measured(job: Job, cache: Path, geometry: bool, *, processes: int, device: str, check: bool) -> Times:
    """The mean over so many processes that measure at once."""
    return Times(*together(partial(timed, job, cache, device, check, geometry), processes))


def together(measure: Callable[[], Sequence[float]], processes: int) -> list[float]:
    """The means of what ``measure`` returns, in processes that slow each other down as those of runs will."""
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        asked = [pool.submit(measure) for _ in range(processes)]
        return [fmean(values) for values in zip(*(future.result() for future in asked), strict=True)]


def plan(parts: Mapping[str, Sequence[Job]], out: Path, cache: Path, *, processes: int, device: str, check: bool) -> str:
    """How many runs there are and what is left of them, and about how long that will take.

    Args:
        parts: part → its runs. A run of several parts counts once.
        out: where the runs are.
        cache: where the texts are.
        processes: runs at a time.
        device: to train on.
        check: whether texts must be those that the example was made with.
    """
    lines = ["| method | tasks | step | runs | left | time of those left |", "|---|--:|--:|--:|--:|--:|"]
    looked_at = {job for part, jobs in parts.items() if part in GEOMETRY for job in jobs}
    kinds: dict[tuple[str, int, Settings, Recipe, bool], list[Job]] = {}
    for job in dict.fromkeys(job for jobs in parts.values() for job in jobs):
        kinds.setdefault((job.method, len(job.tasks), job.settings, job.recipe, job in looked_at), []).append(job)
    total, seconds = 0, 0.0
    for (method, tasks, settings, recipe, geometry), of in kinds.items():
        left = [job for job in of if not (folder_of(job, out) / "result.json").exists()]
        name = f"| {method} | {tasks} |"
        if not left:
            lines.append(f"{name} | {len(of)} | 0 | |")
            continue
        prepare(recipe, cache, check=check)  # once, before several processes would
        times = measured(of[0], cache, geometry, processes=processes, device=device, check=check)
        looks = settings.steps // settings.keep if geometry else 0
        its = len(left) * (times.start + settings.steps * times.step + tasks * times.evaluation + looks * times.geometry)
        lines.append(f"{name} {1000 * times.step:.0f} ms | {len(of)} | {len(left)} | {its / 60:.0f} min |")
        total, seconds = total + len(left), seconds + its
    return "\n".join(
        [
            *lines,
            "",
            f"{total} runs are left: {seconds / 60:.1f} minutes of one process, {seconds / 60 / processes:.1f} of "
            f"{processes}. Measured in as many processes at once, so that whatever else the machine does now is in it. "
            "Tables, bootstrap tests and pictures come on top: some minutes.",
        ]
    )
