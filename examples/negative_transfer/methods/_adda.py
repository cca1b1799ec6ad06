"""ADDA: an encoder for each domain; the target's is trained to look like the source's.

Reference:
    Tzeng, Hoffman, Saenko, Darrell, *Adversarial Discriminative Domain Adaptation*, CVPR 2017, Eq. 9.

Note:
    The first half of the steps trains one encoder on all labels; the second half is adversarial. There the target's labels
    go on being learned, as in Eq. 3.6 of the thesis, and so does the classifier. With a gate, the target's encoder matches
    the joint distribution too (Eq. 3.10), and the gate learns from the first step. μ is .1, as DANN's.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradsurgery as gs

from ._dann import deceived, marginal
from ._deep import Batch, Deep, Seen, adversary_loss, mean


class ADDA(Deep):
    """Two stages: plain training, then the target's encoder against a discriminator."""

    matches = True
    strength = 0.1

    def prepare(self) -> None:
        """Optimizers of both stages."""
        self.adversary = deceived(self.gating)
        self.of_target: nn.Module = self.encoder
        own = [self.gate] if self.gate is not None else []
        self.optimizer = self.adam(self.encoder, self.classifier, *own)
        self.of_adversary = self.adam(self.adversary, *own)

    def step(self, batch: Batch) -> None:
        """Of the stage that it is time for."""
        if self.progress < 0.5:
            self.plain(batch)
        else:
            if self.of_target is self.encoder:
                self.of_target = copy.deepcopy(self.encoder)
                self.optimizer = self.adam(self.of_target, self.classifier)
            self.adversarial(batch)

    def plain(self, batch: Batch) -> None:
        """All labels, one encoder."""
        seen = self.see(batch)
        self.optimizer.zero_grad()
        (self.label_loss(seen) + self.gate_loss(seen)).backward()
        self.optimizer.step()

    def adversarial(self, batch: Batch) -> None:
        """The discriminator's step, then the step of target encoder and classifier."""
        with torch.no_grad():
            source = self.encoder(batch.x)
        count = len(batch.x_labelled)
        target = self.of_target(torch.cat([batch.x_labelled, batch.x_unlabelled]))
        seen = Seen(source, batch.y, target[:count], batch.y_labelled, target[count:])
        apart = seen.detached()
        if len(source):
            self.of_adversary.zero_grad()
            (self.domain_loss(apart) + self.gate_loss(apart)).backward()
            self.of_adversary.step()
        self.optimizer.zero_grad()
        loss = self.label_loss(seen)
        if len(source):
            loss = loss + self.mu * self.fooling_loss(seen)
        loss.backward()
        self.optimizer.step()

    def domain_loss(self, seen: Seen) -> Tensor:
        """The discriminator's."""
        if isinstance(self.adversary, gs.DiscriminatorGate):
            return adversary_loss(self.adversary, seen)
        return marginal(self.adversary(seen.source), self.adversary(seen.unlabelled))

    def fooling_loss(self, seen: Seen) -> Tensor:
        """Low where target features pass as the source's: labels inverted."""
        if not isinstance(self.adversary, gs.DiscriminatorGate):
            return mean(F.softplus(self.adversary(seen.unlabelled)[:, 0]))
        fooled = [mean(F.softplus(self.adversary(seen.unlabelled, None)))]
        if len(seen.labelled):
            fooled.append(mean(F.softplus(self.adversary(seen.labelled, seen.y_labelled))))
        return torch.stack(fooled).mean()

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """By the target's encoder."""
        return self.of_target(x)
