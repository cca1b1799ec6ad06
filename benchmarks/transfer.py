"""Does transference, which costs nothing, predict the negative transfer gap, which costs a second training?

Fourteen sources, made of real digits (the UCI set that comes with scikit-learn) by perturbing images, labels or both, from
helpful to harmful, each share a network with a target of few labelled digits. For each source, a training on both measures
the exact gap at its end, by a shadow that is trained on the target alone, and its transference on the way; one more has all
sources at a time. Printed is how well the ranks agree: Spearman's correlation of what transference promised with what the
source brought (the gap with its sign turned), and its interval. Then, how much longer a step takes with the gate, and with
transference. Runs are kept in a file, and what is there is not run again: stopped anywhere, it goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import gradsurgery as gs
from gradsurgery._bench.timing import Contender, interleaved

from .report import Figure, overhead, table

Data: TypeAlias = tuple[Tensor, Tensor]
"""Images ``[n, 64]`` and labels ``[n]``."""

TARGET = "target"
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.2),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
}
PREDICTORS = ("lookahead ratio", "inner product", "cosine")


@dataclass(frozen=True)
class Settings:
    """Of all runs.

    Attributes:
        steps: of a training.
        labelled: target samples with labels.
        batch: samples per task and step.
        hidden: width of the network's two hidden layers.
    """

    steps: int = 300
    labelled: int = 80
    batch: int = 32
    hidden: int = 64


# --- Sources ----------------------------------------------------------------------------------------------------------


def _relabelled(share: float, how: Callable[[Tensor, torch.Generator], Tensor]) -> Callable[[Data, torch.Generator], Data]:
    def change(data: Data, generator: torch.Generator) -> Data:
        x, y = data
        chosen = torch.rand(len(y), generator=generator) < share
        return x, torch.where(chosen, how(y, generator), y)

    return change


def _redrawn(how: Callable[[Tensor, torch.Generator], Tensor]) -> Callable[[Data, torch.Generator], Data]:
    return lambda data, generator: (how(data[0].view(-1, 8, 8), generator).reshape(-1, 64), data[1])


def _random(y: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(10, y.shape, generator=generator)


def _next(y: Tensor, generator: torch.Generator) -> Tensor:
    return (y + 1) % 10


def _noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + torch.randn(x.shape, generator=generator)


def _some_classes(data: Data, generator: torch.Generator) -> Data:
    few = data[1] < 3
    return data[0][few], data[1][few]


SOURCES: dict[str, Callable[[Data, torch.Generator], Data]] = {
    "clean": lambda data, generator: data,
    "noisy images": _redrawn(_noisy),
    "inverted images": _redrawn(lambda x, generator: -x),
    "shifted images": _redrawn(lambda x, generator: x.roll(2, -1)),
    "transposed images": _redrawn(lambda x, generator: x.mT),
    "upside-down images": _redrawn(lambda x, generator: x.flip(-2)),
    "shuffled pixels": lambda data, generator: (data[0][:, torch.randperm(64, generator=generator)], data[1]),
    "three classes": _some_classes,
    "labels 30% random": _relabelled(0.3, _random),
    "labels 60% random": _relabelled(0.6, _random),
    "labels random": _relabelled(1.0, _random),
    "labels 30% next": _relabelled(0.3, _next),
    "labels 60% next": _relabelled(0.6, _next),
    "labels next": _relabelled(1.0, _next),
}
"""From a clean source to the perturbed one."""


def data(seed: int, labelled: int) -> tuple[dict[str, Data], Data]:
    """The training data of each task, and the target's test data."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x, y = torch.from_numpy(images / 8 - 1).float()[order], torch.from_numpy(labels).long()[order]
    clean = x[:600], y[:600]
    tasks = {TARGET: (x[600 : 600 + labelled], y[600 : 600 + labelled])}
    for number, (name, change) in enumerate(SOURCES.items()):
        tasks[name] = change(clean, torch.Generator().manual_seed(1000 * seed + number))
    return tasks, (x[900:], y[900:])


# --- Runs -------------------------------------------------------------------------------------------------------------


def run(sources: Sequence[str], optimizer: str, seed: int, settings: Settings) -> dict[str, Any]:
    """A training on the target and these sources, beside one on the target alone.

    Returns:
        The gaps at the end, in error rate and in loss, and for each source what the predictors say it does for the target.
    """
    torch.set_num_threads(1)
    train, test = data(seed, settings.labelled)
    tasks = [TARGET, *sources]
    torch.manual_seed(seed)
    width = settings.hidden
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    rules = {"lookahead ratio": gs.Transference(), "inner product": gs.Transference(relative=False)}
    opt = gs.SurgeryOptimizer(
        OPTIMIZERS[optimizer](model.parameters()), gs.Chain(*rules.values()), model=model, tasks=tasks
    )
    shadow = gs.Shadow(opt, target=TARGET)
    draw = {task: torch.Generator().manual_seed(seed) for task in tasks}
    cosines = torch.zeros(len(tasks))
    for _ in range(settings.steps):
        losses = {}
        for task in tasks:
            x, y = train[task]
            chosen = torch.randint(len(y), (settings.batch,), generator=draw[task])
            if task == TARGET:
                shadow.step(lambda m, x=x[chosen], y=y[chosen]: F.cross_entropy(m(x), y))  # type: ignore[misc]
            losses[task] = F.cross_entropy(model(x[chosen]), y[chosen])
        # The mean over sources, so that all together pull no harder than one.
        opt.backward({task: loss / (1 if task == TARGET else len(sources)) for task, loss in losses.items()})
        opt.step()
        assert opt.last is not None
        cosines += opt.last.cosines[0, 0].nan_to_num() / settings.steps
        opt.zero_grad()
    found = {name: rule.read(opt).matrix[1:, 0].tolist() for name, rule in rules.items()}
    found["cosine"] = cosines[1:].tolist()
    error = shadow.gap(lambda m: (m(test[0]).argmax(1) != test[1]).double().mean().item())
    return {
        "error": error,
        "loss": shadow.gap(lambda m: F.cross_entropy(m(test[0]), test[1]).item()),
        "alone": shadow.history[0].target_only,
        "predicted": {name: dict(zip(sources, values, strict=True)) for name, values in found.items()},
    }


def study(seeds: Sequence[int], settings: Settings, jobs: int, file: Path) -> list[dict[str, Any]]:
    """All runs, each source with the target, and all sources with it; those that are in the file are not made again."""
    names = list(SOURCES)
    wanted = [(o, seed, some) for seed in seeds for o in OPTIMIZERS for some in (*([name] for name in names), names)]
    kept: list[dict[str, Any]] = []
    if file.exists():
        saved = json.loads(file.read_text(encoding="utf-8"))
        kept = saved["runs"] if saved["settings"] == asdict(settings) else []
    done = [(r["optimizer"], r["seed"], r["sources"]) for r in kept]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run, some, o, seed, settings): (o, seed, some) for o, seed, some in wanted
                   if (o, seed, some) not in done}  # fmt: skip
        for future in tqdm(as_completed(futures), total=len(futures), unit="run", desc="training", disable=None):
            o, seed, some = futures[future]
            kept.append({"optimizer": o, "seed": seed, "sources": some, **future.result()})
            part = file.with_suffix(".part")
            part.write_text(json.dumps({"settings": asdict(settings), "runs": kept}) + "\n", encoding="utf-8")
            part.replace(file)
    asked = [r for r in kept if (r["optimizer"], r["seed"], r["sources"]) in wanted]
    return sorted(asked, key=lambda r: wanted.index((r["optimizer"], r["seed"], r["sources"])))


# --- What was found ---------------------------------------------------------------------------------------------------


def gaps(results: Sequence[Mapping[str, Any]], optimizer: str, risk: str) -> dict[str, list[float]]:
    """Source → its gap for each seed."""
    mine = [r for r in results if r["optimizer"] == optimizer and len(r["sources"]) == 1]
    return {name: [r[risk] for r in mine if r["sources"] == [name]] for name in SOURCES}


def predicted(results: Sequence[Mapping[str, Any]], optimizer: str, predictor: str, together: bool) -> dict[str, float]:
    """Source → what it should do for the target, the mean over seeds."""
    mine = [
        r["predicted"][predictor] for r in results if r["optimizer"] == optimizer and (len(r["sources"]) > 1) == together
    ]
    return {name: float(np.mean([values[name] for values in mine if name in values])) for name in SOURCES}


def agreement(
    promised: npt.NDArray[np.float64], brought: npt.NDArray[np.float64], *, resamples: int = 2000
) -> tuple[float, float, float]:
    """Spearman's rank correlation, and its 95% interval by the bootstrap over sources (percentiles)."""
    generator = np.random.default_rng(0)
    found = []
    while len(found) < resamples:
        some = generator.integers(len(promised), size=len(promised))
        if len(set(promised[some])) > 1 and len(set(brought[some])) > 1:
            found.append(stats.spearmanr(promised[some], brought[some]).statistic)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(stats.spearmanr(promised, brought).statistic), float(low), float(high)


def report(results: Sequence[Mapping[str, Any]], settings: Settings) -> str:
    """The tables, in Markdown."""
    seeds = len({r["seed"] for r in results})
    lines = [
        f"{len(SOURCES)} sources, {seeds} seeds, {settings.steps} steps, {settings.labelled} labelled target samples.",
        "",
    ]
    lines += ["| Gap in test error, points | " + " | ".join(OPTIMIZERS) + " |", "|---|" + "---|" * len(OPTIMIZERS)]
    for name in SOURCES:
        cells = []
        for o in OPTIMIZERS:
            values = [100 * gap for gap in gaps(results, o, "error")[name]]
            cells.append(f"{np.mean(values):+.1f} ± {np.std(values, ddof=1) if seeds > 1 else 0:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    alone = [f"{100 * np.mean([r['alone'] for r in results if r['optimizer'] == o]):.1f}% alone" for o in OPTIMIZERS]
    lines += [f"| *target* | {' | '.join(alone)} |", ""]
    lines += ["| Spearman's correlation with | " + " | ".join(f"{o}: error | {o}: loss" for o in OPTIMIZERS) + " |"]
    lines += ["|---|" + "---|---|" * len(OPTIMIZERS)]
    for together in (False, True):
        for predictor in PREDICTORS:
            cells = []
            for o in OPTIMIZERS:
                promised = np.array(list(predicted(results, o, predictor, together).values()))
                for risk in ("error", "loss"):
                    brought = -np.array([np.mean(values) for values in gaps(results, o, risk).values()])
                    rho, low, high = agreement(promised, brought)
                    cells.append(f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]")
            where = "all sources in one training" if together else "a training for each source"
            lines.append(f"| {predictor}, {where} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --- Overhead ---------------------------------------------------------------------------------------------------------


def _encoder() -> nn.Sequential:
    """As LeNet, for 28 × 28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 128), nn.ReLU(),
    )  # fmt: skip


def overheads(repeats: int, batch: int) -> list[Figure]:
    """A step with the gate against one without, and with transference against without."""
    torch.manual_seed(0)
    x, y = torch.randn(2 * batch, 1, 28, 28), torch.randint(10, (2 * batch,))
    source, target = slice(batch), slice(batch, None)

    def training(gated: bool) -> Callable[[], None]:
        encoder, classifier = _encoder(), nn.Linear(128, 10)
        gate = gs.DiscriminatorGate(128, 10, terms="marginal")
        adam = torch.optim.Adam([*encoder.parameters(), *classifier.parameters(), *gate.parameters()])

        def step() -> None:
            adam.zero_grad()
            f = encoder(x)
            losses = F.cross_entropy(classifier(f), y, reduction="none")
            if gated:
                losses = torch.cat([gate.weights(f[source], y[source]) * losses[source], losses[target]])
                joint = gate.discriminator_loss(source=(f[source], y[source]), target=(f[target], y[target]))
                (2 * losses.mean() + joint).backward()
            else:
                losses.mean().backward()
            adam.step()

        return step

    def surgery(rule: gs.Rule) -> Callable[[], None]:
        model = nn.ModuleList([_encoder(), *(nn.Linear(128, 10) for _ in range(4))])
        opt = gs.SurgeryOptimizer(torch.optim.Adam(model.parameters()), rule, model=model, groups="layer")

        def step() -> None:
            f = model[0](x)
            opt.backward({str(k): F.cross_entropy(model[1 + k](f), (y + k) % 10) for k in range(4)})
            opt.step()
            opt.zero_grad()

        return step

    steps = {
        "gate": training(True),
        "without": training(False),
        "transference": surgery(gs.Chain(gs.PCGrad(), gs.Transference())),
        "surgery": surgery(gs.Chain(gs.PCGrad(), gs.Rule())),
    }
    times = interleaved({name: Contender(step) for name, step in steps.items()}, repeats, "overhead")
    return [
        overhead("a step with the gate, LeNet", times["gate"], times["without"], 1.25),
        overhead("a step with transference, LeNet, 4 tasks", times["transference"], times["surgery"], 1.02),
    ]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the study, prints what came out, and returns the folder with it."""
    options = _parse(arguments)
    settings = Settings(steps=20) if options.quick else Settings(steps=options.steps, labelled=options.labelled)
    seeds = range(options.seed, options.seed + (1 if options.quick else options.seeds))
    text = ""
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.overhead_only:
        results = study(seeds, settings, options.jobs, options.out / "runs.json")
        text = report(results, settings) + "\n\n"
    torch.set_num_threads(options.threads)
    text += table(overheads(3 if options.quick else options.repeats, 8 if options.quick else 64))
    (options.out / "transfer.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nWritten to {options.out}.")
    return options.out


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    known.add_argument("--seeds", type=int, default=5, help="how many")
    known.add_argument("--seed", type=int, default=0, help="the first: data, initial weights, batches")
    known.add_argument("--steps", type=int, default=Settings.steps, help="of each training")
    known.add_argument("--labelled", type=int, default=Settings.labelled, help="target samples with labels")
    known.add_argument("--jobs", type=int, default=2, help="trainings at a time, of one thread each")
    known.add_argument("--threads", type=int, default=1, help="of the timings")
    known.add_argument("--repeats", type=int, default=41, help="samples of each timing")
    known.add_argument("--out", type=Path, default=Path("out/transfer"), help="folder for runs and tables")
    known.add_argument("--overhead-only", action="store_true", help="leave out the trainings")
    known.add_argument("--quick", action="store_true", help="one seed, few steps: sees that all works")
    options = known.parse_args(arguments)
    for name in ("seeds", "steps", "labelled", "jobs", "threads", "repeats"):
        if getattr(options, name) < 1:
            known.error(f"--{name} must be at least 1. Found {getattr(options, name)}.")
    if options.labelled > 300:
        known.error(
            f"--labelled must be at most 300: the other digits are for sources and tests. Found {options.labelled}."
        )
    return options


if __name__ == "__main__":
    main()
