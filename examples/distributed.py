"""Trains the translation model of ``examples.translation`` on several processes.

``torchrun --nproc-per-node 2 examples/distributed.py``

Every process draws the same batches, and works on its own share of each. So the result is the same, to rounding, for any
number of processes, which is easy to try: ``--nproc-per-node 1`` prints the same losses.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # torchrun starts a file, not a module

import gradsurgery as gs
from examples.translation.data import DEFAULT, PAD, Corpus
from examples.translation.model import Translator
from examples.translation.train import METHODS, Settings, per_character


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Trains as the command line says, on all processes that torchrun started.

    Returns:
        Language → validation loss per character, in nats.
    """
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo")
    try:
        losses = train(options)
        if dist.get_rank() == 0:
            report(losses, options)
    finally:
        dist.destroy_process_group()
    return losses


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 examples/distributed.py",
        description="Trains a small translation model on six languages, on several processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Settings()
    parser.add_argument("--rule", choices=METHODS, default="GradVac", help="what happens to the gradients")
    parser.add_argument("--steps", type=int, default=default.steps, help="optimizer steps")
    parser.add_argument(
        "--batch", type=int, default=default.batch, help="pairs of each language in a step, of all processes"
    )
    parser.add_argument("--seed", type=int, default=0, help="initial weights, batches, random orders")
    parser.add_argument("--threads", type=int, default=1, help="of each process, that PyTorch computes with")
    parser.add_argument("--save", type=Path, help="folder of a checkpoint to write after the last step")
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint to continue from, of any number of processes")
    parser.add_argument("--quick", action="store_true", help="three tiny steps, to see that everything works")
    options = parser.parse_args(arguments)
    options.width = default.width
    if options.quick:
        options.steps, options.batch, options.width = min(options.steps, 3), 2, 16
    for name in ("steps", "batch", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1. Found {getattr(options, name)}.")
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2 examples/distributed.py")
    return options


def train(options: argparse.Namespace) -> dict[str, float]:
    """Trains, and returns each language's validation loss."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    corpus = Corpus.read(DEFAULT)
    torch.manual_seed(options.seed)
    model = DistributedDataParallel(Translator(len(corpus.ids), width=options.width, layers=2, dropout=0.0))
    optimizer = gs.SurgeryOptimizer(
        torch.optim.AdamW(model.parameters(), lr=Settings().rate),
        METHODS[options.rule](),
        model=model,
        groups="layer",
        tasks=corpus.languages,
        seed=options.seed,
    )
    training = {"training": gs.TrainingState(model, optimizer)}
    start = 0
    if options.resume is not None:
        dcp.load(training, checkpoint_id=options.resume)
        start = int((options.resume / "steps.txt").read_text())
    batches = list(corpus.batches(start + options.steps, options.batch, options.seed))[start:]
    for batch in tqdm(batches, desc=f"{options.rule} on {ranks} processes", disable=None if rank == 0 else True):
        for language, (source, target) in batch.items():
            source, target = source[rank::ranks], target[rank::ranks]
            if len(source):  # with more processes than pairs, some have none
                loss = per_character(model, source, target)
                optimizer.backward({language: loss}, samples={language: int((target[:, 1:] != PAD).sum())})
        optimizer.combine()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if options.save is not None:
        dcp.save(training, checkpoint_id=options.save)
        if rank == 0:
            (options.save / "steps.txt").write_text(str(start + options.steps))
    return evaluate(model.module, corpus)


@torch.no_grad()
def evaluate(model: Translator, corpus: Corpus) -> dict[str, float]:
    """Language → validation loss per character, in nats."""
    model.eval()
    return {lang: per_character(model, *corpus.encode(lang, pairs)).item() for lang, pairs in corpus.valid.items()}


def report(losses: dict[str, float], options: argparse.Namespace) -> None:
    """Prints a table."""
    print(f"validation loss per character after {options.steps} steps, in nats")
    for language, loss in losses.items():
        print(f"  {language:<12}{loss:.4f}")
    print(f"  {'average':<12}{sum(losses.values()) / len(losses):.4f}")
    if options.save is not None:
        print(f"Checkpoint: {options.save}")


if __name__ == "__main__":
    main()
