"""Runs every rule on the field's two-dimensional problem, from five starts: one picture, and where each rule ends.

The five starts of a rule are five surgery groups of one optimizer, which a rule operates on independently of each other.
Rules that weigh losses do not know of groups: they get an optimizer for each start.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

try:
    from tqdm import tqdm

    from . import report
    from .run import Path2D, rules, run
except ImportError as error:
    raise SystemExit(f'This example needs more packages ({error}): pip install "gradsurgery[examples]".') from error


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the rules, and returns the folder with the picture and the table."""
    options = _parse(arguments)
    started = time.perf_counter()
    chosen = {name: rule for name, rule in rules().items() if not options.rules or name in options.rules}
    paths: dict[str, list[Path2D]] = {}
    refused: dict[str, str] = {}
    steps = 50 if options.quick else options.steps
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {
            pool.submit(run, rule, steps=steps, lr=options.lr, seed=options.seed): name for name, rule in chosen.items()
        }
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="rule", disable=None):
            try:
                paths[jobs[job]] = job.result()
            except ValueError as error:  # a rule that needs positive losses, which these are not everywhere
                refused[jobs[job]] = str(error)
    paths = {name: paths[name] for name in chosen if name in paths}
    options.out.mkdir(parents=True, exist_ok=True)
    if not paths:
        raise SystemExit("\n".join(f"{name} cannot be run here: {why}" for name, why in refused.items()))
    table = report.table(paths, steps)
    table += "".join(f"\n{name} cannot be run here: {why}\n" for name, why in refused.items())
    (options.out / "ends.md").write_text(table, encoding="utf-8")
    report.picture(paths, options.out / "paths.png")
    print(f"{table}\n{steps} steps of Adam with a learning rate of {options.lr:g}; seed {options.seed}; "
          f"{time.perf_counter() - started:.0f} seconds in all.")  # fmt: skip
    print(f"paths.png and ends.md are in {options.out.resolve()}")
    return options.out


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = argparse.ArgumentParser(
        prog="python -m examples.two_dimensional",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    known.add_argument("--rules", nargs="+", metavar="NAME", choices=list(rules()), help=f"of {', '.join(rules())}")
    known.add_argument("--steps", type=int, default=100_000, help="the papers' number; about 1.5 ms each and rule")
    known.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    known.add_argument("--seed", type=int, default=0, help="of random rules")
    known.add_argument("--jobs", type=int, default=2, help="how many rules at a time")
    known.add_argument("--out", type=Path, default=Path("out/two_dimensional"), help="folder for picture and table")
    known.add_argument("--quick", action="store_true", help="50 steps, to see that everything works")
    options = known.parse_args(arguments)
    for name in ("steps", "jobs"):
        if getattr(options, name) < 1:
            known.error(f"--{name} must be at least 1. Found {getattr(options, name)}.")
    if not options.lr > 0:
        known.error(f"--lr must be positive. Found {options.lr}.")
    return options


if __name__ == "__main__":
    main()
