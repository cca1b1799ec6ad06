"""Loss geometry (Section 6.2): how similar the tasks' gradients are on the same sentences in all languages."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch.nn.functional import cross_entropy

import gradsurgery as gs

from .corpus import PAD, Corpus, prepare
from .jobs import folder_of, pooled, results_of
from .languages import FAMILY, other
from .model import SIZES, Translator
from .train import Job, write_whole

Matrix = NDArray[np.float64]

SENTENCES = 128
"""Of the aligned ones, whose gradients are looked at."""

PARTS = {"encoder": ["encoder.*"], "decoder": ["decoder.*"]}
"""Part of the model → its surgery groups, in a recording by layer."""


def geometry(model: Translator, corpus: Corpus, tasks: Sequence[str], *, count: int = 0, size: int = 32) -> gs.Step:
    """Cosine similarities of the tasks' gradients on held-out sentences that all languages have.

    The gradient of a task is that of the mean loss over all of its sentences, without dropout. The model is not changed.

    Args:
        model: a trained one.
        corpus: whose aligned sentences serve.
        tasks: names such as ``"en-fr"``.
        count: at most so many sentences; 0 for all.
        size: sentences that are looked at together, in all languages.
    """
    model.eval()
    optimizer = gs.SurgeryOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), gs.Sum(), model=model, groups="layer", tasks=tasks
    )
    pairs = [corpus.pairs("aligned", task) for task in tasks]
    rows = len(pairs[0].text)
    chosen = range(min(count or rows, rows))
    tokens = [sum(len(its.text[i]) + 1 for i in chosen) for its in pairs]
    device = model.embedding.weight.device
    for start in range(0, len(chosen), size):
        some = chosen[start : start + size]
        picks = [(k, its.english[i], its.text[i]) for k, its in enumerate(pairs) for i in some]
        batch = corpus.batch(tasks, picks).to(device)
        with optimizer.split(batch.tasks, reduction="sum"):
            scores = model(batch.source, batch.target[:, :-1])
            losses = cross_entropy(scores.mT, batch.target[:, 1:], ignore_index=PAD, reduction="none")
            losses = losses / torch.tensor(tokens, device=device)[batch.tasks.to(device), None]
        optimizer.backward(losses)
    optimizer.combine()
    optimizer.zero_grad()
    assert optimizer.last is not None
    return optimizer.last


def look(jobs: Iterable[Job], out: Path, cache: Path, *, processes: int, device: str, check: bool) -> None:
    """Measures the geometry of complete runs, some at a time, and keeps it beside them."""
    todo = [job for job in results_of(jobs, out) if not _kept(job, out, SENTENCES).exists()]
    pooled(partial(_mean_similarity, out=out, cache=cache, device=device, check=check), todo, processes)


def _mean_similarity(job: Job, out: Path, cache: Path, device: str, check: bool) -> float:
    corpus = prepare(job.recipe, cache, check=check)
    return float(np.nanmean(of_run(job, corpus, out, count=SENTENCES, device=device).cosines))


def _kept(job: Job, out: Path, count: int) -> Path:
    return folder_of(job, out) / f"geometry-{count}.npz"


def of_run(job: Job, corpus: Corpus, out: Path, *, count: int, device: str = "cpu") -> gs.Recorder:
    """The geometry at all checkpoints that a run has kept; measured once, and kept beside them."""
    folder, kept = folder_of(job, out), _kept(job, out, count)
    if kept.exists():
        return gs.Recorder.load(kept)
    recorder = gs.Recorder()
    for path in sorted(folder.glob("model-*.pt")):
        model = Translator(corpus.size, SIZES[job.settings.size], longest=2 * job.recipe.longest + 16).to(device)
        model.load_state_dict(torch.load(path, weights_only=True, map_location=device))
        recorder.record(geometry(model, corpus, job.tasks, count=count), int(path.stem.partition("-")[2]))
    if not len(recorder.steps):
        raise SystemExit(f"{folder} has no checkpoints of the model to look at. Delete it, and it will be run again.")
    buffer = io.BytesIO()
    recorder.save(buffer)
    write_whole(kept, buffer.getvalue())
    return recorder


# --- What the similarities say ------------------------------------------------------------------------------------------


def similarities(recorder: gs.Recorder, groups: Sequence[str] | None = None, tasks: Sequence[str] | None = None) -> Matrix:
    """``[K, K]``: the mean over steps and surgery groups, of all tasks or of some; nan on the diagonal."""
    found: Matrix = _cosines(recorder, groups, recorder.tasks if tasks is None else tasks).mean((0, 1))
    return found


def _cosines(recorder: gs.Recorder, groups: Sequence[str] | None, tasks: Sequence[str]) -> Matrix:
    """``[steps, groups, K, K]``."""
    index = [recorder.tasks.index(task) for task in tasks]
    found: Matrix = recorder.cosines[:, recorder.select(groups)].astype(np.float64)[:, :, index][..., index]
    return found


def directions_of(recorder: gs.Recorder) -> dict[str, list[str]]:
    """``"en-xx"`` and ``"xx-en"`` → the recording's tasks of that direction; without those that have none."""
    outward = [task for task in recorder.tasks if task.startswith("en-")]
    inward = [task for task in recorder.tasks if not task.startswith("en-")]
    return {name: tasks for name, tasks in (("en-xx", outward), ("xx-en", inward)) if tasks}


class Clustering(NamedTuple):
    """Of the similarities in one part of a model.

    Attributes:
        mean: cosine similarity of all pairs.
        conflict: how many of them are negative.
        difference: mean of pairs within a family minus that of pairs between two.
        correlation: of similarity with being of one family.
        p: how likely such a difference is if families mean nothing.
    """

    mean: float
    conflict: float
    difference: float
    correlation: float
    p: float


def clustering(recorder: gs.Recorder, part: str, tasks: Sequence[str], *, times: int = 9999) -> Clustering:
    """How much families explain. ``tasks`` are all from English or all to English, so that no language is there twice."""
    cosines = _cosines(recorder, PARTS[part], tasks)
    conflict = float((cosines < 0).sum() / np.isfinite(cosines).sum())
    matrix: Matrix = cosines.mean((0, 1))
    return Clustering(float(np.nanmean(matrix)), conflict, *permutation_test(matrix, families_of(tasks), times=times))


def families_of(tasks: Sequence[str]) -> list[str]:
    """The family of each task's language."""
    return [FAMILY[other(task)] for task in tasks]


def permutation_test(
    matrix: Matrix, families: Sequence[str], *, times: int = 9999, seed: int = 0
) -> tuple[float, float, float]:
    """Whether languages of a family have more similar gradients than others, by permuting the languages (a Mantel test).

    Returns:
        The mean of pairs within a family minus that of pairs between two; the correlation of similarity with being of one
        family; and the one-sided p-value of the difference. All nan if there are no pairs of one kind.
    """
    one, other = np.triu_indices(len(families), 1)
    there = np.isfinite(matrix[one, other])
    one, other = one[there], other[there]
    values = matrix[one, other]
    codes = np.unique(families, return_inverse=True)[1]

    def differences(of: NDArray[np.int64]) -> Matrix:
        same = of[:, one] == of[:, other]
        within, count = same @ values, same.sum(1)
        with np.errstate(invalid="ignore"):  # 0 / 0 without pairs of one kind
            return within / count - (values.sum() - within) / (len(values) - count)

    found = float(differences(codes[None])[0])
    if np.isnan(found):
        return found, found, found
    random = np.random.default_rng(seed)
    others = differences(np.stack([random.permutation(codes) for _ in range(times)]))
    correlation = float(np.corrcoef(values, codes[one] == codes[other])[0, 1])
    return found, correlation, float((others >= found - 1e-12).sum() + 1) / (times + 1)


def table(recordings: Mapping[str, gs.Recorder], *, times: int = 9999) -> str:
    """For each model, direction and half of it: mean similarity, conflicts, and what families explain; in Markdown."""
    lines = [
        "| model | tasks | part | mean cosine | in conflict | within − between | correlation | p |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, recorder in recordings.items():
        for direction, tasks in directions_of(recorder).items():
            for part in PARTS:
                its = clustering(recorder, part, tasks, times=times)
                cells = (f"{its.mean:.3f}", f"{its.conflict:.1%}", f"{its.difference:.3f}", f"{its.correlation:.2f}")
                lines.append(f"| {name} | {direction} | {part} | {' | '.join(cells)} | {its.p:.4f} |")
    return "\n".join(lines)


def layers_of(recorder: gs.Recorder) -> list[str]:
    """The surgery groups that are blocks, from the first of the encoder to the last of the decoder."""
    return [group for group in recorder.groups if re.match(r"(en|de)coder\.", group)]


def by_layer(recordings: Mapping[str, gs.Recorder]) -> str:
    """Mean similarity in each block (Figure 6.4 b), in Markdown."""
    layers = layers_of(next(iter(recordings.values())))
    lines = [f"| model | tasks | {' | '.join(layers)} |", "|---|---|" + "--:|" * len(layers)]
    for name, recorder in recordings.items():
        for direction, tasks in directions_of(recorder).items():
            cells = [f"{np.nanmean(similarities(recorder, [layer], tasks)):.3f}" for layer in layers]
            lines.append(f"| {name} | {direction} | {' | '.join(cells)} |")
    return "\n".join(lines)


def against_performance(runs: Mapping[str, tuple[gs.Recorder, float]]) -> tuple[str, float, float]:
    """Figure 6.3 (b): how similar the gradients of two tasks are in the model of the two, and how well the first then does.

    Args:
        runs: the second task → the recording of the model, and a score of the first.

    Returns:
        A table in Markdown, the most similar first; Spearman's rank correlation; and its two-sided p-value. Both are nan
        for fewer than three models.
    """
    rows = [(partner, float(np.nanmean(similarities(recorder))), score) for partner, (recorder, score) in runs.items()]
    rows.sort(key=lambda row: row[1], reverse=True)
    lines = ["| trained with | family | cosine similarity | BLEU of the first |", "|---|---|--:|--:|"]
    lines += [f"| {task} | {FAMILY[other(task)]} | {cosine:.3f} | {score:.2f} |" for task, cosine, score in rows]
    both = [row[1] for row in rows], [row[2] for row in rows]
    distinct = len(rows) > 2 and all(len(set(values)) > 1 for values in both)
    correlation, p = map(float, spearmanr(*both)) if distinct else (float("nan"), float("nan"))
    return "\n".join(lines), correlation, p
