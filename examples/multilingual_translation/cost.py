"""What surgery costs: the single pass of all directions at once, against plain joint training of the same batches.

Times are of whole steps, taken in turns on the same batches; a batch is new in each turn. Peak memory is of one step to
``p.grad``, above what is resident between plain steps, on the longest batch of a pool, in a process of its own: see
``gradsurgery._bench.memory``.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gradsurgery._bench import memory
from gradsurgery._bench.timing import Contender, interleaved, ratios

from .corpus import PAD, Batch, Corpus, Recipe, prepare
from .jobs import Scale
from .languages import tasks_of
from .methods import BEST, JOINT
from .train import Job, Settings, Trainer, token_losses, update, write_whole

PLAIN = "plain joint training"
WAYS = (PLAIN, JOINT, BEST, "GradVac, all_task")
"""The second computes all tasks' gradients and changes nothing."""

TARGETS = {"time": 1.4, "memory": 1.6}
_POOL = 16


@dataclass(frozen=True)
class Costs:
    """What was measured, by way.

    Attributes:
        tasks: how many directions.
        parameters: of the model.
        batch: sentences in a step.
        threads: that PyTorch computed with.
        seconds: of each step, those with the same index on the same batch.
        peaks: bytes above what is resident; empty where it cannot be measured.
    """

    tasks: int
    parameters: int
    batch: int
    threads: int
    seconds: dict[str, list[float]]
    peaks: dict[str, list[int]]

    @property
    def table(self) -> str:
        """In Markdown: medians, and medians of ratios with their quartiles."""
        lines = [
            f"{self.tasks} directions, {self.parameters / 1e6:.1f}M parameters, {self.batch} sentences in a step, "
            f"threads: {self.threads}, {len(self.seconds[PLAIN])} batches. Targets, for GradVac: at most "
            f"{TARGETS['time']}× the time and {TARGETS['memory']}× the memory.",
            "",
            "| | step | in plain steps (quartiles) | peak memory | in plain peaks |",
            "|---|--:|--:|--:|--:|",
        ]
        for way, seconds in self.seconds.items():
            ratio, (low, high) = ratios(seconds, self.seconds[PLAIN])
            cells = [f"{1000 * statistics.median(seconds):.0f} ms", f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
            if self.peaks:
                its, base = (statistics.median(self.peaks[name]) for name in (way, PLAIN))
                cells += [f"{its / 2**20:.0f} MiB", f"{its / base:.2f}" if base else ""]  # tiny ones may need no new page
            else:
                cells += ["", ""]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def write(self, out: Path) -> None:
        """Writes ``cost.json``."""
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "cost.json", json.dumps(self.__dict__, indent=1).encode())

    @classmethod
    def read(cls, out: Path) -> Costs | None:
        """What was measured last; None if nothing was."""
        path = out / "cost.json"
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def plain(trainer: Trainer, batch: Batch) -> None:
    """One backward pass of the mean over all tokens, to ``p.grad``, without the optimizer that does surgery."""
    losses = token_losses(trainer.model, batch, trainer.job.settings.smoothing)
    (losses.sum() / (batch.target[:, 1:] != PAD).sum()).backward()


def gradients(way: str, trainer: Trainer, batch: Batch) -> None:
    """A step to ``p.grad``."""
    if way == PLAIN:
        plain(trainer, batch)
    else:
        trainer.gradients(batch)


def trainer_of(way: str, corpus: Corpus, settings: Settings, seed: int) -> Trainer:
    """All ways begin alike."""
    tasks = tasks_of(corpus.recipe.languages, "from-en")
    return Trainer(Job(JOINT if way == PLAIN else way, tasks, seed, settings, corpus.recipe), corpus)


class Turns:
    """Steps of all ways, each of a model of its own, on the same batches.

    Args:
        trainers: way → its model and optimizer.
    """

    def __init__(self, trainers: Mapping[str, Trainer]) -> None:
        self._trainers, self._number = trainers, -1
        self._batches = trainers[PLAIN].batches
        self.next()

    def next(self) -> None:
        """Goes on to the next batch."""
        self._number += 1
        self._batch = self._batches[self._number]

    def step(self, way: str) -> None:
        """A whole step."""
        trainer = self._trainers[way]
        gradients(way, trainer, self._batch)
        optimizer = trainer.optimizer.optimizer if way == PLAIN else trainer.optimizer
        update(trainer.model, optimizer, trainer.job.settings)

    def contenders(self) -> dict[str, Contender]:
        """In turns: the first takes a new batch, and the others the same."""
        return {
            way: Contender(partial(self.step, way), self.next if way == PLAIN else lambda: None) for way in self._trainers
        }


def measure(scale: Scale, cache: Path, *, repeats: int, seed: int, threads: int, check: bool) -> Costs:
    """Times and peaks of all ways.

    Args:
        scale: whose settings on all languages are taken.
        cache: where the texts are.
        repeats: batches; peaks are measured a fifth as often.
        seed: of weights and batches.
        threads: that PyTorch computes with.
        check: whether texts must be those that the example was made with.
    """
    torch.set_num_threads(threads)
    recipe = scale.all()
    corpus = prepare(recipe, cache, check=check)
    trainers = {way: trainer_of(way, corpus, scale.massive, seed) for way in WAYS}
    turns = Turns(trainers)
    # The first is checked, and shows how many backward passes there are; the second streams.
    for _ in range(2):
        for way in WAYS:
            turns.step(way)
    seconds = interleaved(turns.contenders(), repeats, "step time")
    peaks: dict[str, list[int]] = {}
    if memory.measurable():
        for _ in range(max(1, repeats // 5)):
            for way in WAYS:
                job = {"way": way, "recipe": recipe.__dict__, "settings": scale.massive.__dict__, "cache": str(cache)}
                job |= {"seed": seed, "threads": threads, "check": check}
                peaks.setdefault(way, []).append(int(memory.elsewhere(__name__, job)))
    size = sum(parameter.numel() for parameter in trainers[PLAIN].model.parameters())
    return Costs(len(recipe.languages), size, scale.massive.batch, threads, seconds, peaks)


def peak(job: dict[str, Any]) -> int:
    """What the process of its own does."""
    torch.set_num_threads(job["threads"])
    kept = {key: tuple(map(_tuple, value)) if isinstance(value, list) else value for key, value in job["recipe"].items()}
    corpus = prepare(Recipe(**kept), Path(job["cache"]), check=job["check"])
    trainer = trainer_of(job["way"], corpus, Settings(**job["settings"]), job["seed"])
    pool = [trainer.batches[n] for n in range(_POOL)]
    batch = max(pool, key=lambda batch: batch.source.numel() + batch.target.numel())
    return memory.peak(
        lambda: gradients(job["way"], trainer, batch),
        lambda: trainer.model.zero_grad(set_to_none=True),
        lambda: plain(trainer, batch),
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    print(peak(json.loads(sys.argv[1])))
