"""What is compared: the rows of the thesis' Tables 6.2 to 6.5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gradsurgery as gs

Groups = str | dict[str, list[str]]

ENC_DEC: dict[str, list[str]] = {"encoder": ["encoder*", "embedding*"], "decoder": ["decoder*"]}
"""The two halves. The one embedding of both sides goes with the encoder."""


@dataclass(frozen=True)
class Method:
    """One way to train on several tasks.

    Attributes:
        name: as in the tables.
        rule: makes the rule, given the names of the scarce and of the other tasks.
        groups: the surgery groups.
        loss: what a task's loss is. ``"share"``: its part of the mean over all tokens of the batch, so that the tasks'
            losses add up to that of plain joint training. ``"mean"``: the mean over its own tokens, for rules whose weights
            add up to one. ``"mean / tasks"``: that, over the number of tasks, for rules whose weights are one on average.
        measures: whether each task's gradient is computed.
    """

    name: str
    rule: Callable[[Sequence[str], Sequence[str]], gs.Rule]
    groups: Groups = "model"
    loss: str = "share"
    measures: bool = True


def _gradvac(which: str = "low", **settings: float) -> Callable[[Sequence[str], Sequence[str]], gs.Rule]:
    def rule(low: Sequence[str], high: Sequence[str]) -> gs.Rule:
        chosen = {"low": low, "high": high, "all": None}[which]
        return gs.GradVac(**settings, tasks=chosen or None)  # without a task of that kind, all

    return rule


def _always(kind: type[gs.Rule]) -> Callable[[Sequence[str], Sequence[str]], gs.Rule]:
    return lambda low, high: kind()


BILINGUAL = "Bilingual"
JOINT = "Multilingual"
BEST = "GradVac, all_layer"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(BILINGUAL, _always(gs.Sum), measures=False),
        Method(JOINT, _always(gs.Sum), "layer"),
        Method("GradNorm", _always(gs.GradNorm), loss="mean / tasks"),
        Method("MGDA", _always(gs.MGDA), loss="mean"),
        Method("PCGrad", _always(gs.PCGrad)),
        Method("PCGrad, all_layer", _always(gs.PCGrad), "layer"),
        Method("GradVac, fixed_obj", _gradvac(target=0.5), "layer"),
        Method("GradVac, whole_model", _gradvac()),
        Method(BEST, _gradvac(), "layer"),
        Method("GradVac, HRL_only", _gradvac("high"), "layer"),
        Method("GradVac, all_task", _gradvac("all"), "layer"),
        Method("GradVac, enc_dec", _gradvac(), ENC_DEC),
        Method("GradVac, all_matrix", _gradvac(), "tensor"),
        Method("GradVac, β=1e-1", _gradvac(beta=1e-1), "layer"),
        Method("GradVac, β=1e-3", _gradvac(beta=1e-3), "layer"),
    )
}
"""Name → method. GradVac operates on the scarce tasks only (LRL_only), with β=1e-2, where its name says nothing else."""

TABLE_65 = tuple(METHODS)[:9]
LONGER = (JOINT, "PCGrad, all_layer", "GradVac, fixed_obj", BEST)
"""That are also trained longer."""
ABLATIONS = {
    "6.2: which tasks are operated on": ("GradVac, HRL_only", BEST, "GradVac, all_task"),
    "6.3: granularity": ("GradVac, whole_model", "GradVac, enc_dec", BEST, "GradVac, all_matrix"),
    "6.4: decay β": ("GradVac, β=1e-1", BEST, "GradVac, β=1e-3"),
}
"""Title of the table → its rows; the row of the best settings is in all of them."""
