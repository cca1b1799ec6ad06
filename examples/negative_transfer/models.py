"""The networks that all deep methods share: a small LeNet on 16×16 pixels, a linear classifier, and two-layer heads."""

from __future__ import annotations

from torch import nn

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
