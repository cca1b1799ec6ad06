"""What the commands of this example share: options, and what they must be."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser(prog: str, description: str | None, *, steps: int, seeds: int, out: str) -> argparse.ArgumentParser:
    """A parser with the common options and these defaults."""
    found = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument("--steps", type=int, default=steps, help="optimizer steps of each method")
    found.add_argument("--seed", type=int, default=0, help="the first seed: initial weights, batches, random orders")
    found.add_argument("--seeds", type=int, default=seeds, help="how many seeds; several give 95%% intervals")
    found.add_argument("--threads", type=int, default=1, help="that PyTorch computes with; more are no quicker here")
    found.add_argument("--out", type=Path, default=Path(out), help="folder for pictures and results")
    found.add_argument("--quick", action="store_true", help="three tiny steps, to see that everything works")
    return found


def check_positive(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """Ends the program, saying why, if one of these options is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1. Found {getattr(options, name)}.")
