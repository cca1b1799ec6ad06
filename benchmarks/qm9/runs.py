"""Runs that are kept as files, and the time that a step takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gradsurgery._bench.timing import Contender, interleaved, ratios

from .data import TARGETS, load
from .methods import METHODS
from .train import Settings, Training, train


def run(name: str, seed: int, settings: Settings, cache: Path, out: Path) -> None:
    """One run, of a method or of a target alone, kept as a file."""
    torch.set_num_threads(1)
    data = load(cache, **sizes(settings))
    what = list(TARGETS).index(name) if name in TARGETS else METHODS[name]()
    found: dict[str, Any] = {"name": name, "seed": seed, "settings": asdict(settings), **train(data, what, settings, seed)}
    file = file_of(out, name, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.rename(file)


def relative_times(methods: Sequence[str], settings: Settings, cache: Path, repeats: int) -> dict[str, float]:
    """The time of a step relative to equal weighting, medians of steps taken in turns."""
    torch.set_num_threads(1)
    data = load(cache, **sizes(settings))
    contenders = {
        name: Contender(Training(data, METHODS[name](), settings, 0).step) for name in {"LS": 0, **dict.fromkeys(methods)}
    }
    times = interleaved(contenders, repeats, "time of a step")
    return {name: ratios(times[name], times["LS"])[0] for name in methods}


def is_there(out: Path, name: str, seed: int, settings: Settings) -> bool:
    """Whether a run with these settings is kept."""
    file = file_of(out, name, seed)
    return file.exists() and json.loads(file.read_text(encoding="utf-8"))["settings"] == asdict(settings)


def sizes(settings: Settings) -> dict[str, int]:
    """Of the sets of molecules."""
    return {"train": settings.train, "valid": settings.valid, "test": settings.test}


def file_of(out: Path, name: str, seed: int) -> Path:
    """Where a run is kept."""
    return out / "runs" / f"{name}-{seed}.json"
