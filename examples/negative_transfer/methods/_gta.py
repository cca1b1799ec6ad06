"""GTA: images generated from features, by which a discriminator teaches the encoder.

Reference:
    Sankaranarayanan, Balaji, Castillo, Chellappa, *Generate To Adapt: Aligning Domains using Generative Adversarial
    Networks*, CVPR 2018, Algorithm 1.

Note:
    Generator and discriminator are two-layer perceptrons: the images have 256 pixels. What a step needs is computed anew
    after the step before it. Labelled target samples add their cross entropy (Eq. 3.6 of the thesis). With a gate, the
    source's labels are weighted wherever they are used; the thesis extends GTA's own discriminator for that, here the gate
    is a discriminator of features, as for DAN and Deep CORAL.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import CLASSES, SIDE
from ..models import FEATURES, head
from ._deep import Batch, Deep, Seen, mean

NOISE = 32
ALPHA, BETA = 0.1, 0.03


class GTA(Deep):
    """Three optimizers: of the discriminator, of the generator, and of encoder and classifier."""

    matches = True

    def prepare(self) -> None:
        """The generator sees features, noise and a label or "none"; the discriminator tells real or not, and the label."""
        self.generator_net = nn.Sequential(head(FEATURES + NOISE + CLASSES + 1, SIDE**2, 128), nn.Sigmoid())
        self.judge = head(SIDE**2, 1 + CLASSES, 128)
        own = [self.gate] if self.gate is not None else []
        self.optimizer = self.adam(self.encoder, self.classifier, *own)
        self.of_judge, self.of_generator = self.adam(self.judge), self.adam(self.generator_net)

    def step(self, batch: Batch) -> None:
        """Discriminator, generator, then encoder and classifier."""
        seen = self.see(batch)
        if len(seen.source):
            apart = seen.detached()
            weights = self.sample_weights(apart)
            self.judge_step(batch, apart, weights)
            self.generator_step(apart, weights)
        loss = self.label_loss(seen) + self.gate_loss(seen)
        if len(seen.source):
            real, label = self.judged(self.generate(seen.source, seen.y))
            loss = loss + self.mu * ALPHA * of_label(label, seen.y, self.sample_weights(seen))
            real, _ = self.judged(self.generate(seen.unlabelled, None))
            loss = loss + self.mu * BETA * mean(F.softplus(-real))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def judge_step(self, batch: Batch, seen: Seen, weights: Tensor | None) -> None:
        """Real source images against those generated from both domains."""
        with torch.no_grad():
            from_source, from_target = self.generate(seen.source, seen.y), self.generate(seen.unlabelled, None)
        real, label = self.judged(batch.x)
        loss = mean(F.softplus(-real)) + of_label(label, batch.y, weights)
        for images in (from_source, from_target):
            fake, _ = self.judged(images)
            loss = loss + mean(F.softplus(fake))
        self.of_judge.zero_grad()
        loss.backward()
        self.of_judge.step()

    def generator_step(self, seen: Seen, weights: Tensor | None) -> None:
        """Images of the source's features that pass as real ones, of their label."""
        real, label = self.judged(self.generate(seen.source, seen.y))
        self.of_generator.zero_grad()
        (mean(F.softplus(-real)) + of_label(label, seen.y, weights)).backward()
        self.of_generator.step()

    def generate(self, features: Tensor, y: Tensor | None) -> Tensor:
        """Images ``[B, 256]`` of features ``[B, 64]`` and labels ``[B]``, or None of them."""
        label = torch.full((len(features),), CLASSES) if y is None else y
        noise = torch.randn(len(features), NOISE, generator=self.generator)
        return self.generator_net(torch.cat([features, noise, F.one_hot(label, CLASSES + 1).float()], 1))

    def judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's logits: of being real ``[B]``, and of labels ``[B, 10]``."""
        answer = self.judge(images)
        return answer[:, 0], answer[:, 1:]


def of_label(logits: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
    """Cross entropy, weighted if there are weights ``[B]``."""
    each = F.cross_entropy(logits, y, reduction="none")
    return mean(each if weights is None else weights * each)
