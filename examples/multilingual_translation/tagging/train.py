"""Runs of tagging: all tasks in one mixed batch, one backward pass for all of their gradients.

A run takes minutes. One that is stopped begins again, and has the same losses; what is complete is not run again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import BertModel

import gradsurgery as gs

from .. import tables
from ..jobs import folder_of, pooled, results_of
from ..methods import BILINGUAL, JOINT, METHODS
from ..page import Section
from ..plan import together
from ..train import Result, factors, versions
from . import encoder, treebanks
from .encoder import END, PAD, START, Pieces, Tagger
from .treebanks import TAGS, TREEBANKS, Sentence, Split

BEST = "GradVac, all_task"
ROWS = (BILINGUAL, JOINT, "GradNorm", "MGDA", "PCGrad", "PCGrad, all_layer", BEST)
"""No task is scarce by much here, so that GradVac operates on all."""

_NOTHING = -1  # instead of a tag


@dataclass(frozen=True)
class Settings:
    """How a run trains, the same for all methods; none was tuned.

    Attributes:
        steps: optimizer steps.
        batch: sentences in a step, of all tasks together.
        layers: of the encoder that are used, from the first on.
        rate: the highest learning rate of AdamW; it rises for a tenth of the steps, and falls to zero.
        decay: of weights.
        temperature: ``T`` of the sampling.
        train: at most so many sentences of a task.
        evaluated: at most so many to test with.
        record: cosines and operations are recorded at each so many steps.
    """

    steps: int = 100
    batch: int = 16
    layers: int = 6
    rate: float = 2e-4
    decay: float = 0.01
    temperature: float = 5.0
    train: int = 4000
    evaluated: int = 300
    record: int = 5

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        warmup = max(1, self.steps // 10)
        return self.rate * min((step + 1) / warmup, (self.steps - step) / max(1, self.steps - warmup))


SETTINGS = {
    "quick": Settings(steps=3, batch=10, train=100, evaluated=5, record=1),
    "tiny": Settings(),
    "small": Settings(steps=4000, batch=32, layers=12, train=100_000, evaluated=100_000, record=20),
    "big": Settings(steps=10_000, batch=32, layers=12, train=100_000, evaluated=100_000, record=50),
}
"""By the names of the sizes of translation. The encoder has twelve layers."""


@dataclass(frozen=True)
class Job:
    """One run: all that it depends on, beside the treebanks and the encoder."""

    method: str
    tasks: tuple[str, ...]
    seed: int
    settings: Settings

    @property
    def name(self) -> str:
        """Of its folder."""
        content = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        tasks = "all" if self.tasks == tuple(TREEBANKS) else "+".join(self.tasks)
        return "".join(c if c.isalnum() else "_" for c in f"tagging {self.method} {tasks} {self.seed}") + f"-{content}"


def jobs(settings: Settings, seeds: Iterable[int]) -> list[Job]:
    """Every method on all tasks, and a model of its own for each task."""
    tasks = tuple(TREEBANKS)
    return [
        Job(method, its, seed, settings)
        for seed in seeds
        for method in ROWS
        for its in ([(task,) for task in tasks] if method == BILINGUAL else [tasks])
    ]


# --- Batches ------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Sentences, ordered by task.

    Attributes:
        pieces: ``[B, S]``, ids, padded.
        firsts: ``[B, T]``, where words begin; 0 past the last.
        tags: ``[B, T]``; -1 past the last word.
        tasks: ``[B]``, on the CPU.
    """

    pieces: Tensor
    firsts: Tensor
    tags: Tensor
    tasks: Tensor


def batch_of(picks: Iterable[tuple[int, Sentence]], pieces: Pieces, longest: int = 256) -> Batch:
    """Of ``(task, sentence)``. Words past ``longest`` pieces are left out, of the loss and of the scores."""
    rows, firsts, tags, tasks = [], [], [], []
    for task, sentence in sorted(picks, key=lambda pick: pick[0]):
        row, places, its = [START], [], []
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            ids = pieces(word)
            if len(row) + len(ids) >= longest:
                break
            places.append(len(row))
            its.append(tag)
            row += ids
        rows.append(torch.tensor([*row, END]))
        firsts.append(torch.tensor(places))
        tags.append(torch.tensor(its))
        tasks.append(task)
    padded = (pad_sequence(its, True, value) for its, value in ((rows, PAD), (firsts, 0), (tags, _NOTHING)))
    return Batch(*padded, torch.tensor(tasks))


@lru_cache(maxsize=2)
def data(cache: Path, settings: Settings, check: bool) -> dict[str, Split]:
    """Task → its sentences, as many as the settings say."""
    found = {}
    for task in TREEBANKS:
        its = treebanks.read(task, cache, check=check)
        order = {part: sorted(of, key=_mixed) for part, of in its.items()}
        found[task] = {part: of[: settings.train if part == "train" else settings.evaluated] for part, of in order.items()}
    return found


def _mixed(sentence: Sentence) -> bytes:
    return hashlib.sha256(f"{sentence.id} {sentence.words}".encode()).digest()


# --- A run --------------------------------------------------------------------------------------------------------------


class Run:
    """A run under way.

    Args:
        job: what to run.
        splits: task → its sentences.
        pretrained: encoder and pieces, which the run takes for itself.
        device: to train on.
    """

    def __init__(
        self, job: Job, splits: Mapping[str, Split], pretrained: tuple[BertModel, Pieces], device: str = "cpu"
    ) -> None:
        self.job, self.device = job, device
        self.splits = {task: splits[task] for task in job.tasks}
        body, self.pieces = pretrained
        words = {word for split in splits.values() for its in split.values() for one in its for word in one.words}
        body.encoder.layer = body.encoder.layer[: job.settings.layers]
        torch.manual_seed(job.seed)
        self.model = Tagger(body, {i for word in words for i in self.pieces(word)}, len(TAGS)).to(device)
        method = METHODS[job.method]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = gs.SurgeryOptimizer(
            torch.optim.AdamW(trained, lr=job.settings.rate, weight_decay=job.settings.decay),
            method.rule([], job.tasks),
            model=self.model,
            groups=method.groups,
            tasks=job.tasks,
            seed=job.seed,
            measure=method.measures,
        )
        sizes = np.array([len(split["train"]) for split in self.splits.values()], dtype=np.float64)
        self.shares = (sizes / sizes.sum()) ** (1 / job.settings.temperature)
        self.shares /= self.shares.sum()
        self.step = 0
        self.result = Result(asdict(job), treebanks.digest(splits), versions=versions("transformers", "scikit-learn"))

    def batch(self, step: int) -> Batch:
        """The mixed batch of a step, which depends on nothing else."""
        random = np.random.default_rng([self.job.seed, step])
        of = random.choice(len(self.shares), self.job.settings.batch, p=self.shares)
        sentences = [split["train"] for split in self.splits.values()]
        return batch_of([(k, sentences[k][int(random.integers(len(sentences[k])))]) for k in of.tolist()], self.pieces)

    def losses(self, batch: Batch) -> Tensor:
        """``[B, T]``, the cross-entropy of each word's tag; zero past the last word."""
        scores = self.model(batch.pieces.to(self.device), batch.firsts.to(self.device))
        return cross_entropy(scores.mT, batch.tags.to(self.device), ignore_index=_NOTHING, reduction="none")

    def advance(self) -> float:
        """One step; returns the mean loss over all words."""
        settings, optimizer = self.job.settings, self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(self.step)
        batch = self.batch(self.step)
        begun = time.perf_counter()
        self.model.train()
        words = (batch.tags != _NOTHING).sum(1).to(self.device)
        with optimizer.split(batch.tasks, reduction="sum"):
            losses = self.losses(batch)
        optimizer.backward(losses * factors(words, batch.tasks, len(self.job.tasks), METHODS[self.job.method].loss))
        optimizer.combine()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found = (losses.sum() / words.sum()).item()
        self.result.milliseconds.append(1000 * (time.perf_counter() - begun))
        self.result.training.append(found)
        if optimizer.last is not None and METHODS[self.job.method].measures and self.step % settings.record == 0:
            self.result.recorder.record(optimizer.last, self.step)
        self.step += 1
        return found

    @torch.no_grad()
    def evaluate(self) -> None:
        """Scores of the test sentences: accuracy, and the mean F1 of the tags that occur, as scikit-learn has them."""
        begun = time.perf_counter()
        self.model.eval()
        for task, split in self.splits.items():
            right: list[int] = []
            found: list[int] = []
            for start in range(0, len(split["test"]), 50):
                batch = batch_of([(0, one) for one in split["test"][start : start + 50]], self.pieces)
                scores = self.model(batch.pieces.to(self.device), batch.firsts.to(self.device))
                there = batch.tags != _NOTHING
                right += batch.tags[there].tolist()
                found += scores.argmax(-1).cpu()[there].tolist()
            self.result.accuracy[task] = 100 * float(accuracy_score(right, found))
            macro = f1_score(right, found, average="macro", labels=sorted(set(right)), zero_division=0)
            self.result.f1[task] = 100 * float(macro)
        self.result.seconds = time.perf_counter() - begun

    def run(self) -> Result:
        """Trains to the end and evaluates."""
        while self.step < self.job.settings.steps:
            self.advance()
        self.evaluate()
        return self.result


def run_one(job: Job, out: Path, cache: Path, device: str = "cpu", check: bool = True) -> float:
    """Makes a run and keeps its result; returns the last loss."""
    folder = folder_of(job, out)
    folder.mkdir(parents=True, exist_ok=True)
    result = Run(job, data(cache, job.settings, check), encoder.load(cache, check=check), device).run()
    result.write(folder)
    return result.training[-1]


def run_all(wanted: Sequence[Job], out: Path, cache: Path, *, processes: int, device: str, check: bool) -> None:
    """Makes the runs that are missing."""
    todo = [job for job in wanted if not (folder_of(job, out) / "result.json").exists()]
    if todo:
        data(cache, todo[0].settings, check)  # fetched once, before several processes would
        encoder.load(cache, check=check)
        pooled(partial(run_one, out=out, cache=cache, device=device, check=check), todo, processes)


def timed(job: Job, cache: Path, device: str, check: bool, steps: int = 3) -> tuple[float, float, float]:
    """Seconds to begin, of a step, and of the evaluation of its tasks."""
    begun = time.perf_counter()
    run = Run(job, data(cache, job.settings, check), encoder.load(cache, check=check), device)
    started = time.perf_counter()
    for _ in range(2):
        run.advance()
    warm = time.perf_counter()
    for _ in range(steps):
        run.advance()
    trained = time.perf_counter()
    run.splits = {task: {**split, "test": split["test"][:50]} for task, split in run.splits.items()}
    run.evaluate()
    share = max(1.0, job.settings.evaluated / 50)
    return started - begun, (trained - warm) / steps, share * (time.perf_counter() - trained)


def plan(wanted: Sequence[Job], out: Path, cache: Path, *, processes: int, device: str, check: bool) -> str:
    """How many runs are left, and about how long they will take, from times that are measured here."""
    todo = [job for job in wanted if not (folder_of(job, out) / "result.json").exists()]
    if not todo:
        return "Tagging: no run is left."
    data(cache, todo[0].settings, check)
    encoder.load(cache, check=check)
    seconds = 0.0
    for kind in dict.fromkeys((job.method, len(job.tasks)) for job in todo):
        its = [job for job in todo if (job.method, len(job.tasks)) == kind]
        start, step, evaluation = together(partial(timed, its[0], cache, device, check), processes)
        seconds += len(its) * (start + its[0].settings.steps * step + evaluation)
    return f"Tagging: {len(todo)} runs are left: {seconds / 60 / processes:.1f} minutes of {processes} processes."


# --- The tables ---------------------------------------------------------------------------------------------------------

_QUESTION = """\
The same methods, on part-of-speech tagging with one pretrained multilingual encoder (multilingual-e5-small, whose weights
come in 4 bits). There are treebanks of three languages only, so that domains are tasks too. The scores are of words: the
mean F1 of the tags, and accuracy. The first row has a model of its own for each task, with as many steps as the joint ones
have for all."""


def section(wanted: Sequence[Job], out: Path) -> Section:
    """Stands in for Table 6.8."""
    results, tasks = results_of(wanted, out), tuple(TREEBANKS)
    made = Section("Tagging (Table 6.8)", _QUESTION, tables.NOT_RUN)
    if results:
        parts = [
            f"**{name}**\n\n{tables.scores(results, ROWS, tasks, score)}"
            for name, score in (("Mean F1 of the tags, %", lambda it: it.f1), ("Accuracy, %", lambda it: it.accuracy))
        ]
        about = "; ".join(f"{task}: {treebank.about}" for task, treebank in TREEBANKS.items())
        made.text = "\n\n".join([*parts, f"{about}."]).replace(f"| {BILINGUAL} |", "| one model each |")
        if change := tables.change(results, BEST, tasks, lambda it: it.f1):
            made.numbers.append((change, f"mean F1 of tagging: {BEST} minus plain joint training"))
    return made


def of_size(name: str, steps: int = 0) -> Settings:
    """The settings of a size, with other numbers of steps if that is not 0."""
    return replace(SETTINGS[name], steps=steps) if steps else SETTINGS[name]
