"""PADA: DANN that believes less in source classes that the target does not seem to have.

Reference:
    Cao, Ma, Long, Wang, *Partial Adversarial Domain Adaptation*, ECCV 2018, Eq. 4 to 6.

Note:
    Class weights are refreshed twenty times in training. In the gated form they multiply the gate's weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import CLASSES
from ._dann import DANN
from ._deep import Batch, Seen


class PADA(DANN):
    """Weighs the source's labels, and the discriminator's source samples, by class."""

    def prepare(self) -> None:
        """Starts from equal weights."""
        super().prepare()
        self.of_class = torch.ones(CLASSES)

    def step(self, batch: Batch) -> None:
        """As DANN's."""
        if self.done and self.done % max(self.training.steps // 20, 1) == 0 and len(self.problem.x_unlabelled):
            with torch.no_grad():
                self.of_class = class_weights(self.classifier(self.encoder(self.problem.x_unlabelled)))
        super().step(batch)

    def class_weights(self, y: Tensor) -> Tensor:
        """The classes' weights."""
        return self.of_class[y]

    def sample_weights(self, seen: Seen) -> Tensor:
        """By class, and by the gate."""
        gate = super().sample_weights(seen)
        return self.of_class[seen.y] if gate is None else self.of_class[seen.y] * gate


def class_weights(logits: Tensor, temperature: float = 0.1) -> Tensor:
    """The target's mean softmax ``[C]`` of logits ``[n, C]``, divided by its largest entry."""
    shares = (logits / temperature).softmax(1).mean(0)
    return shares / shares.max()
