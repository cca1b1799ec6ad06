"""Negative transfer on real digits: the tables and figures of the thesis' chapter 3.

Which data hurt, which methods are hurt, and what the discriminator gate does about it. Runs are kept in a folder, one file
each, and serve every table that needs them: stopped anywhere, it goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

try:
    from . import figures, report, studies
    from .data import REAL, available
    from .runs import missing, perform_all
except ImportError as error:
    raise SystemExit(f'The example needs more packages ({error}): pip install "gradsurgery[negative-transfer]".') from error

SECONDS = 3.2
"""Of a run, about, on one core: what --plan reckons with."""

WHAT = {
    "table31": "DANN and its gated form over perturbation rates and labelled shares",
    "table32": "all methods on all pairs of domains, at eps = .7 and few labels",
    "table33": "covariate shift: images are perturbed, labels are right",
    "table34": "ablation: parts of gated DANN",
    "figure33": "accuracy over perturbation rates, and over labelled shares",
    "figure34": "features by t-SNE",
    "figure35": "weights of perturbed and of clean source samples",
    "checks": "all methods over all rates, for the list of claims",
}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Makes the runs that are missing, and returns the folder with tables and figures."""
    options = _parse(arguments)
    started = time.perf_counter()
    asked = studies.OUTPUTS if "all" in options.what else tuple(dict.fromkeys(options.what))
    study = studies.full(options.data, range(options.seed, options.seed + options.seeds))
    if options.quick:
        study = studies.quick(study)
    out = options.out / options.data / ("quick" if options.quick else "full")
    print(plan(study, asked, out, options.jobs), flush=True)
    if options.plan:
        return out
    made = perform_all([run for name in asked for run in studies.runs_of(name, study)], out, options.cache, options.jobs)
    text = write(report.Results(study, out), asked, out, options.cache)
    print(f"\n{text}\n{made} runs made now, {time.perf_counter() - started:.0f} seconds in all.")
    print(f"Tables, figures and claims.md are in {out.resolve()}")
    return out


def plan(study: studies.Study, asked: Sequence[str], out: Path, jobs: int) -> str:
    """How many runs each output needs, how many of these are not there, and about how long that takes."""
    rows, everything = [], []
    for name in asked:
        runs = list(dict.fromkeys(studies.runs_of(name, study)))
        rows.append([name, WHAT[name], str(len(runs)), str(len(missing(runs, out)))])
        everything += runs
    seconds = SECONDS * study.training.steps / 400
    left = missing(everything, out)
    rows.append(["all", "each run once", str(len(dict.fromkeys(everything))), str(len(left))])
    minutes = len(left) * seconds / jobs / 60
    return (
        report.table(["output", "what", "runs", "missing"], rows)
        + f"About {minutes:.0f} minutes on {jobs} core{'s' * (jobs != 1)}, at {seconds:.1f} seconds a run."
    )


def write(results: report.Results, asked: Sequence[str], out: Path, cache: Path) -> str:
    """Writes every output that was asked for; returns all text."""
    out.mkdir(parents=True, exist_ok=True)
    blocks = []
    for name in asked:
        if name.startswith("table"):
            text = getattr(report, name)(results)
            (out / f"{name}.md").write_text(text, encoding="utf-8")
            blocks.append(f"## {name}: {WHAT[name]}\n\n{text}")
    if "figure33" in asked:
        curve = figures.figure33(results, out / "figure33.png")
        curve.save(out / "figure33.json")
        blocks.append(f"## figure33: gaps of DANN, error in %\n\n```\n{curve}\n```\n")
    if "figure34" in asked:
        figures.figure34(results, out / "figure34.png", cache)
    if "figure35" in asked:
        figures.figure35(results, out / "figure35.png")
    claims = report.claims(results, asked)
    (out / "claims.md").write_text(claims, encoding="utf-8")
    return "\n".join([*blocks, f"## Claims\n\n{claims}"])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    described = "\n".join(f"  {name:9} {what}" for name, what in WHAT.items())
    known = argparse.ArgumentParser(
        prog="python -m examples.negative_transfer",
        description=__doc__,
        epilog=f"outputs:\n{described}\n  all       everything",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known.add_argument("what", nargs="+", choices=[*WHAT, "all"], metavar="OUTPUT", help="which, of those below")
    known.add_argument("--data", choices=["real", "small"], help="mnist, uci and pen (the default, if they are "
                       "installed), or two stand-ins that scikit-learn has")  # fmt: skip
    known.add_argument("--seeds", type=int, default=5, help="repeats; several give 95%% intervals (default: 5)")
    known.add_argument("--seed", type=int, default=0, help="the first (default: 0)")
    known.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (default: 2)")
    known.add_argument("--out", type=Path, default=Path("out/negative_transfer"), help="folder for runs, tables, figures")
    known.add_argument("--cache", type=Path, default=Path("out/negative_transfer"), help="folder for cropped images")
    known.add_argument("--quick", action="store_true", help="two repeats, short runs, fewer settings: does it work?")
    known.add_argument("--plan", action="store_true", help="only say how many runs there are, and how long they take")
    options = known.parse_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            known.error(f"--{name} must be at least 1. Found {getattr(options, name)}.")
    if options.data is None:
        options.data = "real" if len(available()) == len(REAL) or not options.quick else "small"
    return options


if __name__ == "__main__":
    main()
