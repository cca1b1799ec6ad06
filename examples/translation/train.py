"""Training and evaluation of one method."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from sacrebleu.metrics import CHRF
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

import gradsurgery as gs

from .data import PAD, Corpus
from .model import Translator

METHODS: Mapping[str, Callable[[], gs.Rule]] = {
    "Sum": gs.Sum,
    "PCGrad": gs.PCGrad,
    "GradVac": lambda: gs.GradVac(beta=1e-2),
}

Batch = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Settings:
    """Sizes, fixed before any result was looked at: what two cores train in a minute or two.

    Attributes:
        steps: optimizer steps of each method.
        batch: pairs of each language in a step.
        width: of the model.
        layers: blocks of the encoder, and of the decoder.
        rate: the highest learning rate.
        decoded: validation pairs of each language that are translated; the loss is taken over all.
        every: surgery at each so many steps; those in between reuse its mixing.
        mixed: whether all languages go through the model in one batch, or each on its own.
    """

    steps: int = 240
    batch: int = 8
    width: int = 64
    layers: int = 2
    rate: float = 3e-3
    decoded: int = 40
    every: int = 1
    mixed: bool = False

    def quick(self) -> Settings:
        """Three tiny steps."""
        return replace(self, steps=3, batch=2, width=16, decoded=min(self.decoded, 2))


@dataclass
class Run:
    """What came of one method with one seed.

    Attributes:
        method: name of the method.
        seed: of the initial weights and batches.
        every: surgery at each so many steps.
        recorder: cosines and operations of the steps with surgery.
        milliseconds: of each step, from the first forward pass to the end of the optimizer's step.
        training: mean loss of all languages, of each step.
        loss: language → validation loss per character, in nats.
        chrf: language → chrF of greedy translations.
    """

    method: str
    seed: int
    every: int
    recorder: gs.Recorder
    milliseconds: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    loss: dict[str, float] = field(default_factory=dict)
    chrf: dict[str, float] = field(default_factory=dict)

    @property
    def average(self) -> float:
        """Mean validation loss of all languages."""
        return statistics.fmean(self.loss.values())


def train(method: str, seed: int, corpus: Corpus, batches: Sequence[Batch], settings: Settings) -> Iterator[Run]:
    """Trains a model from the seed's initial weights on the batches, and evaluates it.

    A generator, so that several can take turns, which changes none of their results.

    Args:
        method: name of one of :data:`METHODS`.
        seed: of the initial weights, dropout, and the rule's random order.
        corpus: for evaluation.
        batches: one for each step; the same for all methods.
        settings: sizes.

    Yields:
        After each step, the run so far. It is evaluated when the generator is exhausted.
    """
    torch.manual_seed(seed)
    model = Translator(len(corpus.ids), width=settings.width, layers=settings.layers)
    optimizer = gs.SurgeryOptimizer(
        torch.optim.AdamW(model.parameters(), lr=settings.rate),
        rule=METHODS[method](),
        model=model,
        groups="layer",
        tasks=corpus.languages,
        seed=seed,
        every=settings.every,
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=len(batches), pct_start=0.2)
    backward = backward_mixed if settings.mixed else backward_apart
    run = Run(method, seed, settings.every, gs.Recorder(optimizer))
    for batch in batches:
        start = time.perf_counter()
        loss = backward(optimizer, model, batch)
        optimizer.combine()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        run.milliseconds.append(1000 * (time.perf_counter() - start))
        run.training.append(loss)
        dropout = torch.get_rng_state()
        yield run
        torch.set_rng_state(dropout)
    evaluate(run, model, corpus, settings.decoded)


def backward_apart(optimizer: gs.SurgeryOptimizer, model: Translator, batch: Batch) -> float:
    """A forward and a backward pass for each language: only one graph is in memory at a time. Returns the mean loss."""
    total = 0.0
    for language, (source, target) in batch.items():
        loss = per_character(model, source, target)
        optimizer.backward({language: loss})
        total += loss.item() / len(batch)
    return total


def backward_mixed(optimizer: gs.SurgeryOptimizer, model: Translator, batch: Batch) -> float:
    """One forward and one backward pass for all languages, with the same losses. Returns their mean."""
    of_sample = [language for language, (source, _) in batch.items() for _ in source]
    source, target = (
        pad_sequence([row for pair in batch.values() for row in pair[side]], batch_first=True, padding_value=PAD)
        for side in (0, 1)
    )
    characters = {language: int((target[:, 1:] != PAD).sum()) for language, (_, target) in batch.items()}
    with optimizer.split(of_sample, reduction="sum"):
        losses = cross_entropy(model(source, target[:, :-1]).mT, target[:, 1:], ignore_index=PAD, reduction="none")
        losses = losses / torch.tensor([characters[language] for language in of_sample])[:, None]
    optimizer.backward(losses)
    return losses.sum().item() / len(batch)


def per_character(model: Translator, source: Tensor, target: Tensor) -> Tensor:
    """The mean cross-entropy of a target symbol given those before it, in nats."""
    scores = model(source, target[:, :-1])
    return cross_entropy(scores.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)


@torch.no_grad()
def evaluate(run: Run, model: Translator, corpus: Corpus, decoded: int) -> None:
    """Fills in the losses and chrF of the run, on the validation pairs; no chrF if none are to be decoded."""
    model.eval()
    for language, pairs in corpus.valid.items():
        source, target = corpus.encode(language, pairs)
        run.loss[language] = per_character(model, source, target).item()
        if decoded:
            texts = corpus.decode(model.translate(source[:decoded]))
            references = [[pair.translation for pair in pairs[:decoded]]]
            run.chrf[language] = CHRF().corpus_score(texts, references).score
