"""What the deep methods share: the network, the batches, and the loss of labels, gated or not (Eq. 3.6 and 3.9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradsurgery as gs

from ..data import CLASSES
from ..models import FEATURES, Projection, classifier, encoder
from ..protocol import Problem


@dataclass(frozen=True)
class Training:
    """Hyperparameters, the same for all deep methods, chosen on the development halves (see the README).

    Args:
        steps: number of optimizer steps.
        batch: source samples, and unlabelled target samples, in a step.
        few: labelled target samples in a step, drawn with replacement.
        learning_rate: of Adam.
        scale: λ, the factor of the gate's weights (Eq. 3.9).
        clamp: the gate's largest weight.
        normalise: whether the gate's weights are divided by their mean over the batch.
        dropout: in the gate's discriminator.
    """

    steps: int = 400
    batch: int = 64
    few: int = 32
    learning_rate: float = 1e-3
    scale: float = 1.0
    clamp: float = 2.0
    normalise: bool = False
    dropout: float = 0.5


@dataclass(frozen=True)
class Gating:
    """How a method is gated.

    Args:
        weights: what weighs the source: ``"joint"`` (features and label), ``"marginal"`` (features alone), ``"none"``.
        terms: what an adversarial method's encoder matches: ``"both"``, ``"joint"``, ``"marginal"`` or ``"none"``.
    """

    weights: str = "joint"
    terms: str = "both"


class Batch(NamedTuple):
    """Samples of one step. Any part may be empty."""

    x: Tensor
    y: Tensor
    x_labelled: Tensor
    y_labelled: Tensor
    x_unlabelled: Tensor


class Seen(NamedTuple):
    """Features of a batch ``[·, 64]``, and its labels."""

    source: Tensor
    y: Tensor
    labelled: Tensor
    y_labelled: Tensor
    unlabelled: Tensor

    def detached(self) -> Seen:
        """The same, but no gradient reaches the encoder."""
        return Seen(*(part.detach() for part in self))


class Deep:
    """Plain training on labelled source and target data, and what every deep method is a change of.

    Args:
        problem: the data. Without any labels, there is nothing to train, and the network stays as it was made.
        training: hyperparameters.
        seed: of initial weights and batches.
        gating: how the source is weighed by a :class:`gradsurgery.DiscriminatorGate`; None for no gate.
    """

    matches: ClassVar[bool] = False
    """Whether unlabelled target data are used."""

    strength: ClassVar[float] = 1.0
    """What the weight of alignment, μ of Eq. 3.5, grows to."""

    def __init__(self, problem: Problem, training: Training, seed: int, gating: Gating | None = None) -> None:
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.problem, self.training, self.gating = problem, training, gating
        self.encoder, self.classifier = encoder(), classifier()
        self.done = 0
        self.gate: gs.DiscriminatorGate | None = None
        if gating is not None and gating.weights != "none":
            self.gate = gs.DiscriminatorGate(
                FEATURES,
                CLASSES,
                terms="none",
                scale=training.scale,
                clamp=training.clamp,
                normalise=training.normalise,
                discriminator=Projection(training.dropout),
            )
        self.optimizer: torch.optim.Optimizer
        self.prepare()

    # --- What a method changes ------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Makes further networks, and optimizers."""
        modules = [self.encoder, self.classifier, *([self.gate] if self.gate is not None else [])]
        self.optimizer = self.adam(*modules)

    def step(self, batch: Batch) -> None:
        """Makes one step."""
        seen = self.see(batch)
        loss = self.label_loss(seen) + self.gate_loss(seen)
        if self.matches and len(seen.source):
            loss = loss + self.mu * self.distance(seen)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def distance(self, seen: Seen) -> Tensor:
        """How far apart the two domains are, for methods that make it small."""
        raise NotImplementedError

    def sample_weights(self, seen: Seen) -> Tensor | None:
        """Weights of source samples, ``[B]``, or None for ones."""
        return self.gate_weights(seen.source, seen.y)

    # --- What it is made of ---------------------------------------------------------------------------------------------

    def fit(self) -> Deep:
        """Trains."""
        problem, training = self.problem, self.training
        if len(problem.x) + len(problem.x_labelled) == 0:
            return self
        for self.done in range(training.steps):
            source, few, rest = (
                self.draw(len(x), size)
                for x, size in (
                    (problem.x, training.batch),
                    (problem.x_labelled, training.few),
                    (problem.x_unlabelled, training.batch),
                )
            )
            self.step(
                Batch(
                    *(problem.x[source], problem.y[source]),
                    *(problem.x_labelled[few], problem.y_labelled[few], problem.x_unlabelled[rest]),
                )
            )
        return self

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Labels ``[n]`` of target images ``[n, 256]``."""
        return self.classifier(self.features(x)).argmax(1)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Features ``[n, 64]`` of target images."""
        return self.encoder(x)

    @torch.no_grad()
    def source_features(self, x: Tensor) -> Tensor:
        """Features ``[n, 64]`` of source images."""
        return self.encoder(x)

    @property
    def progress(self) -> float:
        """The share of the steps that are done."""
        return self.done / self.training.steps

    @property
    def mu(self) -> float:
        """The weight of alignment now: from 0 to its full value (Ganin et al., 2016)."""
        return self.strength * (2 / (1 + float(torch.exp(torch.tensor(-10 * self.progress)))) - 1)

    def adam(self, *modules: nn.Module) -> torch.optim.Adam:
        """An optimizer of these modules."""
        return torch.optim.Adam(nn.ModuleList(modules).parameters(), lr=self.training.learning_rate)

    def draw(self, count: int, size: int) -> Tensor:
        """Indices of ``size`` of ``count`` samples, with replacement; none of none."""
        return torch.randint(max(count, 1), (size if count else 0,), generator=self.generator)

    def see(self, batch: Batch) -> Seen:
        """Features of all samples, in one pass."""
        parts = [batch.x, batch.x_labelled, *([batch.x_unlabelled] if self.matches or self.gate is not None else [])]
        source, labelled, *rest = self.encoder(torch.cat(parts)).split([len(part) for part in parts])
        return Seen(source, batch.y, labelled, batch.y_labelled, rest[0] if rest else source[:0])

    def gate_weights(self, features: Tensor, y: Tensor) -> Tensor | None:
        """The gate's weights ``[n]`` of source samples (Eq. 3.9); None if it does not weigh.

        If no target label is known, it knows features alone.
        """
        if self.gate is None or self.gating is None:
            return None
        joint = self.gating.weights == "joint" and len(self.problem.x_labelled) > 0
        self.gate.eval()
        weights = self.gate.weights(features, y if joint else None)
        self.gate.train()
        return weights

    def label_loss(self, seen: Seen) -> Tensor:
        """Cross entropy of the target's labelled samples, and weighted, of the source's (Eq. 3.6 and 3.9)."""
        loss = mean(F.cross_entropy(self.classifier(seen.labelled), seen.y_labelled, reduction="none"))
        each = F.cross_entropy(self.classifier(seen.source), seen.y, reduction="none")
        weights = self.sample_weights(seen) if len(seen.source) else None
        return loss + mean(each if weights is None else weights * each)

    def gate_loss(self, seen: Seen) -> Tensor:
        """Minus Eq. 3.10, of the gate's discriminator alone: it looks on. 0 without a gate."""
        return seen.source.new_zeros(()) if self.gate is None or not len(seen.source) else self.gate.loss(**sides(seen))


def adversary_loss(adversary: gs.DiscriminatorGate, seen: Seen) -> Tensor:
    """Minus Eq. 3.10, the mean of its terms instead of their sum: gated methods drive the encoder no harder than others."""
    loss: Tensor = adversary.loss(**sides(seen))
    return loss / 2 if adversary.terms == "both" else loss


def sides(seen: Seen) -> dict[str, Any]:
    """The arguments of a gate's losses."""
    target = (seen.labelled, seen.y_labelled) if len(seen.labelled) else None
    return {"source": (seen.source, seen.y), "target": target, "unlabelled": seen.unlabelled}


def mean(values: Tensor) -> Tensor:
    """The mean, 0 of nothing."""
    return values.sum() / max(len(values), 1)
