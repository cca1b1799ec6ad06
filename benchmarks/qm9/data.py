"""QM9: some 130,000 small organic molecules and their properties, from the package ``qm9pack``.

A molecule becomes a vector: how many atoms it has of each element, and for each pair of elements a smooth histogram of the
distances between such atoms. That is a stand-in for the graph networks of the published experiments, which would take days
here.

Reference:
    Ramakrishnan, Dral, Rupp, von Lilienfeld, *Quantum chemistry structures and properties of 134 kilo molecules*,
    Scientific Data 2014.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

VERSION = "1.0.3"
ELEMENTS = "HCNOF"
FILES = ("qm9_part1.csv", "qm9_part2.csv", "qm9_part3.csv")
CENTRES = np.linspace(0.8, 8.0, 24)  # angstrom
WIDTH = CENTRES[1] - CENTRES[0]

_HARTREE = 27211.386  # meV


class Target(NamedTuple):
    """A property: its column, unit, factor to this unit, and whether it grows with the number of atoms of each kind."""

    column: str
    unit: str
    factor: float = 1.0
    extensive: bool = False


TARGETS = {
    "mu": Target("Dipole_debye", "D"),
    "alpha": Target("Polarizability_bohr3", "bohr^3"),
    "HOMO": Target("HOMO_au", "meV", _HARTREE),
    "LUMO": Target("LUMO_au", "meV", _HARTREE),
    "R2": Target("R2_bohr2", "bohr^2"),
    "ZPVE": Target("ZPVE_au", "meV", _HARTREE),
    "U0": Target("InternalEnergy_0K_au", "meV", _HARTREE, extensive=True),
    "U": Target("InternalEnergy_298K_au", "meV", _HARTREE, extensive=True),
    "H": Target("Enthalphy_298K_au", "meV", _HARTREE, extensive=True),
    "G": Target("GibbsFreeEnergy_298K_au", "meV", _HARTREE, extensive=True),
    "Cv": Target("Heatcapacity_Cv_cal_mol_K", "cal/mol/K"),
}


@dataclass(frozen=True)
class Part:
    """Molecules: features ``[n, F]``, and standardized targets ``[n, K]``, both float32."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Data:
    """Three disjoint sets of molecules, and what one standardized unit of each target is, ``[K]``."""

    train: Part
    valid: Part
    test: Part
    unit: Tensor


def features(elements: str, places: NDArray[np.float64]) -> NDArray[np.float32]:
    """A molecule's vector ``[F]``, from its atoms' elements and places ``[atoms, 3]``: the same for any order of atoms."""
    kinds = np.array([ELEMENTS.index(element) for element in elements])
    count = np.bincount(kinds, minlength=len(ELEMENTS))
    i, j = np.triu_indices(len(kinds), 1)
    apart = np.linalg.norm(places[i] - places[j], axis=1)
    low, high = np.minimum(kinds[i], kinds[j]), np.maximum(kinds[i], kinds[j])
    pair = high * (high + 1) // 2 + low
    near = np.exp(-0.5 * ((apart[:, None] - CENTRES) / WIDTH) ** 2)
    histogram = np.zeros((len(ELEMENTS) * (len(ELEMENTS) + 1) // 2, len(CENTRES)))
    np.add.at(histogram, pair, near)
    result: NDArray[np.float32] = np.concatenate([count, histogram.ravel()]).astype(np.float32)
    return result


def load(cache: Path, *, train: int, valid: int, test: int, seed: int = 0) -> Data:
    """The molecules, split at random.

    Args:
        cache: folder where the features are kept.
        train: number of molecules, as are ``valid`` and ``test``.
        seed: of the split.

    Raises:
        SystemExit: if the package is not there, or is another version.
        ValueError: if there are not so many molecules.
    """
    x, y = _all(cache)
    if train + valid + test > len(x):
        raise ValueError(f"There are {len(x)} molecules, fewer than train + valid + test = {train + valid + test}.")
    order = np.random.default_rng(seed).permutation(len(x))
    parts = np.split(order[: train + valid + test], [train, train + valid])
    return standardized(x, y, *parts)


def standardized(
    x: NDArray[np.float32],
    y: NDArray[np.float64],
    train: NDArray[np.int64],
    valid: NDArray[np.int64],
    test: NDArray[np.int64],
) -> Data:
    """Both scaled by what is seen in training; energies are what atoms alone (least squares) do not explain."""
    atoms = np.concatenate([x[:, : len(ELEMENTS)], np.ones((len(x), 1))], 1)
    extensive = [k for k, target in enumerate(TARGETS.values()) if target.extensive]
    y = y.copy()
    y[:, extensive] -= atoms @ np.linalg.lstsq(atoms[train], y[train][:, extensive], rcond=None)[0]
    centre, unit = y[train].mean(0), y[train].std(0)
    middle, spread = x[train].mean(0), x[train].std(0)
    x = (x - middle) / np.where(spread > 0, spread, 1)
    y = (y - centre) / unit
    parts = [Part(torch.from_numpy(x[own]), torch.from_numpy(y[own].astype(np.float32))) for own in (train, valid, test)]
    return Data(*parts, torch.from_numpy(unit.astype(np.float32)))


def cached(folder: Path) -> Path:
    """Where all molecules' features are kept; another file if what they are made of is changed."""
    key = hashlib.sha256(repr((VERSION, ELEMENTS, CENTRES.tolist(), TARGETS)).encode()).hexdigest()[:12]
    return folder / f"qm9-{key}.npz"


def _all(cache: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    file = cached(cache)
    if not file.exists():
        x, y = zip(*tqdm(_molecules(), desc="reading molecules", unit=" molecules", disable=None), strict=True)
        cache.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npz")
        np.savez(part, x=np.stack(x), y=np.array(y))
        part.rename(file)
    with np.load(file) as found:
        return found["x"], found["y"]


def _molecules() -> Iterator[tuple[NDArray[np.float32], list[float]]]:
    csv.field_size_limit(1 << 20)
    for name in FILES:
        with (_folder() / name).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield read(row)


def read(row: dict[str, str]) -> tuple[NDArray[np.float32], list[float]]:
    """A molecule's features, and its targets in their units, from a row of the package's tables."""
    elements = "".join(c for c in row["Elements"] if c.isalpha())
    numbers = row["XYZ_Ang"].translate(str.maketrans("[]", "  ")).split(",")
    places = np.array([float(number) for number in numbers]).reshape(-1, 3)
    return features(elements, places), [float(row[t.column]) * t.factor for t in TARGETS.values()]


def _folder() -> Path:
    try:
        found = version("qm9pack")
    except PackageNotFoundError:
        raise SystemExit(f'The molecules are in a package of 100 MB: pip install "qm9pack=={VERSION}".') from None
    if found != VERSION:
        raise SystemExit(f"These molecules are of qm9pack {VERSION}. Found {found}: pip install qm9pack=={VERSION}")
    spec = find_spec("qm9pack")  # importing it would take more packages
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data"
