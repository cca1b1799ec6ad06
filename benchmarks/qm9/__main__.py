"""Trains a small model on eleven properties of real molecules (QM9), with many rules, and on each property alone.

Runs are kept in a folder, and what is there is not run again: stopped anywhere, it goes on. The model is a stand-in for the
graph network of the published experiments: what is found holds for it alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from . import report
from .data import TARGETS, load
from .methods import METHODS
from .runs import file_of, is_there, relative_times, run, sizes
from .train import Settings


def main(arguments: Sequence[str] | None = None) -> Path:
    """Makes the runs that are missing, and returns the folder with tables and picture."""
    options = _parse(arguments)
    settings = Settings().quick() if options.quick else Settings()
    started = time.perf_counter()
    load(options.cache, **sizes(settings))  # once, ahead of all runs
    seeds = range(options.seed, options.seed + (1 if options.quick else options.seeds))
    out = options.out / ("quick" if options.quick else "full")
    jobs = [(name, seed) for seed in seeds for name in (*options.methods, *TARGETS)]
    missing = [job for job in jobs if not is_there(out, *job, settings)]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        under_way = [pool.submit(run, name, seed, settings, options.cache, out) for name, seed in missing]
        for job in tqdm(as_completed(under_way), total=len(under_way), unit="run", desc="training", disable=None):
            job.result()
    found = {job: json.loads(file_of(out, *job).read_text(encoding="utf-8"))["test"] for job in jobs}
    errors = {name: [found[name, seed] for seed in seeds] for name in options.methods}
    single = [[found[name, seed][0] for name in TARGETS] for seed in seeds]
    times = relative_times(options.methods, settings, options.cache, 5 if options.quick else 40)
    text = report.tables(errors, single, times)
    (out / "results.md").write_text(text, encoding="utf-8")
    report.picture(errors, single, out / "delta.png")
    seconds = time.perf_counter() - started
    print(
        f"{text}\n{settings.steps} steps, {len(seeds)} seeds; {len(missing)} runs made now, {seconds:.0f} seconds in all."
    )
    print(f"results.md and delta.png are in {out.resolve()}")
    return out


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = argparse.ArgumentParser(
        prog="python -m benchmarks.qm9", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    known.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME",
                       help=f"of {', '.join(METHODS)}")  # fmt: skip
    known.add_argument("--seeds", type=int, default=3, help="how many; several give 95%% intervals")
    known.add_argument("--seed", type=int, default=0, help="the first: initial weights, batches, random rules")
    known.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    known.add_argument("--out", type=Path, default=Path("out/qm9"), help="folder for runs, tables and picture")
    known.add_argument("--cache", type=Path, default=Path("out/qm9"), help="folder for the molecules' features")
    known.add_argument("--quick", action="store_true", help="one seed and a tenth of the steps: some three minutes")
    options = known.parse_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            known.error(f"--{name} must be at least 1. Found {getattr(options, name)}.")
    return options


if __name__ == "__main__":
    main()
