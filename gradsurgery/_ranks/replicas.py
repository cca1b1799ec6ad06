"""Data-parallel processes: each holds the whole model, and computes gradients from samples of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .._buffer import Rows
from .._counts import Counts
from .._gradients import TaskGradients
from .._plan import Reach
from .._rule import State
from .agreement import Agreement, digest, leaves
from .alone import Meeting, Ranks
from .buckets import Bucket, arranged, flat
from .sections import VOLATILE, sections
from .sparse import Exchange
from .wire import Wire

if TYPE_CHECKING:
    from .._surgery import Surgery

_PASS, _COMBINE = range(2)
_KINDS = ("given", "alike", "mixed", "sum")
_MOST_REACHES = 256


class Replicas(Ranks):
    """Each task's gradient is the mean over the samples of all ranks; the rule sees these, and all ranks step alike.

    A rank that has no more backward passes in a step waits for the others at :meth:`settle`, and meanwhile takes part in
    their meetings. So passes need not be as many on all ranks.

    Args:
        group: the processes.
        result: reduce the results rather than the rows: Gram matrices are estimated by the mean over the ranks of those of
            their own rows, and only the combined gradients are summed.
        check: compare states, random generators and parameters after each step.
    """

    why_not_streaming = "rows are added up over the ranks at the end of the backward pass"

    def __init__(self, group: dist.ProcessGroup, *, result: bool = False, check: bool = False) -> None:
        self._wire = Wire(group)
        self.size = self._wire.size
        self._result = result
        self._check = check
        self._settled = False
        self._reaches: dict[tuple[int, ...], np.ndarray[tuple[int, int], np.dtype[np.uint8]]] = {}
        self._arranged: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Bucket]] = {}

    def join(self, surgery: Surgery) -> None:
        self._surgery = surgery
        self._agreement = Agreement(self._wire, sections(surgery, result=self._result), VOLATILE, self._adopt)
        self.forget()

    def _adopt(self, section: str, description: object) -> None:
        if section == "tasks" and isinstance(description, dict):
            self._surgery.set_tasks(list(description))

    def renew(self) -> None:
        self._agreement.renew()
        self._reaches.clear()
        self._arranged.clear()

    def forget(self) -> None:
        self._kinds: set[str] = set()
        self._counts: list[float] | None = None  # of this rank's passes, whose shares are settled afterwards
        self._passes: list[int] = []  # for each task, how many meetings it has been at,
        self._own_passes: list[int] = []  # and with losses of this rank
        self._there: list[bool] = []
        self._shares: list[float] = []

    def reopen(self) -> None:
        self._settled = False

    # --- Ahead of a backward pass -------------------------------------------------------------------------------------

    def meet(self, losses: Tensor, present: Tensor, counts: Counts, *, ahead: bool) -> Meeting:
        self._settled = False
        self._kinds.add(counts.kind)
        if not (ahead or counts.kind in ("mixed", "sum")):
            old = self._counts or [0.0] * len(counts.of)
            self._counts = [a + b for a, b in zip(old, counts.of, strict=True)]
            return Meeting(losses, present, None)
        self._check_kinds(self._agreement.meet(_PASS, self._kind_bits, 0))
        return self._pass(losses, counts)

    def _pass(self, losses: Tensor, counts: Counts | None) -> Meeting:
        """What a pass of some ranks holds; this one may have none."""
        own = [0.0] * len(losses) if counts is None else counts.of
        if not self._passes:
            self._passes, self._own_passes, self._there = [0] * len(own), [0] * len(own), [False] * len(own)
        behind = counts is not None and counts.kind in ("given", "alike")
        late = [k for k, n in enumerate(own) if behind and n and self._own_passes[k] != self._passes[k]]
        *totals, all_late = self._wire.host_sum([*own, float(len(late))])
        if all_late:
            raise ValueError(
                "The ranks bring the losses of a task in different calls of backward(), and this step needs to know ahead "
                "what each rank's samples count. Call backward() once for all tasks, or in the same order on all ranks, "
                "with None where a task is absent."
            )
        for k, total in enumerate(totals):
            self._passes[k] += total > 0
            self._own_passes[k] += own[k] > 0
            self._there[k] |= total > 0
        summed = counts is not None and counts.kind == "sum"
        parts = [float(n > 0) if summed else n / total if total else 0.0 for n, total in zip(own, totals, strict=True)]
        shares = torch.tensor(parts, dtype=torch.float64).to(losses)
        present = torch.tensor([total > 0 for total in totals], device=losses.device)
        if self._surgery.weighs_ahead:
            losses = self._wire.sum(losses * shares)
        return Meeting(losses, present, shares)

    @property
    def _kind_bits(self) -> int:
        return sum(1 << i for i, kind in enumerate(_KINDS) if kind in self._kinds)

    @staticmethod
    def _check_kinds(table: Sequence[Sequence[int]]) -> int:
        bits = 0
        for _, ours, _ in table:
            bits |= ours
        kinds = [kind for i, kind in enumerate(_KINDS) if bits >> i & 1]
        if len(kinds) > 1:
            names = {
                "given": "losses of tasks with `samples`",
                "alike": "losses of tasks without `samples`",
                "mixed": "mixed batches with means",
                "sum": "mixed batches with sums",
            }
            raise ValueError(
                f"One step holds {' and '.join(names[kind] for kind in kinds)}, on one rank or another. All backward "
                "passes of a step, on all ranks, have to be of one kind, so that it is known what samples count."
            )
        return bits

    # --- After the last one -------------------------------------------------------------------------------------------

    def settle(self, due: bool) -> bool:
        if self._settled:
            return False
        mask = self._mask()
        ours = digest({"reach": mask.tobytes().hex()})
        table = self._agreement.meet(_COMBINE, self._kind_bits, ours)
        while any(kind == _PASS for kind, _, _ in table):
            self._check_kinds(table)
            meeting = self._pass(self._surgery.per_task, None)
            if self._surgery.weighs_ahead:
                self._surgery.weigh(meeting)
            table = self._agreement.meet(_COMBINE, self._kind_bits, ours)
        self._settled = True
        if not self._check_kinds(table):
            return False
        count = len(self._surgery.per_task)
        if any(self._there):
            self._shares = [1.0] * count
        else:
            own = self._counts or [0.0] * count
            totals = self._wire.host_sum(own)
            self._there = [total > 0 for total in totals]
            self._shares = [n / total if total else 0.0 for n, total in zip(own, totals, strict=True)]
        self._key = tuple(reach for _, _, reach in table)
        if self._key not in self._reaches:
            if len(self._reaches) >= _MOST_REACHES:
                self._reaches.clear()
                self._arranged.clear()
            mask = self._mask()  # this rank may have learnt the tasks by now
            self._reaches[self._key] = self._wire.host_max(torch.from_numpy(mask)).numpy()
        return True

    def _mask(self) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        """For each parameter: which tasks reached it; whether a row is dense; and whether the result has to be."""
        gradients, tasks = self._surgery.gradients, self._surgery.tasks
        mask = np.zeros((len(gradients.rows), len(tasks or ()) + 2), np.uint8)
        for p, rows in enumerate(gradients.rows):
            if reached := rows.tasks:
                mask[p, list(reached)] = 1
                mask[p, -2] = any(not row.is_sparse for row in rows.of.values()) if rows.maybe_sparse else 1
                mask[p, -1] = rows.to_be_dense
        return mask

    def own(self, losses: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        # Where the shares were known ahead, they are in the losses.
        shares = torch.tensor(self._shares, dtype=torch.float64).to(losses)
        return losses * shares, torch.tensor(self._there, device=present.device)

    # --- Rows ---------------------------------------------------------------------------------------------------------

    def reduce(self, gradients: TaskGradients) -> TaskGradients:
        mask = self._reaches[self._key]
        reach: Reach = tuple(tuple(np.flatnonzero(line[:-2]).tolist()) for line in mask)
        dense = {p: tasks for p, tasks in enumerate(reach) if tasks and mask[p, -2]}
        sparse = {p: tasks for p, tasks in enumerate(reach) if tasks and not mask[p, -2]}
        reduced = gradients.with_rows([Rows() for _ in reach])
        if sparse:
            exchange = Exchange(self._wire, [gradients.rows[p] for p in sparse], self._shares)
            factor = float(self._wire.rank == 0) / (self.size if self._result else 1)
            for i, (p, tasks) in enumerate(sparse.items()):
                parameter, to_be_dense = gradients.parameters[p], bool(mask[p, -1])
                if to_be_dense and exchange.is_larger(i, parameter, tasks):
                    dense[p] = tasks
                else:
                    reduced.rows[p] = exchange.rows(i, parameter, tasks, to_be_dense, factor)
                    gradients.rows[p].clear()
        key = self._key, tuple(dense)
        if key not in self._arranged:
            self._arranged[key] = arranged(dense, gradients.parameters, self.size)
        self._buckets = self._arranged[key]
        if self._result:
            for p, tasks in dense.items():
                self._scale(gradients.rows[p], reduced.rows[p], gradients.parameters[p], tasks)
        else:
            self._scatter(gradients, reduced)
        return reduced

    def _scatter(self, gradients: TaskGradients, reduced: TaskGradients) -> None:
        waiting = []
        for bucket in self._buckets:
            if bucket.width:
                shard = bucket.shard()
                parts = bucket.pack(gradients.rows, self._shares)
                waiting.append((bucket, shard, self._wire.start_reduce_scatter(shard, parts)))
            if len(waiting) > 1:
                self._deliver(*waiting.pop(0), reduced)
        for item in waiting:
            self._deliver(*item, reduced)
        for bucket in self._buckets:
            if not bucket.width:
                self._deliver(bucket, bucket.shard(), None, reduced)

    def _deliver(self, bucket: Bucket, shard: Tensor, work: object, reduced: TaskGradients) -> None:
        if work is not None:
            work.wait()  # type: ignore[attr-defined]
        for p, place in bucket.of_rank(self._wire.rank):
            reduced.rows[p].add_block(bucket.tasks[p], shard[:, place].contiguous(), owned=True)

    def _scale(self, rows: Rows, into: Rows, parameter: Tensor, tasks: Sequence[int]) -> None:
        """This rank's rows times its shares; zero for tasks that only others have."""
        own = rows.of
        for task in tasks:
            row = own.get(task)
            into.add(task, flat(torch.zeros_like(parameter) if row is None else row * self._shares[task]))
        rows.clear()

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        *grams, losses = tensors
        if self._result:  # the mean over the ranks, of gradients that are as long as the whole one where all are alike
            grams = [gram * self.size for gram in grams]
        together = self._wire.sum(torch.cat([tensor.reshape(-1) for tensor in (*grams, losses)]))
        pieces = torch.split(together, [tensor.numel() for tensor in tensors])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]

    def gather(self, combined: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        bucket_of = {p: bucket for bucket in self._buckets for p in bucket.places}
        missing = {bucket: set(bucket.places) for bucket in self._buckets}
        parts: dict[int, Tensor] = {}
        started: list[tuple[Bucket, Tensor, object]] = []
        for p, part in combined:
            if p not in bucket_of:
                yield p, part
                continue
            bucket = bucket_of[p]
            parts[p] = part
            missing[bucket].discard(p)
            if not missing[bucket]:
                started.append((bucket, *self._start(bucket, [parts.pop(q) for q in bucket.places])))
            if len(started) > 1:
                yield from self._finish(*started.pop(0))
        for item in started:
            yield from self._finish(*item)

    def _start(self, bucket: Bucket, parts: Sequence[Tensor]) -> tuple[Tensor, object]:
        part = torch.cat([flat(part) for part in parts])
        if self._result:
            return part, self._wire.start_sum(part)
        if not bucket.width:
            return part, None
        shard = part.new_zeros(bucket.width)
        shard[: len(part)] = part
        whole = part.new_empty(self.size * bucket.width)
        return whole, self._wire.start_all_gather(whole, shard)

    def _finish(self, bucket: Bucket, whole: Tensor, work: object) -> Iterator[tuple[int, Tensor]]:
        if work is not None:
            work.wait()  # type: ignore[attr-defined]
        yield from bucket.whole(whole, self._surgery.gradients.parameters)

    def union(self, places: list[tuple[int, str]]) -> list[tuple[int, str]]:
        names = self._surgery.gradients.names
        index = {name: p for p, name in enumerate(names)}
        found = torch.zeros(len(names), len(self._there), dtype=torch.uint8)
        for task, name in places:
            found[index[name], task] = 1
        return [(task, names[p]) for p, task in self._wire.host_max(found).nonzero().tolist()]

    # --- Looking for differences --------------------------------------------------------------------------------------

    def check(self, state: State) -> None:
        if not self._check:
            return
        surgery = self._surgery
        gradients = [(name, p) for name, p in zip(surgery.gradients.names, surgery.gradients.parameters, strict=True)]
        self._agreement.compare(
            {
                "rule's state": leaves(state),
                "random generator": leaves({"state": surgery.generator.get_state()}),
                "parameters' values": leaves(dict(gradients)),
                "gradients": leaves({name: p.grad for name, p in gradients}),
                "loss scale": leaves({"scale": surgery.scale}),
            }
        )
