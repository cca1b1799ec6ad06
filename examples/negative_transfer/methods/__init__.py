"""Transfer learning methods by name, each with and without the gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..protocol import Problem
from ._adda import ADDA
from ._coral import DeepCORAL, coral
from ._dan import DAN, mmd
from ._dann import DANN
from ._deep import Deep, Gating, Training
from ._gta import GTA
from ._kmm import KMM
from ._pada import PADA
from ._tca import TCA

DEEP: dict[str, type[Deep]] = {"DAN": DAN, "DCORAL": DeepCORAL, "DANN": DANN, "ADDA": ADDA, "PADA": PADA, "GTA": GTA}
"""The six methods that the thesis gates, in the order of its Table 3.2."""

CLASSICAL: dict[str, Callable[[Problem, int], Any]] = {"TCA": TCA, "KMM": KMM}

GATINGS = {
    "": None,
    "gate": Gating(),
    "gate-only": Gating(weights="marginal", terms="none"),
    "label-only": Gating(weights="none"),
    "joint": Gating(terms="joint"),
    "marginal": Gating(terms="marginal"),
    "none": Gating(terms="none"),
}
"""Suffix of a method's name → how it is gated. Those below ``gate`` are the rows of the ablation, Table 3.4."""

DATA: dict[str, Callable[[Problem], Problem]] = {
    "": lambda problem: problem,
    "T": Problem.target_only,
    "S": Problem.source_only,
    "oracle": Problem.oracle,
}
"""What a method is given: all; the target alone; the source alone; all but perturbed source samples."""


def names() -> tuple[str, ...]:
    """All methods: ``plain`` (no transfer), the classical ones, the deep ones, and these gated."""
    gated = tuple(f"{name}-{gate}" for name in DEEP for gate in ("gate",))
    ablation = tuple(f"DANN-{gate}" for gate in GATINGS if gate not in ("", "gate"))
    return ("plain", *CLASSICAL, *DEEP, *gated, *ablation)


def make(name: str, problem: Problem, training: Training, seed: int) -> Any:
    """A method that can ``fit()`` and ``predict(x)``.

    Raises:
        ValueError: if there is no such method.
    """
    if name not in names():
        raise ValueError(f"There is no method {name!r}. Choose from {', '.join(names())}.")
    if name in CLASSICAL:
        return CLASSICAL[name](problem, seed)
    base, _, gate = name.partition("-")
    return {"plain": Deep, **DEEP}[base](problem, training, seed, GATINGS[gate])


__all__ = ["CLASSICAL", "DATA", "DEEP", "GATINGS", "Deep", "Training", "coral", "make", "mmd", "names"]
