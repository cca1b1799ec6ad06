"""Figures 3.3 to 3.5 of the thesis, drawn from kept results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray
from sklearn.manifold import TSNE

import gradsurgery as gs

from . import studies
from .data import CLASSES
from .report import Results, figure_setting, short
from .runs import EDGES, Run, train

SHOWN = 400
"""Samples of each domain in Figure 3.4."""


def figure33(results: Results, file: Path) -> dict[str, gs.GapCurve]:
    """Accuracy over perturbation rates and over labelled shares; returns the gaps of DANN and its gated form over rates."""
    study = results.study
    curves = studies.figure33(study)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = ("ε, at 20 % of labels", "labelled target samples, %, at ε = 0.2")
    for ax, points, title in zip(axes, curves, titles, strict=True):
        for name in studies.CURVES:
            x = sorted(place for curve, place in points if curve == name)
            found = [results.accuracy(points[name, place]) for place in x]
            (line,) = ax.plot(x, [one.mean for one in found], marker=".", label=name)
            if len(study.seeds) > 1:
                low, high = [one.low for one in found], [one.high for one in found]
                ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        ax.set(xlabel=title, ylabel="accuracy, %")
    axes[0].legend(fontsize="small")
    figure.suptitle(short(study.main[0]))
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return {
        method: gs.GapCurve(
            study.epsilons,
            tuple(results.gap(studies.cell(study, method, figure_setting(study, e))) for e in study.epsilons),
        )
        for method in ("DANN", "DANN-gate")
    }


def gaps(curves: Mapping[str, gs.GapCurve], title: str, file: Path) -> None:
    """The gaps of several methods over perturbation rates."""
    figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, curve in curves.items():
        curve.plot(ax, label=name)
    ax.set(xlabel="ε, the share of the source that is perturbed", ylabel="NTG, points of error", title=title)
    for y, side, said in ((0.97, "top", "the source does harm"), (0.03, "bottom", "the source helps")):
        ax.annotate(said, (0.01, y), xycoords="axes fraction", va=side, color="0.4", fontsize=9)
    ax.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=150)
    plt.close(figure)


class Embedded(NamedTuple):
    """Points ``[n, 2]``, which are of the source, digits, and weights of source samples (1 without a gate)."""

    points: NDArray[np.float32]
    is_source: NDArray[np.bool_]
    y: NDArray[np.int64]
    weights: NDArray[np.float32]


def embed(run: Run, out: Path, cache: Path) -> Embedded:
    """Trains, and embeds features by t-SNE; kept next to the runs."""
    file = run.file(out).with_suffix(".npz")
    if not file.exists():
        method, problem = train(run, cache)
        x, y = problem.x[:SHOWN], problem.y[:SHOWN]
        features = [method.source_features(x), method.features(problem.x_test[:SHOWN])]
        weights = method.gate_weights(features[0], y)
        stacked = np.concatenate([part.numpy() for part in features])
        points = TSNE(perplexity=min(30, len(stacked) / 4), random_state=0, init="pca").fit_transform(stacked)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npz")
        np.savez(
            part,
            points=points,
            is_source=np.arange(len(stacked)) < len(x),
            y=np.concatenate([y.numpy(), problem.y_test[:SHOWN].numpy()]),
            weights=np.ones(len(x), np.float32) if weights is None else weights.numpy(),
        )
        part.rename(file)
    with np.load(file) as found:
        return Embedded(**found)


def figure34(results: Results, file: Path, cache: Path) -> None:
    """Features of both domains by t-SNE: domains above, digits below; last, without source samples of small weight."""
    runs = studies.figure34(results.study)
    plain, gated = (embed(run, results.out, cache) for run in runs.values())
    heavy = np.concatenate([gated.weights > 0.4, np.ones((~gated.is_source).sum(), bool)])
    columns = [("DANN", plain, None), ("DANN, gated", gated, None), ("weights above .4", gated, heavy)]
    figure, axes = plt.subplots(2, 3, figsize=(9, 6), layout="constrained")
    for (top, bottom), (title, embedded, kept) in zip(axes.T, columns, strict=True):
        own = np.ones(len(embedded.y), bool) if kept is None else kept
        weights = np.concatenate([embedded.weights, np.zeros((~embedded.is_source).sum())])
        colours = np.where(~embedded.is_source, "tab:blue", np.where(weights > 0.4, "gold", "tab:red"))
        if title == "DANN":
            colours = np.where(embedded.is_source, "tab:red", "tab:blue")
        _scatter(top, embedded.points[own], colours[own])
        _scatter(bottom, embedded.points[own], plt.get_cmap("tab10")(embedded.y[own] % CLASSES))
        top.set_title(title)
    figure.suptitle(
        f"{short(results.study.main[0])}, ε = 0.7, 30 % of labels: target blue, source red, and yellow where it weighs "
        "more than .4; below: digits",
        fontsize="small",
    )
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _scatter(ax: Axes, points: NDArray[np.float32], colours: NDArray[np.generic]) -> None:
    ax.scatter(points[:, 0], points[:, 1], s=4, c=colours)
    ax.set(xticks=[], yticks=[])


def figure35(results: Results, file: Path) -> None:
    """Histograms of ``D`` on perturbed and clean source samples, and their mean weights over rates."""
    runs = studies.figure35(results.study)
    last = max(runs)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, colour in (("clean", "tab:green"), ("perturbed", "tab:red")):
        found = [results.of(run) for run in runs[last]]
        total = np.sum([one[f"{name} histogram"] for one in found if f"{name} histogram" in one], 0)
        left.stairs(total / max(total.sum(), 1), EDGES, label=f"{name}, ε = {last:g}", color=colour)
        means = [np.mean([results.of(run)[name] for run in own]) for own in runs.values()]
        right.plot(list(runs), means, marker="o", label=name, color=colour)
    left.set(xlabel="ω / (1 + ω)", ylabel="share of source samples")
    right.set(xlabel="ε", ylabel="mean weight ω", ylim=(0, None))
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    figure.suptitle(f"Gated DANN, {short(results.study.main[0])}, 30 % of labels")
    figure.savefig(file, dpi=150)
    plt.close(figure)
