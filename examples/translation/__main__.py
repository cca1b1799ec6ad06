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
    from .options import check_positive, parser
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
        settings = settings.quick()
    corpus = Corpus.read(options.languages)
    counts = ", ".join(f"{name} {len(corpus.train[name])}+{len(corpus.valid[name])}" for name in corpus.languages)
    print(f"English into {len(corpus.languages)} languages; messages to train on and to validate: {counts}.", flush=True)
    if options.every > 1:
        print(f"Surgery in one step of {options.every}, reused in the others; Sum measures all.", flush=True)

    runs = []
    total = options.seeds * len(options.methods) * settings.steps
    with tqdm(total=total, unit="step", disable=None, dynamic_ncols=True) as bar:
        for seed in range(options.seed, options.seed + options.seeds):
            batches = list(corpus.batches(settings.steps, settings.batch, seed))
            for method in options.methods:
                bar.set_description(method)
                every = 1 if method == "Sum" else options.every  # there is nothing to reuse: Sum only measures
                for run in train(method, seed, corpus, batches, replace(settings, every=every)):
                    bar.set_postfix_str(f"loss {run.training[-1]:.2f}", refresh=False)
                    bar.update()
                runs.append(run)

    options.out.mkdir(parents=True, exist_ok=True)
    report.results(runs, options.out)
    drawn = report.pictures(runs, options.out)
    print(f"\n{report.tables(runs)}\n\n{time.perf_counter() - started:.0f} seconds in all.")
    print(f"Pictures ({', '.join(path.name for path in drawn)}) and results.json are in {options.out.resolve()}")
    return options.out


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = parser("examples.translation", __doc__, steps=Settings.steps, seeds=1, out="out/translation")
    known.add_argument("--languages", nargs="+", default=list(DEFAULT), metavar="NAME", help=f"of {', '.join(CODES)}")
    known.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="what to compare")
    known.add_argument("--every", type=int, default=1, metavar="N", help="surgery at each N-th step, reused in between")
    options = known.parse_args(arguments)
    if unknown := [name for name in options.languages if name not in CODES]:
        known.error(f"--languages: there is no {', '.join(unknown)}. Choose from {', '.join(CODES)}.")
    if len(set(options.methods)) < len(options.methods):
        known.error("--methods: each can be there once; --seeds repeats them.")
    if len(options.languages) < 2 or len(set(options.languages)) < len(options.languages):
        known.error("--languages: at least two different ones are needed.")
    check_positive(known, options, "steps", "seeds", "threads", "every")
    return options


if __name__ == "__main__":
    main()
