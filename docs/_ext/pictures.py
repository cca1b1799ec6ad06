"""A picture of what each rule does: to two gradients in the plane, or to the weights of losses over some steps.

``python docs/_ext/pictures.py FOLDER`` writes all of them; the site's build does so by itself. Everything is computed by
the rules themselves; the gradients and the losses that they get are made up, and the pictures say so.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon

import gradsurgery as gs
from gradsurgery import _catalogue

COLOURS = ("#2f7ed8", "#e8762d", "#9b59b6", "#8c8c2e", "#d6478f")  # of tasks, readable on white and on black
RESULT = "#17a673"
INK = "#0a0b0c"  # stands for the page's own text colour
STYLE = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

PAIRS = {  # [K, D]
    "agreeing": [[1.3, 0.15], [0.45, 1.0]],
    "unequal, at right angles": [[1.5, 0.0], [0.0, 0.6]],
    "in conflict": [[1.3, 0.35], [-0.95, 0.55]],
}
CROWDS = {
    "one is far away": [[1.1, 0.3], [0.9, 0.55], [1.15, 0.7], [0.75, 0.35], [-0.9, 0.9]],
    "all differ": [[1.2, 0.0], [0.7, 0.9], [-0.2, 1.1], [0.9, 0.4], [-0.8, 0.3]],
}


@dataclass(frozen=True)
class Plane:
    """Gradients in the plane, what a rule makes of each, and the combined gradient.

    Attributes:
        rule: makes the rule.
        steps: a stateful rule sees the same gradients so many times.
        said: what is particular to this picture, for its caption.
        scenes: title → gradients ``[K, 2]``.
        names: of the tasks, other than 1, 2, ….
    """

    rule: Callable[[], gs.Rule]
    steps: int = 1
    said: str = ""
    scenes: dict[str, list[list[float]]] | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curves:
    """Weights of losses over steps.

    Attributes:
        rule: makes the rule.
        steps: how many.
        said: what is particular to this picture, for its caption.
    """

    rule: Callable[[], gs.Rule]
    steps: int = 60
    said: str = ""


@dataclass(frozen=True)
class Smoothing:
    """How the weights of a rule inside another one become smoother."""

    rule: Callable[[], gs.Rule]
    steps: int = 60
    said: str = ""


@dataclass(frozen=True)
class Nothing:
    """No picture, because of what is ``said``."""

    said: str


Picture = Plane | Curves | Smoothing | Nothing

# Rules that are best shown with other settings than their defaults. The others need no entry: those that see gradients are
# shown in the plane, those that see nothing but losses with the weights that they give them.
SHOWN: dict[str, Picture] = {
    "AGEM": Plane(lambda: gs.AGEM(anchors=("1",)), said="Task 2 is the anchor.", names=("", "anchor")),
    "GEM": Plane(lambda: gs.GEM(anchors=("1",)), said="Task 2 is the anchor.", names=("", "anchor")),
    "CosineGate": Plane(lambda: gs.CosineGate(main=("0",)), said="Task 1 is the main one.", names=("main", "")),
    "Chain": Plane(
        lambda: gs.Chain(gs.EqualNorm(), gs.PCGrad()),
        said="Here `Chain(EqualNorm(), PCGrad())`: first equally long, then apart.",
    ),
    "GradVac": Plane(
        lambda: gs.GradVac(target=0.5),
        said="Here with a fixed target, `GradVac(target=0.5)`. With moving averages, which start at zero, its first step "
        "is that of `PCGrad`.",
    ),
    "MoDo": Plane(gs.MoDo, steps=20, said="After 20 steps that saw the same gradients."),
    "SDMGrad": Plane(gs.SDMGrad, steps=20, said="After 20 steps that saw the same gradients."),
    "Krum": Plane(lambda: gs.Krum(byzantine=1, selected=2), scenes=CROWDS, said="Here `Krum(byzantine=1, selected=2)`."),
    "TrimmedMean": Plane(gs.TrimmedMean, scenes=CROWDS),
    "Adversary": Plane(lambda: gs.Adversary("1"), said="Task 2 is the adversary.", names=("", "adversary")),
    "TaskGate": Nothing("What it weighs by comes from a discriminator, not from gradients or losses."),
    "Transference": Nothing("It observes, and leaves gradients as they are."),
    "DWA": Curves(lambda: gs.DWA(epoch=5), said="Here `DWA(epoch=5)`."),
    "FAMO": Curves(lambda: gs.FAMO(lr=0.1), said="Here `FAMO(lr=0.1)`, so that something is seen in 60 steps."),
    "UncertaintyWeighting": Curves(
        lambda: gs.UncertaintyWeighting(lr=0.05),
        said="Here `UncertaintyWeighting(lr=0.05)`, so that something is seen in 60 steps.",
    ),
    "IMTLL": Curves(lambda: gs.IMTLL(lr=0.05), said="Here `IMTLL(lr=0.05)`, so that something is seen in 60 steps."),
    "GradNorm": Curves(
        lambda: gs.GradNorm(alpha=0.5, lr=0.01),
        steps=45,
        said="Here `GradNorm(alpha=0.5, lr=0.01)`; the gradients' norms are made up too: 1, 2 and ½.",
    ),
    "STCH": Curves(lambda: gs.STCH(mu=0.3), said="Here `STCH(mu=0.3)`."),
    "CRMOGM": Smoothing(lambda: gs.CRMOGM(gs.MGDA(), alpha=0.9), said="Here around `MGDA()`."),
}


def shown(name: str) -> Picture:
    """How a rule is shown.

    Raises:
        ValueError: if nobody said so, and its default settings do not do.
    """
    if name in SHOWN:
        return SHOWN[name]
    rule = getattr(gs, name)
    sees = {entry.name: entry.sees for entry in _catalogue.entries()}[name]
    if sees == "losses, gradients":
        raise ValueError(f"{name} sees losses and gradients: say in SHOWN in docs/_ext/pictures.py which it is shown with.")
    try:
        rule()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}() needs settings: add it to SHOWN in docs/_ext/pictures.py. ({error})") from error
    return Curves(rule) if sees == "losses" else Plane(rule)


# --- What the rules compute -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Gradients ``[K, 2]``, what each became (None if that means nothing), and their combination ``[2]``."""

    gradients: np.ndarray
    mixed: np.ndarray | None
    combined: np.ndarray


def scene(picture: Plane, gradients: list[list[float]]) -> Scene:
    """What the rule makes of the gradients."""
    jacobian = torch.tensor(gradients, dtype=torch.float64)
    rule = picture.rule()
    if isinstance(rule, gs.CoordinateRule):  # has no state, and mixes no rows
        return Scene(jacobian.numpy(), None, gs.operate(jacobian, rule).numpy())
    state, generator = rule.init([str(k) for k in range(len(jacobian))], ["all"]), torch.Generator().manual_seed(0)
    gram, mixed = (jacobian @ jacobian.mT)[None], None
    for _ in range(picture.steps):
        if _mixes(rule):
            mixing, _ = rule.mix(gram, state, generator=torch.Generator().manual_seed(0))
            mixed = (mixing[0] @ jacobian).numpy()
        combined, state = gs.operate(jacobian, rule, state=state, generator=generator)
    return Scene(jacobian.numpy(), mixed, combined.numpy())


def _mixes(rule: gs.Rule) -> bool:
    parts = getattr(rule, "rules", (rule,))
    return any(isinstance(part, gs.Rule) and type(part).mix is not gs.Rule.mix for part in parts)


def made_up_losses(steps: int) -> torch.Tensor:
    """``[steps, 3]``: one falls slowly, one fast, one hardly; with a little noise."""
    time = torch.linspace(0, 1, steps, dtype=torch.float64)
    losses = torch.stack([2.0 * torch.exp(-0.7 * time), 1.2 * torch.exp(-3.5 * time), 0.5 * torch.exp(-0.1 * time)], dim=1)
    noise = torch.randn(losses.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return losses * (1 + 0.03 * noise)


def curves(picture: Curves) -> tuple[np.ndarray, np.ndarray]:
    """Made-up losses and the rule's weights of them, both ``[steps, K]``."""
    losses, rule = made_up_losses(picture.steps), picture.rule()
    tasks, generator = ("1", "2", "3"), torch.Generator().manual_seed(0)
    state, norms, found = rule.init(tasks, ["all"]), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), []
    for now in losses:
        weights, state = rule.weigh(now, state, generator=generator)
        seen = torch.diag((weights * norms).square())[None]
        active, mixing = torch.ones(1, 3, dtype=torch.bool), torch.eye(3, dtype=torch.float64)[None]
        state = rule.observe(gs.Step(tasks, ("all",), active, seen, mixing, now, weights), state)
        found.append(weights)
    return losses.numpy(), torch.stack(found).numpy()


def smoothing(picture: Smoothing) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the rule inside, and of the rule around it, both ``[steps, 2]``, on noisy made-up gradients."""
    rule = picture.rule()
    state, generator, inner, outer = rule.init(["1", "2"], ["all"]), torch.Generator().manual_seed(0), [], []
    for _ in range(picture.steps):
        jacobian = torch.tensor(PAIRS["in conflict"], dtype=torch.float64)
        jacobian = jacobian + 0.5 * torch.randn(2, 2, generator=generator, dtype=torch.float64)
        gram = (jacobian @ jacobian.mT)[None]
        inner.append(rule.rule.mix(gram, state["rule"])[0][0].sum(0))  # type: ignore[attr-defined]
        mixing, state = rule.mix(gram, state)
        outer.append(mixing[0].sum(0))
    return torch.stack(inner).numpy(), torch.stack(outer).numpy()


# --- Drawing ----------------------------------------------------------------------------------------------------------


def draw(picture: Picture) -> Figure:
    """The picture."""
    if isinstance(picture, Plane):
        scenes = picture.scenes or PAIRS
        return _planes({title: scene(picture, gradients) for title, gradients in scenes.items()}, picture.names)
    if isinstance(picture, Curves):
        return _curves(picture)
    if isinstance(picture, Smoothing):
        return _smoothing(picture)
    raise TypeError(f"There is nothing to draw: {picture.said}")


def _planes(scenes: dict[str, Scene], names: tuple[str, ...], size: float = 8.0) -> Figure:
    # Equal limits on all panels, from everything in them.
    ends = np.concatenate([np.vstack([s.gradients, s.combined, *_sum(s), *_rows(s)]) for s in scenes.values()])
    low, high = np.minimum(ends.min(0), -0.05), np.maximum(ends.max(0), 0.05)
    # Room for labels, of 26 points on each side, 10 below and 20 above, whatever the scale.
    unit = (high - low)[0] / (72 * size / len(scenes) - 52)
    low, high = low - unit * np.array([26, 10]), high + unit * np.array([26, 20])
    width, height = high - low
    figure = Figure((size, size / len(scenes) * height / width + 0.25))
    axes = figure.subplots(1, len(scenes), squeeze=False)[0]
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1 - 0.25 / figure.get_figheight(), wspace=0.02)
    for ax, (title, shown_scene) in zip(axes, scenes.items(), strict=True):
        ax.set_title(title, fontsize=9.5)
        _frame(ax, low, high)
        _plane(ax, shown_scene, names)
    return figure


def thumbnail(picture: Plane) -> Figure:
    """One panel without words, on the same scale for all rules."""
    scenes = picture.scenes or PAIRS
    found = scene(picture, scenes[list(scenes)[-1]])
    figure = Figure((2.4, 1.5))
    ax = figure.add_axes((0, 0, 1, 1))
    _frame(ax, np.array([-1.9, -0.2]), np.array([2.1, 2.3]))
    _plane(ax, found, (), words=False)
    return figure


def _frame(ax: Axes, low: np.ndarray, high: np.ndarray) -> None:
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.axis("off")


def _rows(found: Scene) -> list[np.ndarray]:
    return [] if found.mixed is None else list(found.mixed)


def _sum(found: Scene) -> list[np.ndarray]:
    return [found.gradients.sum(0)] if len(found.gradients) < 3 else []


def _plane(ax: Axes, found: Scene, names: tuple[str, ...], *, words: bool = True) -> None:
    few = len(found.gradients) < 3
    labels: list[tuple[np.ndarray, str, str]] = []
    if few:
        _cone(ax, found.gradients)
        total = found.gradients.sum(0)
        if np.abs(total - found.combined).max() > 1e-3:
            _arrow(ax, total, INK, width=0.9, style=":", alpha=0.6)
            labels.append((total, "sum", INK))
    ax.plot(0, 0, ".", color=INK, markersize=4, zorder=6)
    for k, gradient in enumerate(found.gradients):
        colour = COLOURS[k % len(COLOURS)]
        mixed = gradient if found.mixed is None else found.mixed[k]
        changed = bool(np.abs(mixed - gradient).max() > 1e-3)
        _arrow(ax, gradient, colour, width=4.0 if few else 3.0, alpha=0.35 if changed else 0.8)
        role = names[k] if k < len(names) else ""
        labels.append((gradient, f"g{'₁₂₃₄₅'[k]}" + f" ({role})" * bool(role), colour))
        if changed and np.linalg.norm(mixed) > 0.02:
            _arrow(ax, mixed, colour, width=1.8)
            turned = mixed @ gradient < 0.99 * np.linalg.norm(mixed) * np.linalg.norm(gradient)
            if few and turned:  # where it is only longer or shorter, its colour says enough
                labels.append((mixed, f"g′{'₁₂₃₄₅'[k]}", colour))
        elif changed:
            ax.plot(*mixed, "x", color=colour, markersize=7, zorder=7)
    if np.linalg.norm(found.combined) > 0.02:
        _arrow(ax, found.combined, RESULT, width=2.6)
        labels.append((found.combined, "result", RESULT))
    else:
        ax.plot(0, 0, "o", color=RESULT, markersize=7, zorder=7)
    if not words:
        return
    arrows = [*found.gradients, *_rows(found), found.combined]
    _labels(ax, labels[::-1], np.vstack([np.linspace(0.15, 1, 8)[:, None] * arrow for arrow in arrows]))


def _labels(ax: Axes, labels: Sequence[tuple[np.ndarray, str, str]], busy: np.ndarray) -> None:
    """Puts each label beside its arrow's head, where it covers the least of other labels and of the ``busy`` points."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    points = figure.get_figwidth() * 72 * ax.get_position().width / (ax.get_xlim()[1] - ax.get_xlim()[0])  # per unit
    boxes: list[tuple[np.ndarray, np.ndarray]] = []
    for end, text, colour in labels:
        half = np.array([2.6 * len(text.replace("′", "")) + 1, 5.5])
        outward = np.arctan2(end[1], end[0])
        best = None
        for turn in (0, 0.6, -0.6, 1.1, -1.1, 1.6, -1.6, 2.2, -2.2):
            towards = np.array([np.cos(outward + turn), np.sin(outward + turn)])
            centre = end * points + towards * (4 + np.abs(towards) @ half)
            inside = (np.abs(busy * points - centre) < half).all(1).sum()
            overlap = sum(bool((np.abs(centre - other) < half + extent).all()) for other, extent in boxes)
            cost = 10 * overlap + inside + 0.2 * abs(turn)
            if best is None or cost < best[0]:
                best = (cost, centre)
        assert best is not None
        boxes.append((best[1], half))
        ax.text(
            *(best[1] / points), text, color=colour, ha="center", va="center", zorder=8,
            weight="bold" if text == "result" else "normal", alpha=0.7 if text == "sum" else 1.0,
        )  # fmt: skip


def _cone(ax: Axes, gradients: np.ndarray) -> None:
    """Shades the directions that conflict with no gradient."""
    angles = np.linspace(0, 2 * np.pi, 721)
    rays = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    fine = (rays @ gradients.T > -1e-9).all(1)
    if not fine.any() or fine.all():
        return
    start = int(np.flatnonzero(fine & ~np.roll(fine, 1))[0])
    inside = rays[np.arange(start, start + int(fine.sum())) % len(rays)]
    ax.add_patch(Polygon(np.vstack([[0, 0], 9 * inside]), closed=True, color=INK, alpha=0.07, linewidth=0, zorder=0))


def _arrow(ax: Axes, end: np.ndarray, colour: str, *, width: float, alpha: float = 1.0, style: str = "-") -> None:
    head = 5 + 2.2 * width
    ax.add_patch(
        FancyArrowPatch(
            (0, 0), tuple(end), arrowstyle="-|>", mutation_scale=head, shrinkA=0, shrinkB=0, color=colour, alpha=alpha,
            linewidth=width, linestyle=style, joinstyle="miter", capstyle="butt", zorder=3 + (width < 3),
        )
    )  # fmt: skip


def _curves(picture: Curves) -> Figure:
    losses, weights = curves(picture)
    figure = Figure((8.0, 2.6))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.18, top=0.88, wspace=0.2)
    for k, name in enumerate(("slow", "fast", "small")):
        left.plot(losses[:, k], color=COLOURS[k], linewidth=1.8, label=name)
        right.plot(weights[:, k], color=COLOURS[k], linewidth=1.8)
    left.set(title="made-up losses", yscale="log", xlabel="step")
    left.legend(frameon=False, fontsize=8.5, loc="lower left")
    right.set(title="their weights", xlabel="step")
    wide = weights.min() > 0 and weights.max() / weights.min() > 20
    right.set(yscale="log") if wide else right.set_ylim(bottom=0)
    for ax in (left, right):
        _plain(ax)
    return figure


def _smoothing(picture: Smoothing) -> Figure:
    inner, outer = smoothing(picture)
    figure = Figure((8.0, 2.4))
    ax = figure.subplots()
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.2, top=0.88)
    for k in range(2):
        ax.plot(inner[:, k], color=COLOURS[k], linewidth=1.0, alpha=0.45)
        ax.plot(outer[:, k], color=COLOURS[k], linewidth=2.2, label=f"task {k + 1}")
    ax.set(
        title="weights of the rule inside (thin) and smoothed (thick), on made-up gradients", xlabel="step", ylim=(0, None)
    )
    ax.legend(frameon=False, fontsize=8.5)
    _plain(ax)
    return figure


def _plain(ax: Axes) -> None:
    ax.title.set_fontsize(9.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.minorticks_off()
    ax.tick_params(labelsize=8.5)
    ax.patch.set_visible(False)


# --- Writing ----------------------------------------------------------------------------------------------------------


def svg(figure: Figure, salt: str, label: str) -> str:
    """The picture as an element of a page, in the page's own text colour; ``salt`` keeps its ids from others'."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Ids of groups: nothing refers to them, and a page may hold several pictures.
    text = re.sub(r' id="[a-z][a-z0-9.]*_\d+"', "", text)
    return text.replace("<svg", f'<svg class="picture" role="img" aria-label="{label}"', 1)


def one(name: str, *, small: bool = False) -> str | None:
    """The picture of a rule as SVG, or None; small: one panel of it."""
    picture = shown(name)
    if isinstance(picture, Nothing):
        return None
    with matplotlib.rc_context(STYLE):
        figure = thumbnail(picture) if small and isinstance(picture, Plane) else draw(picture)
        return svg(figure, name + ("small" if small else ""), f"What {name} does")


def side_by_side(rules: dict[str, gs.Rule], title: str = "in conflict") -> str:
    """What several rules do to the same gradients."""
    with matplotlib.rc_context(STYLE):
        figure = _planes(
            {name: scene(Plane(lambda rule=rule: rule), PAIRS[title]) for name, rule in rules.items()}, (), 6.8
        )
        return svg(figure, "-".join(rules), "What some rules do to the same two gradients: " + ", ".join(rules))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for rule_name in gs.rules.__all__:
        if (text := one(rule_name)) is not None:
            (folder / f"{rule_name}.svg").write_text(text, encoding="utf-8")
