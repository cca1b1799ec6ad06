"""Training and evaluation of one run, which continues where it was interrupted."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor
from torch.nn.functional import cross_entropy

import gradsurgery as gs

from .corpus import PAD, Batch, Batches, Corpus, Recipe
from .languages import other, tasks_of
from .methods import METHODS
from .model import SIZES, Translator

_SAVED = "checkpoint.pt"


@dataclass(frozen=True)
class Settings:
    """How long and how a run trains. The same for all methods; none was tuned.

    Attributes:
        size: name of one of ``SIZES``.
        steps: optimizer steps.
        batch: sentences in a step, of all tasks together.
        rate: the highest learning rate of Adam, at the end of the warm-up; it then falls with the root of the steps.
        warmup: steps in which it rises.
        smoothing: of labels, in the training loss.
        clip: the norm that gradients are clipped to.
        temperature: ``T`` of the sampling.
        record: cosines and operations are recorded at each so many steps.
        save: a checkpoint is written at each so many steps.
        keep: checkpoints that are kept for the study of loss geometry, at each so many steps; 0 for none.
    """

    size: str = "tiny"
    steps: int = 500
    batch: int = 64
    rate: float = 2e-3
    warmup: int = 200
    smoothing: float = 0.1
    clip: float = 1.0
    temperature: float = 5.0
    record: int = 5
    save: int = 200
    keep: int = 0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        return self.rate * min((step + 1) / self.warmup, math.sqrt(self.warmup / (step + 1)))


@dataclass(frozen=True)
class Job:
    """One run: all that it depends on.

    Attributes:
        method: name of one of ``METHODS``.
        tasks: names such as ``"en-fr"``.
        seed: of the initial weights, batches, dropout and random orders.
        settings: how it trains.
        recipe: of the corpus.
    """

    method: str
    tasks: tuple[str, ...]
    seed: int
    settings: Settings
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of its folder: what it is for people, and a hash of all of it."""
        content = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False).encode()
        words = "".join(c if c.isalnum() else "_" for c in f"{self.method} {self._tasks} {self.seed}")
        return f"{words}-{hashlib.sha256(content).hexdigest()[:10]}"

    @property
    def _tasks(self) -> str:
        directions = [d for d in ("from-en", "to-en", "both") if self.tasks == tasks_of(self.recipe.languages, d)]
        return directions[0] if directions else "+".join(self.tasks)


@dataclass
class Result:
    """What came of a run.

    Attributes:
        job: what was run.
        corpus: fingerprint of the corpus.
        loss: ``"valid"`` or ``"test"`` → task → mean cross-entropy of a target piece, in nats.
        bleu: task → BLEU of the greedy translations of the test pairs.
        chrf: task → chrF of them.
        f1: task → mean F1 of the tags, where the tasks are tagging.
        accuracy: task → accuracy of the tags.
        signatures: metric → its signature.
        texts: task → the translations.
        training: loss of each step, the mean over all tokens.
        milliseconds: of each step; those of steps that were run again after an interruption are the later ones.
        seconds: of the evaluation.
        recorder: cosines and operations; empty if gradients were not measured.
        weights: task → mean weight of its gradient, or loss, over the last half of the steps; nan if it is not measured.
        versions: of what it was run with.
    """

    job: Mapping[str, Any]
    corpus: str
    loss: dict[str, dict[str, float]] = field(default_factory=dict)
    bleu: dict[str, float] = field(default_factory=dict)
    chrf: dict[str, float] = field(default_factory=dict)
    f1: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    training: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    recorder: gs.Recorder = field(default_factory=gs.Recorder)
    weights: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def step_ms(self) -> float:
        """The median time of a step."""
        return statistics.median(self.milliseconds)

    def write(self, folder: Path) -> None:
        """Writes ``recording.npz`` and then ``result.json``, which says that the run is complete."""
        if len(self.recorder.steps):
            buffer = io.BytesIO()
            self.recorder.save(buffer)
            write_whole(folder / "recording.npz", buffer.getvalue())
        content = {key: value for key, value in self.__dict__.items() if key != "recorder"}
        write_whole(folder / "result.json", json.dumps(content, ensure_ascii=False, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """The result of a complete run; None if it is not complete."""
        if not (folder / "result.json").exists():
            return None
        found = cls(**json.loads((folder / "result.json").read_text(encoding="utf-8")))
        if (folder / "recording.npz").exists():
            found.recorder = gs.Recorder.load(folder / "recording.npz")
        return found


class Trainer:
    """A run under way.

    Args:
        job: what to run.
        corpus: that of the job's recipe.
        folder: where checkpoints are; None to keep none.
        device: to train on.
    """

    def __init__(self, job: Job, corpus: Corpus, folder: Path | None = None, device: str = "cpu") -> None:
        settings, method = job.settings, METHODS[job.method]
        torch.manual_seed(job.seed)
        self.job, self.corpus, self.folder, self.device = job, corpus, folder, device
        self.model = Translator(corpus.size, SIZES[settings.size], longest=2 * job.recipe.longest + 16).to(device)
        low = scarce(corpus, job.tasks)
        self.optimizer = gs.SurgeryOptimizer(
            torch.optim.Adam(self.model.parameters(), lr=settings.rate, betas=(0.9, 0.98)),
            method.rule(low, [task for task in job.tasks if task not in low]),
            model=self.model,
            groups=method.groups,
            tasks=job.tasks,
            seed=job.seed,
            measure=method.measures,
        )
        self.batches = Batches(corpus, job.tasks, size=settings.batch, temperature=settings.temperature, seed=job.seed)
        self.step = 0
        self.result = Result(asdict(job), corpus.fingerprint, versions=versions())
        self._weights: list[Tensor] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / _SAVED).exists():
                self.load(torch.load(folder / _SAVED, weights_only=True, map_location=device))

    def run(self, progress: Callable[[float], object] | None = None) -> Result:
        """Trains to the end and evaluates; writes checkpoints on the way."""
        settings = self.job.settings
        while self.step < settings.steps:
            loss = self.advance()
            if progress is not None:
                progress(loss)
            # The model first: a run that stops between the two makes it again; the other way round, it would be missing.
            if self.folder is not None and settings.keep and self.step % settings.keep == 0:
                save(self.model.state_dict(), self.folder / f"model-{self.step:07}.pt")
            if self.folder is not None and (self.step % settings.save == 0 or self.step == settings.steps):
                save(self.state_dict(), self.folder / _SAVED)
        self.evaluate()
        if self.folder is not None:
            self.result.write(self.folder)
        return self.result

    def advance(self) -> float:
        """One step; returns the training loss."""
        settings, optimizer = self.job.settings, self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(self.step)
        batch = self.batches[self.step].to(self.device)
        started = time.perf_counter()
        losses = self.gradients(batch)
        update(self.model, optimizer, settings)
        found = (losses.sum() / (batch.target[:, 1:] != PAD).sum()).item()
        self.result.milliseconds.append(1000 * (time.perf_counter() - started))
        self.result.training.append(found)
        last = optimizer.last
        if last is not None and METHODS[self.job.method].measures:
            if self.step % settings.record == 0:
                self.result.recorder.record(last, self.step)
            if 2 * self.step >= settings.steps:
                self._weights.append(_weights(last))
        self.step += 1
        return found

    def gradients(self, batch: Batch) -> Tensor:
        """One backward pass of a batch, and surgery, to ``p.grad``; returns the losses ``[B, T]`` of the tokens."""
        with self.optimizer.split(batch.tasks, reduction="sum"):
            losses = token_losses(self.model, batch, self.job.settings.smoothing)
        tokens = (batch.target[:, 1:] != PAD).sum(1)
        weights = factors(tokens, batch.tasks, len(self.job.tasks), METHODS[self.job.method].loss)
        self.optimizer.backward(losses * weights)
        self.optimizer.combine()
        return losses

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        recording = io.BytesIO()
        self.result.recorder.save(recording)
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.startswith("cuda") else None,
            "training": torch.tensor(self.result.training, dtype=torch.float64),
            "milliseconds": torch.tensor(self.result.milliseconds, dtype=torch.float64),
            "recording": torch.from_numpy(np.frombuffer(recording.getvalue(), dtype=np.uint8).copy()),
            "weights": list(self._weights),
            "corpus": self.corpus.fingerprint,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`, bit for bit.

        Raises:
            SystemExit: if it is of another corpus.
        """
        if state["corpus"] != self.corpus.fingerprint:
            raise SystemExit(f"The checkpoint in {self.folder} was made with other texts. Delete that folder.")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)
        self.result.training = state["training"].tolist()
        self.result.milliseconds = state["milliseconds"].tolist()
        self.result.recorder = gs.Recorder.load(io.BytesIO(state["recording"].cpu().numpy().tobytes()))
        self._weights = list(state["weights"])

    # --- Evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, tasks: Sequence[str] | None = None) -> None:
        """Fills in the losses and scores of the result, of all tasks or of some."""
        started, result, tasks = time.perf_counter(), self.result, self.job.tasks if tasks is None else tasks
        self.model.eval()
        for part in ("valid", "test"):
            result.loss[part] = {task: self._loss(part, task) for task in tasks}
        for task in tasks:
            texts, references = self.translate(task), references_of(self.corpus, task)
            bleu, chrf = metrics(task)
            result.texts[task] = texts
            result.bleu[task] = bleu.corpus_score(texts, [references]).score
            result.chrf[task] = chrf.corpus_score(texts, [references]).score
            result.signatures[f"BLEU {task}"] = str(bleu.get_signature())
            result.signatures["chrF"] = str(chrf.get_signature())
        self.model.train()
        if self._weights:
            means = torch.stack(self._weights).nanmean(0).tolist()
            result.weights = dict(zip(self.job.tasks, means, strict=True))
        result.seconds = time.perf_counter() - started

    @torch.no_grad()
    def translate(self, task: str) -> list[str]:
        """Greedy translations of the test pairs."""
        found: list[str] = []
        for batch in batches_of(self.corpus, "test", task):
            found += self.corpus.decode(self.model.translate(batch.source.to(self.device)))
        return found

    def _loss(self, part: str, task: str) -> float:
        total = tokens = 0.0
        for batch in batches_of(self.corpus, part, task):
            losses = token_losses(self.model, batch.to(self.device))
            total += losses.sum().item()
            tokens += (batch.target[:, 1:] != PAD).sum().item()
        return total / tokens


def scarce(corpus: Corpus, tasks: Sequence[str]) -> list[str]:
    """The tasks that have less than half as many training pairs as the largest."""
    counts = {task: len(corpus.train[other(task)].english) for task in tasks}
    return [task for task, count in counts.items() if 2 * count < max(counts.values())]


def token_losses(model: Translator, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """``[B, T - 1]``, the cross-entropy of each target piece given those before it; zero for padding."""
    scores = model(batch.source, batch.target[:, :-1])
    return cross_entropy(scores.mT, batch.target[:, 1:], ignore_index=PAD, reduction="none", label_smoothing=smoothing)


def factors(tokens: Tensor, task_ids: Tensor, tasks: int, loss: str) -> Tensor:
    """``[B, 1]``: what tokens' losses are multiplied with, so that their sum over a task is the task's loss.

    Args:
        tokens: ``[B]``, how many each sentence has.
        task_ids: ``[B]``.
        tasks: how many there are.
        loss: as in :class:`Method`.
    """
    if loss == "share":
        return (1 / tokens.sum()).expand(len(tokens), 1)
    task_ids = task_ids.to(tokens.device)
    counts = tokens.new_zeros(tasks).index_add_(0, task_ids, tokens)
    return 1 / (counts[task_ids, None] * ((counts > 0).sum() if loss == "mean / tasks" else 1))


def update(model: Translator, optimizer: torch.optim.Optimizer, settings: Settings) -> None:
    """What is done with gradients: the same for all methods."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimizer.step()
    optimizer.zero_grad()


def batches_of(corpus: Corpus, part: str, task: str, size: int = 100) -> list[Batch]:
    """All pairs of a part of the corpus, in order."""
    pairs = corpus.pairs(part, task)
    rows = [(0, a, b) for a, b in zip(pairs.english, pairs.text, strict=True)]
    return [corpus.batch((task,), rows[i : i + size]) for i in range(0, len(rows), size)]


def references_of(corpus: Corpus, task: str) -> list[str]:
    """The texts that translations of the test pairs are compared with."""
    side = 1 if task.startswith("en-") else 0
    return [pair[side] for pair in corpus.references["test"][other(task)]]


def metrics(task: str) -> tuple[BLEU, CHRF]:
    """BLEU with the tokenizer of the target language, characters where words have no spaces; and chrF."""
    tokenizer = {"zh": "zh", "ja": "char", "ko": "char"}.get(task.partition("-")[2], "13a")
    return BLEU(tokenize=tokenizer), CHRF()


def _weights(last: gs.Step) -> Tensor:
    """``[K]``: what each task's loss counts for, in the mean over surgery groups."""
    weights = last.weights.nanmean(0)
    weights = weights if last.loss_weights is None else weights * last.loss_weights
    return weights.float().cpu()


def save(content: Mapping[str, Any], path: Path) -> None:
    """Writes a file whole or not at all."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f"{path.name}.part")  # what an interruption leaves there is written over
    part.write_bytes(content)
    os.replace(part, path)


def versions(*more: str) -> dict[str, str]:
    """Of what results depend on."""
    from importlib.metadata import version

    found = {name: version(name) for name in ("torch", "numpy", "sacrebleu", "sentencepiece", *more)}
    return {"gradsurgery": gs.__version__, **found}
