"""Measures what surgery at each n-th step only saves and costs: the demo's model, trained with GradVac for several n.

All languages go through the model in one batch; steps between reuse the last mixing. Beside them: "Sum", plain training
(no surgery after its first step), and "1, apart", surgery at each step with a pass for each language, as in the demo. All
see the same batches, start from the same weights, and take turns step by step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

try:
    from matplotlib import pyplot as plt
    from tqdm import tqdm

    from .data import DEFAULT, Corpus
    from .options import check_positive, parser
    from .report import blocks, half_width, interval
    from .train import Run, Settings, train
except ImportError as error:
    raise SystemExit(f'This needs more packages ({error}): pip install "gradsurgery[examples]".') from error

NUMBERS = (1, 2, 4, 8)
BASE = "1"

Values = Mapping[str, Sequence[float]]
"""Row of the table → values."""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Trains and prints a table, and returns the folder with it and a picture."""
    options = _parse(arguments)
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    settings = Settings(steps=options.steps, decoded=0, mixed=True)
    if options.quick:
        settings = settings.quick()
    contenders = {str(n): ("GradVac", replace(settings, every=n)) for n in NUMBERS}
    contenders["Sum"] = ("Sum", replace(settings, every=settings.steps))  # its mixing is always the same
    contenders["1, apart"] = ("GradVac", replace(settings, mixed=False))
    corpus = Corpus.read(DEFAULT)

    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    with tqdm(total=options.seeds * settings.steps, unit="step of each", disable=None, dynamic_ncols=True) as bar:
        for seed in range(options.seed, options.seed + options.seeds):
            batches = list(corpus.batches(settings.steps, settings.batch, seed))
            turns = [train(method, seed, corpus, batches, its) for method, its in contenders.values()]
            for trained in zip(*turns, strict=True):  # strict also ends all of them, so that all are evaluated
                bar.set_postfix_str(f"loss {trained[0].training[-1]:.2f}", refresh=False)
                bar.update()
            for found, run in zip(runs.values(), trained, strict=True):
                found.append(run)

    options.out.mkdir(parents=True, exist_ok=True)
    times = {name: relative_times(found, runs[BASE]) for name, found in runs.items()}
    losses = {name: [run.average for run in found] for name, found in runs.items()}
    content = {name: {"relative step times": times[name], "validation losses": losses[name]} for name in runs}
    (options.out / "every.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draw(times, losses, options.out / "every.png")
    print(table(times, losses))
    print(f"\nStep time: of blocks of {max(NUMBERS)} steps, relative to the same blocks with every=1; median (quartiles).")
    print(f"Validation loss: nats per character, mean over the languages, after {settings.steps} steps.")
    print("±: 95 % interval over the seeds." if options.seeds > 1 else "One seed says nothing about differences in loss.")
    print('Sum: plain training. "1, apart": a pass for each language, as in the demo. In loss, it differs from 1 by chance')
    print("alone: by its dropout masks.")
    print(f"{time.perf_counter() - started:.0f} seconds in all. every.png and every.json are in {options.out.resolve()}")
    return options.out


def relative_times(runs: Sequence[Run], base: Sequence[Run]) -> list[float]:
    """The time of each block of steps over that of the same block, of the same seed, in ``base``."""
    size = max(NUMBERS)  # each block has all n in it
    return [
        block / of_base
        for run, its_base in zip(runs, base, strict=True)
        for block, of_base in zip(blocks(run.milliseconds, size), blocks(its_base.milliseconds, size), strict=True)
    ]


def table(times: Values, losses: Values) -> str:
    """In Markdown."""
    lines = ["| every | step time | validation loss | difference to every=1 |", "|---|--:|--:|--:|"]
    for name in times:
        low, median, high = quartiles(times[name])
        change = "" if name == BASE else interval(differences(losses[name], losses[BASE]))
        lines.append(f"| {name} | {median:.2f} ({low:.2f}–{high:.2f}) | {interval(losses[name])} | {change} |")
    return "\n".join(lines)


def draw(times: Values, losses: Values, path: Path) -> None:
    """Time and loss in two panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for x, name in enumerate(times):
        color = "C0" if name.isdecimal() else "0.45"
        low, median, high = quartiles(times[name])
        left.errorbar(x, median, [[median - low], [high - median]], fmt="o", capsize=4, color=color)
        change = differences(losses[name], losses[BASE])
        half = half_width(change) if len(change) > 1 else 0
        right.plot([x] * len(change), change, "_", markersize=10, color=color, alpha=0.6)
        right.errorbar(x, statistics.fmean(change), half or None, fmt="o", capsize=4, color=color)
    left.set(title="step time", ylabel="relative to every=1", ylim=(0, None))
    right.set(title="validation loss", ylabel="difference to every=1 (nats)")
    right.axhline(0, linewidth=0.8, color="0.7", zorder=0)
    for ax in (left, right):
        ax.set_xticks(range(len(times)), [name.replace(", ", "\n") for name in times])
        ax.set_xlabel("every")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return low, median, high


def differences(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Seed by seed."""
    return [a - b for a, b in zip(values, base, strict=True)]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = parser("examples.translation.every", __doc__, steps=150, seeds=2, out="out/every")
    options = known.parse_args(arguments)
    check_positive(known, options, "steps", "seeds", "threads")
    return options


if __name__ == "__main__":
    main()
