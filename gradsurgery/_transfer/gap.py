"""The negative transfer gap of an algorithm, over seeds."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing import get_context
from numbers import Real
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .._bench.progress import progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Algorithm: TypeAlias = Callable[[Any, Any, int], float]


@dataclass(frozen=True)
class GapResult:
    """A negative transfer gap, over seeds; prints as a sentence.

    Attributes:
        seeds: the ``n`` seeds.
        with_source: the risk of each seed, ``R(A(S, T))``.
        target_only: the risk of each seed without the source, ``R(A(0, T))``.
        confidence: of the interval.
    """

    seeds: tuple[int, ...]
    with_source: tuple[float, ...]
    target_only: tuple[float, ...]
    confidence: float = 0.95

    @property
    def gaps(self) -> tuple[float, ...]:
        """The gap of each seed; positive where the source did harm."""
        return tuple(a - b for a, b in zip(self.with_source, self.target_only, strict=True))

    @property
    def gap(self) -> float:
        """The mean gap."""
        return float(np.mean(self.gaps))

    @property
    def interval(self) -> tuple[float, float]:
        """Of the mean gap, by Student's t, paired by seed; infinite for one seed."""
        count = len(self.seeds)
        if count < 2:
            return -math.inf, math.inf
        half = _statistics().t.ppf((1 + self.confidence) / 2, count - 1) * np.std(self.gaps, ddof=1) / math.sqrt(count)
        return self.gap - float(half), self.gap + float(half)

    @property
    def p_value(self) -> float:
        """Of the two-sided sign test that gaps are as often positive as negative; gaps of zero are left out."""
        positive, negative = sum(gap > 0 for gap in self.gaps), sum(gap < 0 for gap in self.gaps)
        if not positive + negative:
            return 1.0
        return float(_statistics().binomtest(positive, positive + negative).pvalue)

    @property
    def verdict(self) -> str:
        """Whether negative transfer occurs: ``"yes"`` or ``"no"`` by the interval, else ``"undecided at n seeds"``."""
        low, high = self.interval
        count = len(self.seeds)
        return "yes" if low > 0 else "no" if high <= 0 else f"undecided at {count} seed{'s' * (count != 1)}"

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"NTG {self.gap:+.4g} [{low:+.4g}, {high:+.4g}] ({100 * self.confidence:g}%, {len(self.seeds)} seeds), "
            f"sign test p = {self.p_value:.2g}; negative transfer: {self.verdict}"
        )


@dataclass(frozen=True)
class GapCurve:
    """Negative transfer gaps along a scale of sources; prints as a table.

    Attributes:
        epsilons: where on the scale, ascending: such as the share of perturbed samples.
        results: the gap at each.
    """

    epsilons: tuple[float, ...]
    results: tuple[GapResult, ...]

    def __str__(self) -> str:
        rows = [["eps", "with", "without", "NTG", "interval", "sign p", "negative transfer"]]
        for epsilon, result in zip(self.epsilons, self.results, strict=True):
            low, high = result.interval
            risks = (f"{np.mean(risks):.4g}" for risks in (result.with_source, result.target_only))
            interval = f"[{low:+.4g}, {high:+.4g}]"
            rows.append(
                [f"{epsilon:.12g}", *risks, f"{result.gap:+.4g}", interval, f"{result.p_value:.2g}", result.verdict]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def plot(self, ax: Axes | None = None, *, label: str | None = None) -> Axes:
        """The gap against epsilon, with a band for the interval and a line at zero (thesis, Figure 3.3).

        Args:
            ax: where to draw; None for new axes.
            label: of the line.
        """
        from ..plots import _axes, _finish

        ax = _axes(ax, width=5.0, height=3.6)
        bounds = np.array([result.interval for result in self.results])
        low, high = np.where(np.isfinite(bounds), bounds, np.nan).T  # one seed has no interval
        (line,) = ax.plot(self.epsilons, [result.gap for result in self.results], marker="o", label=label)
        ax.fill_between(self.epsilons, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set_xlabel("epsilon")
        ax.set_ylabel("negative transfer gap")
        _finish(ax)
        return ax

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the curve to a JSON file, every risk in full precision."""
        rows = [
            {"epsilon": e, "seeds": r.seeds, "with": r.with_source, "without": r.target_only, "confidence": r.confidence}
            for e, r in zip(self.epsilons, self.results, strict=True)
        ]
        Path(path).write_text(json.dumps({"gap_curve": rows}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GapCurve:
        """Reads a curve that :meth:`save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or "gap_curve" not in data:
            raise ValueError(f"{path} is no file that GapCurve.save wrote: it has no entry 'gap_curve'.")
        rows = data["gap_curve"]
        results = (
            GapResult(tuple(row["seeds"]), tuple(row["with"]), tuple(row["without"]), row["confidence"]) for row in rows
        )
        return cls(tuple(row["epsilon"] for row in rows), tuple(results))


class _Run(NamedTuple):
    """A run of the algorithm; ``name`` says which source it has."""

    name: str
    source: Any
    target: Any
    seed: int


class NegativeTransferGap:
    r"""Measures whether a source does an algorithm good or harm.

    With the risk ``R`` on the target's distribution, and an algorithm ``A`` that is run with and without the source,

    ``NTG(A, S, T) = R(A(S, T)) - R(A(0, T))``,

    and negative transfer occurs if that is positive. Both runs of a seed share it, and gaps are compared seed by seed.

    Args:
        algorithm: ``(source, target, seed) -> risk``; with ``source=None`` it is to use the target alone. All its
            randomness should come from the seed.
        seeds: at least one.
        jobs: how many processes run at a time. With more than one, the algorithm, the sources and the target must be
            picklable, and the script guarded by ``if __name__ == "__main__":``.
        confidence: of the intervals.
        cache: a folder in which every finished run is kept, for a measurement that is interrupted, or repeated with more
            seeds. The name of a run's file is the SHA-256 of the pickled algorithm (its module and name, and its arguments
            if it is a ``functools.partial``), the source text of its function or class, the pickled source and target, and
            the seed. What the function calls is not in it: change that, and choose another folder.

    Raises:
        ValueError: for settings outside these ranges.

    Example:
        >>> import gradsurgery as gs
        >>> def algorithm(source, target, seed):  # the risk of a mean
        ...     return abs(sum(target + (source or [])) / len(target + (source or [])) - 1) + 0.01 * seed
        >>> ntg = gs.NegativeTransferGap(algorithm, seeds=range(3))
        >>> ntg.measure([3.0], [1.0, 0.9]).verdict
        'yes'
        >>> print(ntg.sweep({0.0: [1.1], 1.0: [3.0]}, [1.0, 0.9]))  # doctest: +ELLIPSIS
        eps  with    without  NTG     interval            sign p  negative transfer
        0    0.01    0.06     -0.05   [-0.05, -0.05]      0.25    no
        1    0.6433  0.06     +0.5833 [+0.5833, +0.5833]  0.25    yes

    Reference:
        Wang, Dai, Póczos, Carbonell, *Characterizing and Avoiding Negative Transfer*, CVPR 2019; Z. Wang's thesis,
        Equations 3.3 and 3.4.

    Note:
        Needs SciPy: ``pip install "gradsurgery[transfer]"``.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        *,
        seeds: Iterable[int] = range(10),
        jobs: int = 1,
        confidence: float = 0.95,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if not callable(algorithm):
            raise ValueError(f"`algorithm` must be a function (source, target, seed) -> risk. Found {algorithm!r}.")
        self.algorithm = algorithm
        given = tuple(seeds)
        if not given or len(set(given)) < len(given) or not all(hasattr(seed, "__index__") for seed in given):
            raise ValueError(f"`seeds` must be distinct whole numbers, at least one. Found {given!r}.")
        self.seeds = tuple(map(index, given))
        if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
            raise ValueError(f"`jobs` must be a number of processes, at least 1. Found jobs={jobs!r}.")
        if not 0 < confidence < 1:
            raise ValueError(f"`confidence` must be between 0 and 1. Found confidence={confidence!r}.")
        _statistics()
        self.jobs = jobs
        self.confidence = confidence
        self.cache = None if cache is None else Path(cache)

    def measure(self, source: Any, target: Any) -> GapResult:
        """The gap of one source.

        Raises:
            ValueError: if a risk is no finite number, or ``source`` is None; with several jobs or a cache, for what cannot
                be pickled.
            RuntimeError: if the algorithm fails.
        """
        return self._measure([("the source", source)], target)[0]

    def sweep(self, sources: Mapping[float, Any], target: Any) -> GapCurve:
        """The gaps of several sources; the runs without a source are shared.

        Args:
            sources: epsilon → source.
            target: as the algorithm takes it.

        Raises:
            ValueError, RuntimeError: as :meth:`measure`.
        """
        if not sources:
            raise ValueError("`sources` must map numbers to sources, at least one. Found none.")
        epsilons = sorted(sources)
        found = self._measure([(f"the source at {epsilon}", sources[epsilon]) for epsilon in epsilons], target)
        return GapCurve(tuple(map(float, epsilons)), tuple(found))

    def _measure(self, sources: Sequence[tuple[str, Any]], target: Any) -> list[GapResult]:
        if empty := [name for name, source in sources if source is None]:
            raise ValueError(f"{empty[0]} is None, which stands for no source at all.")
        named = [("no source", None), *sources]
        runs = [_Run(name, source, target, seed) for name, source in named for seed in self.seeds]
        risks = self._risks(runs)
        count = len(self.seeds)
        alone, *others = (tuple(risks[i : i + count]) for i in range(0, len(risks), count))
        return [GapResult(self.seeds, each, alone, self.confidence) for each in others]

    def _risks(self, runs: Sequence[_Run]) -> list[float]:
        if self.jobs > 1 or self.cache is not None:
            self._check_picklable(runs)
        files: list[Path | None] = [None] * len(runs)
        if self.cache is not None:
            self.cache.mkdir(parents=True, exist_ok=True)
            files = [self.cache / f"{self._key(run)}.json" for run in runs]
        risks: dict[int, float] = {i: _read(file) for i, file in enumerate(files) if file is not None and file.exists()}
        due = [i for i in range(len(runs)) if i not in risks]
        for i, risk in progress(self._run(runs, due), "negative transfer gap", total=len(due)):
            risks[i] = risk
            if (file := files[i]) is not None:
                _write(file, risk)
        return [risks[i] for i in range(len(runs))]

    def _run(self, runs: Sequence[_Run], due: Sequence[int]) -> Iterator[tuple[int, float]]:
        if self.jobs == 1 or len(due) < 2:
            for i in due:
                yield i, _risk(runs[i], partial(self.algorithm, runs[i].source, runs[i].target, runs[i].seed))
            return
        with ProcessPoolExecutor(min(self.jobs, len(due)), mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(self.algorithm, runs[i].source, runs[i].target, runs[i].seed): i for i in due}
            try:
                for future in as_completed(futures):
                    yield futures[future], _risk(runs[futures[future]], future.result)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _check_picklable(self, runs: Sequence[_Run]) -> None:
        named = {"`algorithm`": self.algorithm, "`target`": runs[0].target, **{run.name: run.source for run in runs}}
        why = "other processes get it" if self.jobs > 1 else "the cache's keys are made of it"
        for name, value in named.items():
            try:
                pickle.dumps(value)
            except Exception as error:
                raise ValueError(
                    f"{name} must be picklable, since {why}. Found {value!r}: {error}. Define functions at the top level "
                    "of a module; or use jobs=1 and no cache."
                ) from error

    def _key(self, run: _Run) -> str:
        function: Any = self.algorithm
        while isinstance(function, partial):
            function = function.func
        if not inspect.isroutine(function) and not inspect.isclass(function):  # an object with a method __call__
            function = type(function)
        try:
            text = inspect.getsource(function)
        except (OSError, TypeError):
            text = ""
        parts = (_pickled(self.algorithm), text.encode(), _pickled(run.source), _pickled(run.target))
        digest = hashlib.sha256()
        for part in chain(parts, (str(run.seed).encode(),)):
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()

    def __repr__(self) -> str:
        name = getattr(self.algorithm, "__name__", repr(self.algorithm))
        return f"NegativeTransferGap({name}, {len(self.seeds)} seeds, jobs={self.jobs}, confidence={self.confidence})"


def _risk(run: _Run, compute: Callable[[], Any]) -> float:
    where = f"with {run.name} and seed {run.seed}"
    try:
        risk = compute()
    except Exception as error:
        raise RuntimeError(f"The algorithm failed {where}: {type(error).__name__}: {error}") from error
    if getattr(risk, "ndim", None) == 0:  # a tensor or an array
        risk = risk.item()
    if not isinstance(risk, Real):
        raise ValueError(f"The risk {where} must be a number. Found {risk!r}.")
    if not math.isfinite(risk):
        raise ValueError(f"The risk {where} must be finite. Found {risk}: did the training diverge?")
    return float(risk)


class _Pickler(pickle.Pickler):
    """Tensors by their values: PyTorch's own form of equal ones differs."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.layout == torch.strided:
            flat = value.detach().cpu().contiguous().reshape(-1)
            return _Pickler, (str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes())
        return NotImplemented


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def _read(file: Path) -> float:
    return float(json.loads(file.read_text(encoding="utf-8"))["risk"])


def _write(file: Path, risk: float) -> None:
    # A file is there as a whole or not at all, whenever the run is stopped.
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"risk": risk}) + "\n", encoding="utf-8")
    part.replace(file)


def _statistics() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError('Intervals and tests need SciPy: pip install "gradsurgery[transfer]".') from error
    return stats
