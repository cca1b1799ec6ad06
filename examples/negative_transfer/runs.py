"""Runs: one training each, kept as a file that is named after everything that it depends on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .data import load
from .methods import DATA, Deep, Training
from .methods import make as make_method
from .protocol import Problem, Setting
from .protocol import make as make_problem

VERSION = 1
"""Of what a run does: a higher number makes all runs anew."""

EDGES = np.linspace(0, 1, 21)
"""Of the histograms of the gate's probabilities, ``w / (1 + w)``."""


@dataclass(frozen=True)
class Run:
    """A method, what it is given (see :data:`methods.DATA`), the data, hyperparameters and the seed.

    Args:
        method: its name.
        setting: the data that are drawn.
        given: ``""``, ``"T"``, ``"S"`` or ``"oracle"``.
        seed: of data, weights and batches.
        training: hyperparameters of deep methods.
    """

    method: str
    setting: Setting
    given: str = ""
    seed: int = 0
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if self.given not in DATA:
            raise ValueError(f"`given` must be one of {', '.join(map(repr, DATA))}. Found {self.given!r}.")
        # What the target alone learns does not depend on the source: one run serves all of them.
        if self.given == "T":
            setting = {**asdict(self.setting), "source": "", "eps_x": 0.0, "eps_y": 0.0, "sources": 1, "wrong": "next"}
            object.__setattr__(self, "setting", Setting(**setting))
        # Nor does what the source alone teaches depend on the target's labels.
        if self.given == "S":
            object.__setattr__(self, "setting", Setting(**{**asdict(self.setting), "labelled": 0.0, "at_most": None}))

    @property
    def key(self) -> str:
        """The name of its file."""
        text = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def file(self, out: Path) -> Path:
        """Where its result is kept."""
        return out / "runs" / f"{self.key}.json"

    def result(self, out: Path) -> dict[str, Any]:
        """What was kept."""
        found: dict[str, Any] = json.loads(self.file(out).read_text(encoding="utf-8"))["result"]
        return found


def train(run: Run, cache: Path) -> tuple[Any, Problem]:
    """The trained method and its data."""
    problem = DATA[run.given](make_problem(run.setting, run.seed, cache))
    return make_method(run.method, problem, run.training, run.seed).fit(), problem


def measure(method: Any, problem: Problem) -> dict[str, Any]:
    """Test accuracy in percent, and what the gate's weights are on all source samples, if there is one."""
    if not isinstance(method, Deep):
        predicted = torch.from_numpy(method.predict(problem.x_test.double().numpy()))
        return {"accuracy": accuracy(predicted, problem.y_test)}
    result: dict[str, Any] = {"accuracy": accuracy(method.predict(problem.x_test), problem.y_test)}
    if method.gate is not None and len(problem.x):
        weights = method.gate_weights(method.source_features(problem.x), problem.y)
        assert weights is not None
        probabilities = (weights / (1 + weights)).numpy()
        result["effective"] = float(weights.sum() ** 2 / weights.square().sum().clamp_min(1e-12) / len(weights))
        for name, own in (("clean", ~problem.perturbed), ("perturbed", problem.perturbed)):
            if own.any():
                result[name] = float(weights[own].mean())
                result[f"{name} histogram"] = np.histogram(probabilities[own.numpy()], EDGES)[0].tolist()
    return result


def accuracy(predicted: Tensor, y: Tensor) -> float:
    """In percent."""
    return float((predicted == y).double().mean() * 100)


def perform(run: Run, out: Path, cache: Path) -> None:
    """Makes a run, and keeps its result; a file is there whole or not at all."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lbfgs failed to converge")  # the regressions stop at 300 steps
        kept = {"run": asdict(run), "result": measure(*train(run, cache))}
    file = run.file(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(kept), encoding="utf-8")
    part.rename(file)


def missing(runs: Iterable[Run], out: Path) -> list[Run]:
    """Those of different runs whose result is not there."""
    return [run for run in dict.fromkeys(runs) if not run.file(out).exists()]


def perform_all(runs: Iterable[Run], out: Path, cache: Path, jobs: int) -> int:
    """Makes the runs that are missing, ``jobs`` at a time, and returns how many these were."""
    todo = missing(runs, out)
    for name in {name for run in todo for name in (run.setting.source, run.setting.target) if name}:
        load(name, cache)  # once, ahead of all processes
    bar = {"total": len(todo), "unit": "run", "desc": "training", "disable": None}
    if jobs == 1:
        for run in tqdm(todo, **bar):
            perform(run, out, cache)
        return len(todo)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        under_way = [pool.submit(perform, run, out, cache) for run in todo]
        try:
            for job in tqdm(as_completed(under_way), **bar):
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return len(todo)


def results(runs: Iterable[Run], out: Path) -> Mapping[Run, dict[str, Any]]:
    """All results."""
    return {run: run.result(out) for run in dict.fromkeys(runs)}
