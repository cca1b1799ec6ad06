"""What the thesis' section 3.4.2 controls: the divergence of the source, and the labels of the target.

Each domain is cut in two halves, once and for all. Everything that was chosen by looking at results was chosen on the
``development`` halves; what is reported is of the ``evaluation`` halves, none of whose images was ever looked at before.
Emoji, where nothing was chosen at all, have the same things in both domains: there the source is of the other half of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .data import CLASSES, DIGITS, SIDE, Kind, Samples, kind, load

PARTS = ("evaluation", "development")
_SOURCE, _TARGET, _LABELLED, _IMAGES, _LABELS = range(5)  # what random numbers are for


@dataclass(frozen=True)
class Setting:
    """One cell of the thesis' tables: what there is to learn from.

    Args:
        source: the domain that labels are taken from; "" for none.
        target: the domain that is to be learned.
        eps_x: the share of source images that are rotated, flipped and strewn with salt and pepper.
        eps_y: the share of source labels that are wrong.
        labelled: the share of the target's training images whose labels are given, in percent.
        at_most: no more than so many of them in each class; None for any number.
        wrong: how labels are wrong. ``"next"``: each class is called the next one; ``"uniform"``: a label at random.
        part: of both domains, ``"evaluation"`` or ``"development"``; of the target where domains show the same things,
            and the source is of the other part.
        sources: number of source images, fewer if there are not so many.
        targets: number of target images, half of them to be tested on; fewer likewise.
    """

    source: str = "mnist"
    target: str = "uci"
    eps_x: float = 0.0
    eps_y: float = 0.0
    labelled: float = 10.0
    at_most: int | None = None
    wrong: str = "next"
    part: str = "evaluation"
    sources: int = 2500
    targets: int = 2000

    def __post_init__(self) -> None:
        for name in ("eps_x", "eps_y"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1]. Found {getattr(self, name)!r}.")
        if not 0 <= self.labelled <= 100:
            raise ValueError(f"`labelled` is a percentage, from 0 to 100. Found {self.labelled!r}.")
        if self.at_most is not None and self.at_most < 1:
            raise ValueError(f"`at_most` must be None or at least 1; for no labels, labelled=0. Found {self.at_most!r}.")
        if self.wrong not in ("next", "uniform"):
            raise ValueError(f"`wrong` must be 'next' or 'uniform'. Found {self.wrong!r}.")
        if self.part not in PARTS:
            raise ValueError(f"`part` must be one of {', '.join(PARTS)}. Found {self.part!r}.")
        if self.source == self.target:
            raise ValueError(f"`source` and `target` must be two domains. Found {self.source!r} twice.")
        if kind(self.source or self.target) != kind(self.target):
            raise ValueError(f"`source` and `target` must be of one kind. Found {self.source!r} and {self.target!r}.")
        if self.sources < 1 or self.targets < 2:
            raise ValueError(f"There must be some data. Found sources={self.sources}, targets={self.targets}.")


@dataclass(frozen=True)
class Problem:
    """Data of one repeat: images or features ``[n, D]`` and labels ``[n]`` of the source, the target's labelled training
    images, all its training images, and its test images; which source samples were perturbed, ``[n]`` each; and what kind
    of samples they all are."""

    x: Tensor
    y: Tensor
    perturbed_x: Tensor
    perturbed_y: Tensor
    x_labelled: Tensor
    y_labelled: Tensor
    x_unlabelled: Tensor
    x_test: Tensor
    y_test: Tensor
    kind: Kind = DIGITS

    @property
    def perturbed(self) -> Tensor:
        """Source samples whose image or label is not as it was, ``[n]``."""
        return self.perturbed_x | self.perturbed_y

    def target_only(self) -> Problem:
        """What ``A(∅, T)`` learns from: the target's labelled images are the "source", and the rest is as usual."""
        clean = torch.zeros(len(self.y_labelled), dtype=torch.bool)
        return replace(self, x=self.x_labelled, y=self.y_labelled, perturbed_x=clean, perturbed_y=clean)

    def source_only(self) -> Problem:
        """No target at all in training."""
        return replace(self, x_labelled=self.x[:0], y_labelled=self.y[:0], x_unlabelled=self.x[:0])

    def oracle(self) -> Problem:
        """Without the perturbed source samples."""
        own = ~self.perturbed
        none = torch.zeros(int(own.sum()), dtype=torch.bool)
        return replace(self, x=self.x[own], y=self.y[own], perturbed_x=none, perturbed_y=none)


def make(setting: Setting, seed: int, cache: Path) -> Problem:
    """Draws the data of a repeat.

    Nothing of the target, and neither the choice of source images, depends on ``eps_x`` and ``eps_y``; and what is
    perturbed at one rate is perturbed in the same way at all higher ones: differences between rates are not of the draw.

    Args:
        setting: which data.
        seed: of the repeat.
        cache: folder of the cropped images and of the features.
    """

    def random(what: int) -> np.random.Generator:
        return np.random.default_rng([seed, what])

    own = kind(setting.target)
    x_target, y_target, _ = _draw(setting.target, setting.part, setting.targets, random(_TARGET), cache)
    half = len(x_target) // 2
    labelled = choose_labelled(y_target[:half], setting.labelled, setting.at_most, random(_LABELLED))
    x, y = torch.empty(0, own.inputs), torch.empty(0, dtype=torch.int64)
    perturbed_x = perturbed_y = torch.empty(0, dtype=torch.bool)
    if setting.source:
        part = PARTS[1 - PARTS.index(setting.part)] if own.shared else setting.part
        x, y, changed = _draw(setting.source, part, setting.sources, random(_SOURCE), cache)
        x, perturbed_x = perturb_images(x, setting.eps_x, random(_IMAGES), changed)
        y, perturbed_y = perturb_labels(y, setting.eps_y, random(_LABELS), setting.wrong, own.classes)
    return Problem(
        *(x, y, perturbed_x, perturbed_y),
        *(x_target[labelled], y_target[labelled], x_target[:half], x_target[half:], y_target[half:]),
        kind=own,
    )


def choose_labelled(y: Tensor, percent: float, at_most: int | None, random: np.random.Generator) -> Tensor:
    """Indices of a share of the samples, drawn within each class, rounded up there, and no more than ``at_most``."""
    chosen = []
    for label in y.unique().numpy():
        own = np.flatnonzero(y.numpy() == label)
        count = int(np.ceil(len(own) * percent / 100))
        chosen.append(random.permutation(own)[: count if at_most is None else min(count, at_most)])
    return torch.from_numpy(np.concatenate(chosen))


def perturb_images(
    x: Tensor, rate: float, random: np.random.Generator, changed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Distorts a share of the images; returns all, and which, ``[n]``.

    Args:
        x: digits ``[n, 256]``, or features of images ``[n, D]``.
        rate: the share.
        random: a generator.
        changed: features of the distorted images, ``[n, D]``; None for digits.
    """
    which = torch.from_numpy(random.random(len(x)) < rate)
    if changed is None:
        changed = distorted(x.reshape(-1, 1, SIDE, SIDE), random).reshape(x.shape)
    return torch.where(which[:, None], changed, x), which


def distorted(images: Tensor, random: np.random.Generator) -> Tensor:
    """Images ``[n, channels, side, side]``, values in [0, 1], turned, flipped and strewn with salt and pepper.

    Each is turned by up to 90 degrees to either side, flipped along each axis with probability 1/2, and then 20 % of its
    pixels are made black or white. What is turned in from outside the image is 0.
    """
    n, _, *sides = images.shape
    angle = torch.from_numpy(random.uniform(-np.pi / 2, np.pi / 2, n)).float()
    flips = torch.from_numpy(random.choice([-1.0, 1.0], (n, 2))).float()
    noise = torch.from_numpy(random.random((n, 1, *sides))).float()
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1) * flips[:, None]
    grid = F.affine_grid(torch.cat([turn, torch.zeros(n, 2, 1)], -1), list(images.shape), align_corners=False)
    turned = F.grid_sample(images, grid, align_corners=False)
    return torch.where(noise < 0.1, 0.0, torch.where(noise > 0.9, 1.0, turned))


def perturb_labels(
    y: Tensor, rate: float, random: np.random.Generator, wrong: str = "next", classes: int = CLASSES
) -> tuple[Tensor, Tensor]:
    """Changes a share of the labels ``[n]``; returns all, and which, ``[n]``. One drawn at random may be the right one."""
    which = torch.from_numpy(random.random(len(y)) < rate)
    drawn = torch.from_numpy(random.integers(classes, size=len(y)))
    other = (y + 1) % classes if wrong == "next" else drawn
    changed = torch.where(which, other, y)
    return changed, changed != y


def _draw(domain: str, part: str, count: int, random: np.random.Generator, cache: Path) -> Samples:
    found = load(domain, cache)
    half = len(found.y) // 2
    return found.of(torch.from_numpy(random.permutation(half)[:count]) + PARTS.index(part) * half)
