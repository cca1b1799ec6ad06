"""DANN: features that a discriminator cannot tell apart; and the thesis' gated form of it.

Reference:
    Ganin et al., *Domain-Adversarial Training of Neural Networks*, JMLR 2016. Gate: Eq. 3.9 to 3.11 of the thesis.

Note:
    A gate that weighs by features alone (DANN_gate-only of the thesis) leaves DANN's own discriminator as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import gradsurgery as gs

from ..models import FEATURES, head
from ._deep import Batch, Deep, Seen, mean


class DANN(Deep):
    """Two tasks, ``label`` and ``domain``: the rule ``Adversary`` turns the second one's gradient around in the encoder."""

    matches = True
    adversarial = True

    def prepare(self) -> None:
        """A discriminator of features alone, unless the gate's one matches; one optimizer for everything."""
        self.discriminator = head(FEATURES, 1)
        own = torch.nn.ModuleList([self.encoder, self.classifier, self.discriminator])
        if self.gate is not None:
            own.append(self.gate)
        self.optimizer = gs.SurgeryOptimizer(
            self.adam(own),
            gs.Adversary("domain", mu=self.training.mu, steps=self.training.steps),
            model=own,
            tasks=["label", "domain"],
        )

    def step(self, batch: Batch) -> None:
        """One backward pass for each of the two tasks."""
        seen = self.see(batch)
        losses = {"label": self.label_loss(seen)}
        if len(seen.source):
            losses["domain"] = self.domain_loss(seen)
        self.optimizer.zero_grad()
        self.optimizer.backward(losses)
        self.optimizer.step()

    def domain_loss(self, seen: Seen) -> Tensor:
        """What the discriminator makes small and the encoder makes large: minus Eq. 3.7 or 3.10."""
        if self.gate is not None and self.gating is not None and self.gating.weights != "marginal":
            return self.gate_loss(seen)
        source, target = self.discriminator(seen.source), self.discriminator(seen.unlabelled)
        return marginal(source, target, self.class_weights(seen.y)) + self.gate_loss(seen)

    def class_weights(self, y: Tensor) -> Tensor | None:
        """Weights of source samples ``[B]`` by their labels, in both losses; None for ones."""
        return None


def marginal(source: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Minus Eq. 3.7, of logits ``[B, 1]`` of being from the target; source samples may be weighted, ``[B]``."""
    fake = F.softplus(source[:, 0])
    return mean(fake if weights is None else weights * fake) + mean(F.softplus(-target[:, 0]))
