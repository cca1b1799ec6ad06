"""DANN: features that a discriminator cannot tell apart; and the thesis' gated form of it.

Reference:
    Ganin et al., *Domain-Adversarial Training of Neural Networks*, JMLR 2016. Gate: Eq. 3.9 to 3.11 of the thesis.

Note:
    The thesis has one discriminator for both ends: what the encoder is to deceive, and what weighs the source. A deceived
    discriminator weighs badly, so these are two here: ``adversary``, with the thesis' terms (Eq. 3.10), and the gate, which
    looks on. μ grows to .1 instead of 1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

import gradsurgery as gs

from ..data import CLASSES
from ..models import FEATURES, head
from ._deep import Batch, Deep, Gating, Seen, adversary_loss, mean


class DANN(Deep):
    """Two tasks, ``label`` and ``domain``: the rule ``Adversary`` turns the second one's gradient around in the encoder."""

    matches = True
    strength = 0.1

    def prepare(self) -> None:
        """The discriminator that the encoder is to deceive, and one optimizer for everything."""
        self.adversary: nn.Module = deceived(self.gating)
        own = nn.ModuleList([self.encoder, self.classifier, self.adversary])
        if self.gate is not None:
            own.append(self.gate)
        self.optimizer = self.surgery = gs.SurgeryOptimizer(
            self.adam(own),
            gs.Adversary("domain", mu=self.strength, steps=self.training.steps),
            model=own,
            tasks=["label", "domain"],
        )

    def step(self, batch: Batch) -> None:
        """One backward pass for each of the two tasks."""
        seen = self.see(batch)
        losses = {"label": self.label_loss(seen)}
        if len(seen.source):
            losses["domain"] = self.domain_loss(seen) + self.gate_loss(seen)
        self.surgery.zero_grad()
        self.surgery.backward(losses)
        self.surgery.step()

    def domain_loss(self, seen: Seen) -> Tensor:
        """What the discriminator makes small and the encoder makes large: minus Eq. 3.7 or 3.10."""
        if isinstance(self.adversary, gs.DiscriminatorGate):
            return adversary_loss(self.adversary, seen)
        source, target = self.adversary(seen.source), self.adversary(seen.unlabelled)
        return marginal(source, target, self.class_weights(seen.y))

    def class_weights(self, y: Tensor) -> Tensor | None:
        """Weights of source samples ``[B]`` by their labels, in both losses; None for ones."""
        return None


def deceived(gating: Gating | None) -> nn.Module:
    """A discriminator of features and labels where a method is gated, of features alone otherwise."""
    if gating is None or gating.weights == "marginal":
        return head(FEATURES, 1)
    return gs.DiscriminatorGate(FEATURES, CLASSES, terms=gating.terms)


def marginal(source: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Minus Eq. 3.7, of logits ``[B, 1]`` of being from the target; source samples may be weighted, ``[B]``."""
    fake = F.softplus(source[:, 0])
    return mean(fake if weights is None else weights * fake) + mean(F.softplus(-target[:, 0]))
