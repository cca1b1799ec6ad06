"""Gradient Vaccine on multilingual translation: the thesis' Tables 6.2 to 6.6, and its study of loss geometry.

Runs are kept one by one, and continue from their checkpoints: stop at any time, and say the same again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

try:
    from . import cost, page, study
    from .corpus import prepare
    from .fetch import cache_folder
    from .jobs import PARTS, SCALES, Scale, results_of, run_all, sizes
    from .plan import GEOMETRY, plan
    from .summary import Summary
except ImportError as error:
    raise SystemExit(f'This example needs more packages ({error}): pip install "gradsurgery[multilingual]".') from error

COMMANDS = ("data", "cost", *PARTS, "tagging", "all", "report")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs what is asked for, and returns the folder with the results."""
    options = _parse(arguments)
    started = time.perf_counter()
    torch.set_num_threads(1)
    scale = _scale(options)
    cache = cache_folder(options.cache)
    check = not options.unchecked
    if options.command == "data":
        corpora = {"Tables 6.2 to 6.5": scale.four(), "All languages": scale.all()}
        if scale.source != "django":
            corpora["Verses"] = scale.all("verses")
        print(sizes({name: prepare(recipe, cache, check=check) for name, recipe in corpora.items()}))
        return cache
    if options.command == "cost":
        settings = {"repeats": options.repeats, "seed": options.seed, "threads": options.threads, "check": check}
        costs = cost.measure(scale, cache, **settings)
        costs.write(options.out)
        print(f"{costs.table}\n\nKept in {options.out.resolve()}, for the report.")
        return options.out
    whole = options.command in ("all", "report")
    parts = tuple(PARTS) if whole else tuple(part for part in PARTS if part == options.command)
    seeds = range(options.seed, options.seed + options.seeds)
    wanted = {part: PARTS[part](scale, seeds) for part in parts}
    every = [job for part in wanted.values() for job in part]
    settings = {"processes": options.jobs, "device": options.device, "check": check}
    tagged: list[Any] = []
    if options.command == "tagging" or (whole and options.source != "django"):  # which is for trying out without downloads
        from .tagging import train as tagging  # takes seconds: transformers is large

        tagged = tagging.jobs(tagging.of_size("quick" if options.quick else options.size, options.steps), seeds)
    if options.plan:
        if wanted:
            print(plan(wanted, options.out, cache, **settings))
        if tagged:
            print(tagging.plan(tagged, options.out, cache, **settings))
        return options.out
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command != "report":
        run_all(every, options.out, cache, **settings)
        study.look([job for part in GEOMETRY for job in wanted.get(part, ())], options.out, cache, **settings)
        if tagged:
            tagging.run_all(tagged, options.out, cache, **settings)
    made = Summary(scale, options.out, cache, check=check, device=options.device)
    sections = [getattr(made, part)(its) for part, its in wanted.items()]
    if tagged:
        sections.append(tagging.section(tagged, options.out))
    for part, section in zip([*parts, "tagging"], sections, strict=False):
        (options.out / f"{part}.md").write_text(section.markdown + "\n", encoding="utf-8")
        if options.command != "report":
            print(f"\n{section.markdown}")
    if whole:
        results = [*results_of(every, options.out).values(), *results_of(tagged, options.out).values()]
        if not results:
            raise SystemExit(f"Nothing has been run in {options.out.resolve()} with these settings: run a part first.")
        wanted_runs = len({*every, *tagged})
        page.write([made.cost(), *sections], _commands(options), results, wanted_runs, options.out / "report.html")
        print(f"{len(results)} of {wanted_runs} runs are in report.html.")
    print(f"\n{time.perf_counter() - started:.0f} seconds in all. Results are in {options.out.resolve()}")
    return options.out


def _commands(options: argparse.Namespace) -> list[str]:
    """That make the same page again."""
    chosen = ["--quick"] if options.quick else [f"--size {options.size}"]
    chosen += [f"--steps {options.steps}"] if options.steps else []
    chosen += [f"--source {options.source}"] if options.source != "help" else []
    chosen += [f"--seed {options.seed}", f"--seeds {options.seeds}", *(["--unchecked"] if options.unchecked else [])]
    start = "python -m examples.multilingual_translation"
    return [f"{start} {command} {' '.join(chosen)}" for command in ("cost", "all", "report")]


def _scale(options: argparse.Namespace) -> Scale:
    scale = SCALES["quick" if options.quick else options.size]
    if options.steps:
        scale = replace(
            scale,
            settings=replace(scale.settings, steps=options.steps),
            massive=replace(scale.massive, steps=options.steps, keep=max(1, options.steps // 10)),
        )
    return replace(scale, source=options.source)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = argparse.ArgumentParser(
        prog="python -m examples.multilingual_translation",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    known.add_argument("command", nargs="?", default="table", choices=COMMANDS, help="data: fetch texts and count them; "
                       "cost: time and memory of a step on all languages, against plain training; "
                       "table: 6.5; ablations: 6.2 to 6.4; longer: joint models for as many steps as all bilingual ones; "
                       "massive: 6.6; study, trilingual: models for 6.2; "
                       "tagging: 6.8; all of these; "
                       "report: one page of what there is")  # fmt: skip
    known.add_argument("--size", default="tiny", choices=[name for name in SCALES if name != "quick"], help="of everything")
    known.add_argument("--quick", action="store_true", help="some twenty steps, to see that everything works")
    known.add_argument("--plan", action="store_true", help="say how many runs there are, and how long they will take")
    known.add_argument("--steps", type=int, default=0, help="optimizer steps of each run; 0 for those of the size")
    known.add_argument("--seed", type=int, default=0, help="the first seed")
    known.add_argument("--seeds", type=int, default=1, help="how many; several give 95%% intervals")
    known.add_argument("--jobs", type=int, default=2, help="runs at a time, with one thread each")
    known.add_argument("--repeats", type=int, default=30, help="for cost: batches")
    known.add_argument("--threads", type=int, default=2, help="for cost: that PyTorch computes with")
    known.add_argument("--device", default="cpu", help="to train on, such as cuda")
    known.add_argument("--source", default="help", choices=["help", "django"], help="of texts; django needs no download")
    known.add_argument("--cache", type=Path, help="folder for texts; in the user's cache by default")
    known.add_argument("--out", type=Path, default=Path("out/multilingual_translation"), help="folder for runs and results")
    known.add_argument("--unchecked", action="store_true", help="use texts that differ from those this was made with")
    options = known.parse_args(arguments)
    for name in ("seeds", "jobs", "repeats", "threads"):
        if getattr(options, name) < 1:
            known.error(f"--{name} must be at least 1. Found {getattr(options, name)}.")
    if options.steps < 0:
        known.error(f"--steps must be at least 1, or 0. Found {options.steps}.")
    return options


if __name__ == "__main__":
    main()
