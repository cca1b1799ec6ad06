"""Rules alone: from Gram matrices to the coefficients of the tasks, against TorchJD's weightings.

Both get the same Gram matrices, in the same dtype. TorchJD's weightings take one at a time, so that the groups are a loop;
each group has a weighting of its own, since that of GradVac has a state.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchjd import aggregation
from torchjd.aggregation import GradVacWeighting, PCGradWeighting

import gradsurgery as gs
from gradsurgery._bench.timing import Contender, interleaved

from .report import Figure, Options, faster

RULES: dict[str, tuple[gs.Rule, Callable[[], Any]]] = {
    "PCGrad": (gs.PCGrad(), PCGradWeighting),
    "GradVac": (gs.GradVac(beta=0.01), lambda: GradVacWeighting(beta=0.01)),
}

# Rules that solve a small problem. Of TorchJD's, some need the extras of torchjd[full]; Nash-MTL and ConFIG take gradients.
SOLVED: dict[str, tuple[gs.Rule, Callable[[int], Any]]] = {
    "UPGrad": (gs.UPGrad(), lambda tasks: aggregation.UPGradWeighting()),
    "DualProj": (gs.DualProj(), lambda tasks: aggregation.DualProjWeighting()),
    "MGDA": (gs.MGDA(), lambda tasks: aggregation.MGDAWeighting()),
    "CAGrad": (gs.CAGrad(c=0.4), lambda tasks: aggregation.CAGradWeighting(c=0.4)),
    "Nash-MTL": (gs.NashMTL(), lambda tasks: _of_rows(aggregation.NashMTL(tasks, 0.0, 1, 20))),
    "FairGrad": (gs.FairGrad(alpha=2.0), lambda tasks: aggregation.FairGradWeighting(alpha=2.0)),
    "Aligned-MTL": (gs.AlignedMTL(), lambda tasks: aggregation.AlignedMTLWeighting()),
    "IMTL-G": (gs.IMTLG(), lambda tasks: aggregation.IMTLGWeighting()),
    "ConFIG": (gs.ConFIG(), lambda tasks: _of_rows(aggregation.ConFIG())),
    "SDMGrad": (gs.SDMGrad(), lambda tasks: aggregation.SDMGradWeighting()),
    "MoDo": (gs.MoDo(), lambda tasks: aggregation.MoDoWeighting()),
    "Krum": (gs.Krum(), lambda tasks: aggregation.KrumWeighting(0)),
}


def many_groups(options: Options) -> list[Figure]:
    """Fifty groups of 32 tasks: a large multilingual model, per layer."""
    check(options.seed)
    groups, tasks = (3, 4) if options.quick else (50, 32)
    return _figures(groups, tasks, (torch.float32, torch.float64), max(3, options.repeats // 2), options.seed, target=300)


def one_group(options: Options) -> list[Figure]:
    """One group of 4 or 32 tasks: the whole model."""
    check(options.seed)
    few = _figures(1, 4, (torch.float32, torch.float64), options.repeats, options.seed, target=1.5)
    return few + _figures(
        1, 5 if options.quick else 32, (torch.float32, torch.float64), options.repeats, options.seed, target=20
    )


def solved_many_groups(options: Options) -> list[Figure]:
    """Rules that solve a small problem, for fifty groups of 32 tasks."""
    groups, tasks = (2, 6) if options.quick else (50, 32)
    return _solved(groups, tasks, max(3, options.repeats // 5), options.seed, target=25)


def solved_one_group(options: Options) -> list[Figure]:
    """Rules that solve a small problem, for one group of 4 tasks."""
    return _solved(1, 4, options.repeats, options.seed, target=0.83)


def _solved(groups: int, tasks: int, repeats: int, seed: int, target: float) -> list[Figure]:
    figures = []
    grams = _grams(groups, tasks, torch.float64, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what TorchJD's problems are told by their solver
        for name, (rule, weighting) in SOLVED.items():
            try:
                ours, reference = _steps(rule, [weighting(tasks) for _ in range(groups)], grams)
                reference()
            except ImportError as error:
                print(f"  {name} is left out: {error}")
                continue
            label = f"{name} alone, G={groups} K={tasks}, against TorchJD"
            times = interleaved({"ours": Contender(ours), "reference": Contender(reference)}, repeats, label)
            figures.append(faster(label, times["ours"], times["reference"], target))
    return figures


def _of_rows(aggregator: Any) -> Callable[[Tensor], Tensor]:
    """Something that takes gradients, given a Gram matrix instead: any rows that have it will do."""
    return lambda gram: aggregator(torch.linalg.cholesky(gram))


def picture(options: Options) -> list[Figure]:
    """Time per call over the number of tasks, as a picture: ``rules.png``.

    With one thread, which is all that a loop over small tensors can use; each point is the fastest of three samples.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    theirs = [2, 3] if options.quick else [2, 4, 8, 16, 32]
    ours = [1, *theirs] if options.quick else [1, *theirs, 64]
    colours = {1: "#4c9be8", 10: "#2a6fbb", 50: "#0b3c6f"}
    greys = {1: "#d9a48b", 10: "#c4653d", 50: "#8c3413"}
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold"})
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    torch.set_num_threads(1)
    for ax, name in zip(axes, RULES, strict=True):
        for groups in (1, 10, 50):
            # Beyond some thousand meetings TorchJD takes seconds; its time is proportional to G, which needs no proof.
            affordable = [tasks for tasks in theirs if groups * tasks**2 <= 13_000]
            samples = {tasks: _times(name, groups, tasks, torch.float64, 3, options.seed) for tasks in affordable}
            alone = {
                tasks: _times(name, groups, tasks, torch.float64, 3, options.seed, only_ours=True)
                for tasks in ours
                if tasks not in affordable
            }
            mine = {tasks: min(times["ours"]) * 1e3 for tasks, times in (samples | alone).items()}
            other = {tasks: min(times["reference"]) * 1e3 for tasks, times in samples.items()}
            ax.plot(*_xy(other), "s--", color=greys[groups], lw=1.6, ms=4)
            ax.plot(*_xy(mine), "o-", color=colours[groups], lw=2.2, ms=5)
            label = f"G = {groups}"
            ax.annotate(label, _last(other), (6, 0), textcoords="offset points", va="center", color=greys[groups])
            ax.annotate(label, _last(mine), (6, 0), textcoords="offset points", va="center", color=colours[groups])
        ax.set(xscale="log", yscale="log", xlabel="tasks K", title=name, xticks=ours, xlim=(0.9, ours[-1] * 2.2))
        ax.set_xticklabels([str(tasks) for tasks in ours])
        ax.minorticks_off()
        ax.grid(alpha=0.25, lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    torch.set_num_threads(options.threads)
    axes[0].set_ylabel("time of the rule per step (ms)")
    axes[0].plot([], [], "o-", color=colours[10], lw=2.2, ms=5, label="gradsurgery, G groups at once")
    axes[0].plot([], [], "s--", color=greys[10], lw=1.6, ms=4, label="TorchJD, group by group")
    axes[0].legend(frameon=False, loc="upper left")
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "rules.png", dpi=150)
    plt.close(figure)
    return []


def check(seed: int) -> None:
    """With two tasks there is only one order: the coefficients have to be TorchJD's.

    Up to its ``eps``, which it adds to norms, over several steps of the state.

    Raises:
        AssertionError: if they are not.
    """
    for name in RULES:
        ours, reference = _contestants(name, _grams(3, 2, torch.float64, seed, count=40))
        for step in range(40):
            expected = torch.stack(reference())
            if not torch.allclose(ours(), expected, rtol=1e-4, atol=1e-4):
                raise AssertionError(f"{name} and TorchJD's differ in step {step}: {ours()} and {expected}")


def _figures(
    groups: int, tasks: int, dtypes: tuple[torch.dtype, ...], repeats: int, seed: int, target: float
) -> list[Figure]:
    figures = []
    for name, dtype in itertools.product(RULES, dtypes):
        times = _times(name, groups, tasks, dtype, repeats, seed)
        label = f"{name} alone, G={groups} K={tasks}, {str(dtype).removeprefix('torch.')}, against TorchJD"
        figures.append(faster(label, times["ours"], times["reference"], target))
    return figures


def _times(
    name: str, groups: int, tasks: int, dtype: torch.dtype, repeats: int, seed: int, only_ours: bool = False
) -> dict[str, list[float]]:
    ours, reference = _contestants(name, _grams(groups, tasks, dtype, seed))
    contenders = {"ours": Contender(ours)}
    if not only_ours:
        contenders["reference"] = Contender(reference)
    return interleaved(contenders, repeats, f"{name} G={groups} K={tasks}")


def _contestants(name: str, grams: Tensor) -> tuple[Callable[[], Tensor], Callable[[], list[Tensor]]]:
    """Two functions that make the next step: both give the coefficients ``[G, K]`` of the tasks."""
    rule, weighting = RULES[name]
    return _steps(rule, [weighting() for _ in range(grams.shape[1])], grams)


def _steps(rule: gs.Rule, weightings: list[Any], grams: Tensor) -> tuple[Callable[[], Tensor], Callable[[], list[Tensor]]]:
    _, groups, tasks, _ = grams.shape
    state = rule.init([f"task{k}" for k in range(tasks)], [f"group{g}" for g in range(groups)], dtype=grams.dtype)
    generator = torch.Generator().manual_seed(0)
    our_grams, their_grams = itertools.cycle(grams.unbind()), itertools.cycle(grams.unbind())

    def ours() -> Tensor:
        nonlocal state
        mixing, state = rule.mix(next(our_grams), state, generator=generator)
        return mixing.sum(-2)

    def reference() -> list[Tensor]:
        return [one(gram) for one, gram in zip(weightings, next(their_grams), strict=True)]

    return ours, reference


def _grams(groups: int, tasks: int, dtype: torch.dtype, seed: int, count: int = 4) -> Tensor:
    """Gram matrices ``[count, G, K, K]`` of random gradients of various lengths; about half of the pairs conflict."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, groups, tasks, 4 * tasks, dtype=torch.float64, generator=generator)
    rows *= torch.rand(count, groups, tasks, 1, dtype=torch.float64, generator=generator) + 0.5
    return (rows @ rows.mT).to(dtype)


def _xy(values: dict[int, float]) -> tuple[list[int], list[float]]:
    tasks = sorted(values)
    return tasks, [values[k] for k in tasks]


def _last(values: dict[int, float]) -> tuple[int, float]:
    return max(values), values[max(values)]
