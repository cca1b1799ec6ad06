"""``python -m gradsurgery rules`` lists all rules; ``python -m gradsurgery bench`` measures them on a model."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __version__, _catalogue
from ._bench import bench
from ._bench.model import CONTRACT, workload

_SIZES = {"tasks": 8, "width": 128, "layers": 4, "sequences": 32, "tokens": 32}
_QUICK = {"tasks": 2, "width": 16, "layers": 2, "sequences": 4, "tokens": 4}


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the command line asks for.

    Returns:
        The exit status.
    """
    chosen = _parser().parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gradsurgery", description="Rules, and what they cost.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    listing = commands.add_parser(
        "rules",
        help="all rules: what each sees, claims and costs, and its paper",
        description="Prints all rules: what each sees, whether it has a state, what it claims, how long it takes by "
        "itself, and its paper. gradsurgery.testing.check_rule checks the claims.",
    )
    listing.add_argument("--no-time", action="store_true", help="leave out how long the rules take")
    listing.add_argument("--markdown", action="store_true", help="a Markdown table of what depends on no machine")
    listing.add_argument("--write", type=Path, metavar="PAGE", help="update that table in a page, such as README.md")
    listing.set_defaults(run=_rules)

    measuring = commands.add_parser(
        "bench",
        help="step time and peak memory of rules, sources and groups on a model",
        description="Measures steps to p.grad (forward, backward, surgery) against a plain step, in turns, for all "
        "combinations of rules, sources and groups. Writes bench.md and bench.png.",
        epilog=CONTRACT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    measuring.add_argument("--model", metavar="MODULE:FACTORY", help="your model, see below (default: a Transformer)")
    measuring.add_argument("--rules", default="Sum,PCGrad,GradVac,MGDA", help="names, separated by commas; A+B is a chain")
    measuring.add_argument("--sources", help=f"of {', '.join(bench.SOURCES)} (default: autograd, and split if it can)")
    measuring.add_argument("--groups", default="model,layer", help="of model, layer, module, tensor (default: %(default)s)")
    measuring.add_argument("--repeats", type=int, default=7, help="samples of each (default: %(default)s)")
    measuring.add_argument("--threads", type=int, default=torch.get_num_threads(), help="that PyTorch computes with")
    measuring.add_argument("--seed", type=int, default=0, help="of all random numbers")
    measuring.add_argument("--no-memory", action="store_true", help="leave out peak memory, which takes a process for each")
    measuring.add_argument("--out", type=Path, default=Path("out/bench"), help="folder (default: %(default)s)")
    measuring.add_argument("--quick", action="store_true", help="tiny sizes: sees that all works; the figures mean nothing")
    sizes = measuring.add_argument_group("sizes of the built-in model")
    for name, size in _SIZES.items():
        sizes.add_argument(f"--{name}", type=int, default=None, help=f"default: {size}")
    measuring.set_defaults(run=_bench)
    return parser


def _rules(chosen: argparse.Namespace) -> int:
    if chosen.write is not None:
        print(f"{chosen.write}: {'updated' if _catalogue.update(chosen.write) else 'was up to date'}")
    elif chosen.markdown:
        print(_catalogue.markdown(_catalogue.entries()))
    else:
        print(_catalogue.plain(_catalogue.entries(timed=not chosen.no_time)))
    return 0


def _bench(chosen: argparse.Namespace) -> int:
    for name in ("repeats", "threads", *_SIZES):
        if (value := getattr(chosen, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1. Found {value}.")
    if chosen.model is not None and (given := [name for name in _SIZES if getattr(chosen, name) is not None]):
        raise ValueError(f"--{given[0]} is a size of the built-in model, and --model names another.")
    usual = _QUICK if chosen.quick else _SIZES
    settings = bench.Settings(
        model=chosen.model,
        sizes={name: getattr(chosen, name) or size for name, size in usual.items()},
        repeats=min(chosen.repeats, 2) if chosen.quick else chosen.repeats,
        seed=chosen.seed,
        threads=chosen.threads,
        memory=not chosen.no_memory,
    )
    work = workload(settings.model, settings.sizes, settings.seed)
    sources = chosen.sources or ("autograd" if work.samples is None else "autograd,split")
    names = [_listed(text) for text in (chosen.rules, sources, chosen.groups)]
    for rule in names[0]:
        bench.rule_named(rule)
    for what, found, known in (
        ("source", names[1], bench.SOURCES),
        ("kind of groups", names[2], ("model", "layer", "module", "tensor")),
    ):
        if unknown := [name for name in found if name not in known]:
            raise ValueError(f"There is no {what} {unknown[0]!r}. Choose from {', '.join(known)}.")
    print(f"{work.size:,} parameters, {len(work.tasks)} tasks, {settings.threads} threads", flush=True)
    rows = bench.bench([bench.Way(*way) for way in itertools.product(*names)], settings)
    text = bench.table(rows)
    print(text)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "bench.md").write_text(text + "\n", encoding="utf-8")
    try:
        bench.picture(rows, chosen.out / "bench.png")
    except ImportError as error:
        print(error)
    print(f"Written to {chosen.out}.")
    return 0


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
