"""Training and evaluation of one method."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from sacrebleu.metrics import CHRF
from torch import Tensor
from torch.nn.functional import cross_entropy

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
    """

    steps: int = 240
    batch: int = 8
    width: int = 64
    layers: int = 2
    rate: float = 3e-3
    decoded: int = 40


@dataclass
class Run:
    """What came of one method with one seed.

    Attributes:
        method: name of the method.
        seed: of the initial weights and batches.
        recorder: cosines and operations of every step.
        milliseconds: of each step, from the first forward pass to the end of the optimizer's step.
        loss: language → validation loss per character, in nats.
        chrf: language → chrF of greedy translations.
    """

    method: str
    seed: int
    recorder: gs.Recorder
    milliseconds: list[float] = field(default_factory=list)
    loss: dict[str, float] = field(default_factory=dict)
    chrf: dict[str, float] = field(default_factory=dict)


def train(
    method: str,
    seed: int,
    corpus: Corpus,
    batches: Sequence[Batch],
    settings: Settings,
    progress: Callable[[float], None] = lambda loss: None,
) -> Run:
    """Trains a model from the seed's initial weights on the batches, and evaluates it.

    Args:
        method: name of one of :data:`METHODS`.
        seed: of the initial weights, dropout, and the rule's random order.
        corpus: for evaluation.
        batches: one for each step; the same for all methods.
        settings: sizes.
        progress: is told the mean loss after each step.
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
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=len(batches), pct_start=0.2)
    run = Run(method, seed, gs.Recorder(optimizer))
    for batch in batches:
        start = time.perf_counter()
        total = 0.0
        for language, (source, target) in batch.items():
            loss = per_character(model, source, target)
            optimizer.backward({language: loss})  # one at a time: only one graph is in memory
            total += loss.item() / len(batch)
        optimizer.combine()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        run.milliseconds.append(1000 * (time.perf_counter() - start))
        progress(total)
    evaluate(run, model, corpus, settings.decoded)
    return run


def per_character(model: Translator, source: Tensor, target: Tensor) -> Tensor:
    """The mean cross-entropy of a target symbol given those before it, in nats."""
    scores = model(source, target[:, :-1])
    return cross_entropy(scores.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)


@torch.no_grad()
def evaluate(run: Run, model: Translator, corpus: Corpus, decoded: int) -> None:
    """Fills in the losses and chrF of the run, on the validation pairs."""
    model.eval()
    for language, pairs in corpus.valid.items():
        source, target = corpus.encode(language, pairs)
        run.loss[language] = per_character(model, source, target).item()
        texts = corpus.decode(model.translate(source[:decoded]))
        references = [[pair.translation for pair in pairs[:decoded]]]
        run.chrf[language] = CHRF().corpus_score(texts, references).score
