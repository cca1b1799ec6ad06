"""Trains a small model that translates English into several languages, with and without surgery.

The texts are the message catalogues of Django. All methods see the same batches and start from the same weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

try:
    from tqdm import tqdm

    from . import report
    from .data import CODES, DEFAULT, Corpus
    from .train import METHODS, Settings, train
except ImportError as error:
    raise SystemExit(f'The demo needs more packages ({error}): pip install "gradsurgery[examples]".') from error


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the demo, and returns the folder with its pictures."""
    options = _parse(arguments)
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    settings = Settings(steps=options.steps)
    if options.quick:
        settings = replace(settings, steps=3, batch=2, width=16, decoded=2)
    corpus = Corpus.read(options.languages)
    counts = ", ".join(f"{name} {len(corpus.train[name])}+{len(corpus.valid[name])}" for name in corpus.languages)
    print(f"English into {len(corpus.languages)} languages; messages to train on and to validate: {counts}.", flush=True)

    runs = []
    total = options.seeds * len(options.methods) * settings.steps
    with tqdm(total=total, unit="step", disable=None, dynamic_ncols=True) as bar:
        for seed in range(options.seed, options.seed + options.seeds):
            batches = list(corpus.batches(settings.steps, settings.batch, seed))
            for method in options.methods:
                bar.set_description(method)

                def progress(loss: float) -> None:
                    bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
                    bar.update()

                runs.append(train(method, seed, corpus, batches, settings, progress))

    options.out.mkdir(parents=True, exist_ok=True)
    report.results(runs, options.out)
    drawn = report.pictures(runs, options.out)
    print(f"\n{report.tables(runs)}\n\n{time.perf_counter() - started:.0f} seconds in all.")
    print(f"Pictures ({', '.join(path.name for path in drawn)}) and results.json are in {options.out.resolve()}")
    return options.out


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.translation",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--languages", nargs="+", default=list(DEFAULT), metavar="NAME", help=f"of {', '.join(CODES)}")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="what to compare")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="optimizer steps of each method")
    parser.add_argument("--seed", type=int, default=0, help="the first seed: initial weights, batches, random orders")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds; several give 95%% intervals")
    parser.add_argument("--threads", type=int, default=1, help="that PyTorch computes with; more are no quicker here")
    parser.add_argument("--out", type=Path, default=Path("out/translation"), help="folder for pictures and results")
    parser.add_argument("--quick", action="store_true", help="three tiny steps, to see that everything works")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.languages if name not in CODES]:
        parser.error(f"--languages: there is no {', '.join(unknown)}. Choose from {', '.join(CODES)}.")
    if len(set(options.methods)) < len(options.methods):
        parser.error("--methods: each can be there once; --seeds repeats them.")
    if len(options.languages) < 2 or len(set(options.languages)) < len(options.languages):
        parser.error("--languages: at least two different ones are needed.")
    for name in ("steps", "seeds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1. Found {getattr(options, name)}.")
    return options


if __name__ == "__main__":
    main()
