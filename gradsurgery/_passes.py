"""The two kinds of backward passes: of one loss per task, and of a batch that mixes samples of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._buffer import Rows
from ._combination import Combination
from ._compile import donated_buffers_explained
from ._counts import read_samples
from ._gradients import TaskGradients
from ._losses import Loss
from ._mixed import MixedBatch
from ._ranks import Inflow, Lockstep, Outlook, Ranks
from ._stream import Stream
from .sources import Root, Source
from .sources._split import Pass

Targets = tuple[Sequence[Tensor], Sequence[Rows]]


class TaskPass:
    """Of one loss per task, which a source turns into rows.

    Args:
        losses: of the tasks that are there.
        tasks: names of the ``K`` tasks.
        samples: what the losses are means of, as for :meth:`SurgeryOptimizer.backward`.
        gradients: where rows go.
        source: computes them.
        targets: the tensors whose gradients are wanted, and their rows; None for all trained parameters.

    Attributes:
        present: the tasks that are there.
        values: their losses ``[K]``, detached; zero for those that are not.
        counts: what the losses weigh among those of all ranks.
        outlook: what is known ahead of the gradients: nothing.
        outputs: where the pass starts.
        verifies: whether the rows are compared with a plain backward pass.
    """

    outlook = None
    verifies = False

    def __init__(
        self,
        losses: Sequence[Loss],
        tasks: tuple[str, ...],
        samples: Mapping[str, float] | None,
        gradients: TaskGradients,
        source: Source,
        targets: Targets | None,
    ) -> None:
        index = {name: k for k, name in enumerate(tasks)}
        self.present = tuple(index[loss.name] for loss in losses)
        self.values = gradients.zeros(len(tasks))
        if losses:
            found = torch.stack([loss.value.detach().reshape(()).to(self.values) for loss in losses])
            self.values = self.values.index_put((gradients.index(self.present),), found)
        self.counts = read_samples(samples, [loss.name for loss in losses], tasks)
        self.outputs: list[Any] = [loss.output for loss in losses]
        self._losses, self._gradients, self._source, self._targets = losses, gradients, source, targets

    def seeds(self, factors: Tensor) -> list[Tensor]:
        """What flows into the outputs, given the tasks' factors ``[K]``."""
        return [factors[k].to(loss.value).expand(loss.shape) for k, loss in zip(self.present, self._losses, strict=True)]

    def run(self, factors: Tensor, *, retain_graph: bool) -> None:
        """Adds each task's gradients to its rows, times its factor."""
        if not self.present:  # on this rank
            return
        roots = [
            Root(k, loss.name, loss.output, seed)
            for k, loss, seed in zip(self.present, self._losses, self.seeds(factors), strict=True)
        ]
        parameters, rows = self._targets or self._gradients.targets()
        self._source(roots, parameters, rows, retain_graph=retain_graph)


class BatchPass:
    """The single pass of a mixed batch.

    Args:
        losses: ``[B, ...]``, of the samples.
        batch: which sample belongs to which task.
        gradients: where rows go.
        ranks: the processes that train together.
        inflow: where they say that rows go first.
        follow: find out how gradients will flow; otherwise there is no :meth:`run` and no :meth:`stream`.
        streams: whether surgery could happen inside the pass, as far as this rank is concerned.
        verify: compare the rows with a plain backward pass.

    Attributes:
        present, values, counts, outputs, verifies: as those of :class:`TaskPass`.
        outlook: what is known ahead of the gradients, if that was asked for.

    Raises:
        ValueError: as :class:`Pass`.
    """

    def __init__(
        self,
        losses: Tensor,
        batch: MixedBatch,
        gradients: TaskGradients,
        ranks: Ranks,
        inflow: Inflow | None,
        *,
        follow: bool,
        streams: bool,
        verify: bool,
    ) -> None:
        self.present = batch.present
        self.values = batch.values(losses, gradients.zeros(len(batch.tasks)))
        self.counts = batch.counts(losses)
        self.outputs: list[Any] = [losses]
        self.outlook: Outlook | None = None
        self.verifies = verify
        self._losses, self._batch, self._gradients, self._ranks = losses, batch, gradients, ranks
        self._trained = gradients.trained
        self._parameters, self._rows = gradients.targets()
        self._inflow = inflow
        if follow:
            names = [gradients.names[p] for p in self._trained]
            leaves, rows = (self._parameters, self._rows) if inflow is None else (inflow.leaves, inflow.rows)
            with donated_buffers_explained():
                self._single = Pass(losses, batch.labels(losses), leaves, rows, names)
            self.outlook = Outlook(streams, verify, self._look)

    def _look(self) -> tuple[list[set[int]], list[int]]:
        tasks: list[set[int]] = [set() for _ in self._gradients.parameters]
        found, order = self._single.outlook()
        for p, own in zip(self._trained, found, strict=True):
            tasks[p] = own
        return tasks, [self._trained[i] for i in order]

    def seeds(self, factors: Tensor) -> list[Tensor]:
        """What flows into the outputs, given the tasks' factors ``[K]``."""
        return [self._batch.seeds(self._losses, factors)]

    def run(self, factors: Tensor, *, retain_graph: bool) -> None:
        """Adds each task's gradients to its rows, times its factor.

        Raises:
            RuntimeError: if they are to be verified, and are not those of a plain backward pass.
        """
        keep = retain_graph or self.verifies
        with donated_buffers_explained():
            if self._inflow is None:
                self._single.run(*self.seeds(factors), retain_graph=keep)
            else:
                factors = factors / self._ranks.divisor  # rows are added up here, where others take means
                self._ranks.run(self._single, self._inflow, *self.seeds(factors), retain_graph=keep)
            if self.verifies:
                self._compare(factors, retain_graph)

    def _compare(self, factors: Tensor, retain_graph: bool) -> None:
        weights = 0.5 + torch.rand(len(factors), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        weights, failed = weights.to(factors), None
        (weighted,) = self.seeds(factors * weights)
        plain = self._ranks.plain(self._losses, weighted, self._parameters, retain_graph=retain_graph)
        try:
            self._single.verify(weights, plain, self._rows)
        except RuntimeError as error:
            failed = error
        self._ranks.together(failed)

    def stream(
        self, combination: Combination, factors: Tensor, *, retain_graph: bool
    ) -> tuple[Stream | Lockstep, Callable[[], None]]:
        """What combines surgery groups inside the pass as they become complete, and what runs the pass."""
        awaited = [self._trained[i] for i in self._single.reached]
        parts = self._ranks.parts
        stream: Stream | Lockstep = Stream(self._gradients, combination, awaited)
        if parts is not None:
            stream = Lockstep(combination.stages, parts, awaited)

        def run() -> None:
            new, trained, complete = self._gradients.arena.take, self._trained, stream.complete
            with donated_buffers_explained():
                self._single.run(
                    *self.seeds(factors), retain_graph=retain_graph, complete=lambda i: complete(trained[i]), new=new
                )

        return stream, run
