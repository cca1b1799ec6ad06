"""The networks that all deep methods share: a small LeNet on 16×16 pixels, a linear classifier, and two-layer heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .data import CLASSES, SIDE

FEATURES = 64


def encoder(channels: int = 8) -> nn.Sequential:
    """Images ``[B, 256]`` to features ``[B, 64]``: LeNet with strides in place of pooling."""
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, channels, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * (SIDE // 4) ** 2, FEATURES),
        nn.ReLU(),
    )


def classifier() -> nn.Linear:
    """Features ``[B, 64]`` to logits ``[B, 10]``."""
    return nn.Linear(FEATURES, CLASSES)


def head(inputs: int, outputs: int, hidden: int = 64) -> nn.Sequential:
    """``[B, inputs]`` to ``[B, outputs]``."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Projection(nn.Module):
    """A discriminator with a linear part for each label, ``logit = v_y · f + b_y``, behind dropout.

    With a handful of labelled target samples, a perceptron of features and labels tells them from the source by heart, and
    its odds are of no use. Which label goes with which features is what the gate is to know, and that is this one's only
    means.

    Reference:
        Miyato, Koyama, *cGANs with Projection Discriminator*, ICLR 2018, Eq. 3, without the part that knows no label.
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.of_label = nn.Linear(FEATURES, CLASSES + 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B]`` of features and, behind them, labels in one-hot form, ``[B, 64 + 11]``."""
        features, label = x.split([FEATURES, CLASSES + 1], 1)
        return torch.einsum("bc,bc->b", self.of_label(self.dropout(features)), label)
