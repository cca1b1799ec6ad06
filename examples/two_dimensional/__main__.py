"""Runs every rule on the field's two-dimensional problem, from five starts: one picture, and where each rule ends.

The five starts of a rule are five surgery groups of one run, which a rule operates on independently of each other. Rules
that weigh losses do not know of groups: they operate on each start by itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

try:
    from tqdm import tqdm

    import gradsurgery as gs

    from . import report
    from .run import Path2D, Result, attempt, rules
except ImportError as error:
    raise SystemExit(f'This example needs more packages ({error}): pip install "gradsurgery[examples]".') from error


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the rules, and returns the folder with the picture and the table."""
    options = _parse(arguments)
    file = options.out / "paths.json"
    if not options.redraw:
        options.out.mkdir(parents=True, exist_ok=True)
        _run(options, file)
    found = json.loads(file.read_text(encoding="utf-8"))
    paths = {name: [Path2D(**path) for path in own] for name, own in found["paths"].items()}
    refused = [f"{name} cannot be run here: {why}\n" for name, why in found["refused"].items()]
    if not paths:
        raise SystemExit("".join(refused))
    table = "\n".join([report.table(paths), *refused])
    (options.out / "ends.md").write_text(table, encoding="utf-8")
    report.picture(paths, options.out / "paths.png")
    print(f"{table}\n{found['said']}")
    print(f"paths.png, ends.md and paths.json are in {options.out.resolve()}")
    return options.out


def _run(options: argparse.Namespace, file: Path) -> None:
    """Writes all paths to the file, rule by rule as they come."""
    started, busy = time.perf_counter(), 0.0
    chosen = {name: rule for name, rule in rules().items() if not options.rules or name in options.rules}
    paths: dict[str, list[Path2D]] = {}
    refused: dict[str, str] = {}
    settings = {
        "steps": 50 if options.quick else options.steps,
        "lr": options.lr,
        "scale": options.scale,
        "seed": options.seed,
    }
    for name, result in tqdm(_results(chosen, settings, options.jobs), total=len(chosen), unit="rule", disable=None):
        busy += result.seconds
        if result.refused is None:
            paths[name] = result.paths
        else:
            refused[name] = result.refused
        minutes = (time.perf_counter() - started) / 60
        said = (
            f"At most {settings['steps']} steps of Adam, learning rate {options.lr:g}; first loss times "
            f"{options.scale:g}; seed {options.seed}. {busy / 60:.1f} minutes of a core, {minutes:.1f} in all."
        )
        stored = {name: [asdict(path) for path in paths[name]] for name in chosen if name in paths}
        text = json.dumps({"settings": settings, "paths": stored, "refused": refused, "said": said})
        file.write_text(text, encoding="utf-8")


def _results(chosen: dict[str, gs.Rule], settings: dict[str, Any], jobs: int) -> Iterator[tuple[str, Result]]:
    if jobs == 1:
        yield from ((name, attempt(rule, **settings)) for name, rule in chosen.items())
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        names = {pool.submit(attempt, rule, **settings): name for name, rule in chosen.items()}
        yield from ((names[job], job.result()) for job in as_completed(names))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = argparse.ArgumentParser(
        prog="python -m examples.two_dimensional",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    known.add_argument("--rules", nargs="+", metavar="NAME", choices=list(rules()), help=f"of {', '.join(rules())}")
    known.add_argument("--steps", type=int, default=100_000, help="CAGrad's number; fewer where all paths of a rule rest")
    known.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    known.add_argument(
        "--scale", type=float, default=1.0, help="of the first loss; 1 in CAGrad's figure, 0.1 in Nash-MTL's"
    )
    known.add_argument("--seed", type=int, default=0, help="of random rules")
    known.add_argument("--jobs", type=int, default=2, help="how many rules at a time")
    known.add_argument("--out", type=Path, default=Path("out/two_dimensional"), help="folder for picture and table")
    known.add_argument("--quick", action="store_true", help="50 steps, to see that everything works")
    known.add_argument("--redraw", action="store_true", help="picture and table again, from the last run's paths.json")
    options = known.parse_args(arguments)
    for name in ("steps", "jobs"):
        if getattr(options, name) < 1:
            known.error(f"--{name} must be at least 1. Found {getattr(options, name)}.")
    for name in ("lr", "scale"):
        if not 0 < getattr(options, name) < float("inf"):
            known.error(f"--{name} must be positive. Found {getattr(options, name)}.")
    if options.redraw and not (options.out / "paths.json").is_file():
        known.error(
            f"--redraw needs the paths.json of an earlier run. There is none in {options.out}; run without it first."
        )
    return options


if __name__ == "__main__":
    main()
