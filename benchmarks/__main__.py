"""Runs the benchmarks: ``python -m benchmarks``, or ``make bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .compiled import compiled
from .features import features
from .growth import growth
from .memory import memory, memory_split
from .report import Figure, Options, table, write
from .rules import many_groups, one_group, picture, solved_many_groups, solved_one_group
from .scale import scale
from .split import split
from .step import step
from .surgery import surgery
from .wire import wire

FIGURES: dict[str, Callable[[Options], list[Figure]]] = {
    "rules-many": many_groups,
    "rules-one": one_group,
    "solved-many": solved_many_groups,
    "solved-one": solved_one_group,
    "step": step,
    "features": features,
    "surgery": surgery,
    "memory": memory,
    "split": split,
    "memory-split": memory_split,
    "picture": picture,
    "growth": growth,
    "wire": wire,
    "compiled": compiled,
    "scale": scale,
}


def main(arguments: Sequence[str] | None = None) -> list[Figure]:
    """Runs what the command line asks for, prints the figures and writes them.

    Returns:
        The figures.
    """
    options, names = parse(arguments)
    torch.set_num_threads(options.threads)
    figures: list[Figure] = []
    for name in names:
        print(f"{name}: {_summary(name)}", flush=True)
        found = FIGURES[name](options)
        for figure in found:
            print("  " + _line(figure), flush=True)
        figures += found
    print(f"\n{table(figures)}")
    write(figures, options)
    print(f"\nWritten to {options.out}.")
    return figures


def parse(arguments: Sequence[str] | None = None) -> tuple[Options, list[str]]:
    """The command line: options, and names of what to run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Micro-benchmarks of surgery overhead, as ratios of what is measured in turns in one run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Options()
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to run; see --list (default: everything)")
    parser.add_argument("--list", action="store_true", help="list what there is, and stop")
    parser.add_argument("--repeats", type=int, default=default.repeats, help="samples of each contender")
    parser.add_argument("--threads", type=int, default=default.threads, help="that PyTorch computes with")
    parser.add_argument("--seed", type=int, default=default.seed, help="of all random numbers")
    parser.add_argument("--out", type=Path, default=default.out, help="folder for figures.md, figures.json and pictures")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: sees that all works; the figures mean nothing")
    chosen = parser.parse_args(arguments)
    if chosen.list:
        print("".join(f"{name:<14}{_summary(name)}\n" for name in FIGURES), end="")
        parser.exit()
    if unknown := [name for name in chosen.names if name not in FIGURES]:
        parser.error(f"there is no {', '.join(unknown)}: choose from {', '.join(FIGURES)}")
    for name in ("repeats", "threads"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(chosen, name)}")
    options = Options(
        repeats=min(chosen.repeats, 2) if chosen.quick else chosen.repeats,
        seed=chosen.seed,
        quick=chosen.quick,
        threads=chosen.threads,
        out=chosen.out,
    )
    return options, chosen.names or list(FIGURES)


def _summary(name: str) -> str:
    return (FIGURES[name].__doc__ or "").splitlines()[0]


def _line(figure: Figure) -> str:
    name, ours, reference, ratio, target, met = figure.cells()
    goal = f"   target {target}: {'met' if figure.met else 'NOT met'}" if met else ""
    return f"{name}:  {ours} / {reference}   {ratio}{goal}"


if __name__ == "__main__":
    main()
