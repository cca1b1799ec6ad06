"""Data-parallel processes: each holds the whole model, and computes gradients from samples of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .._counts import Counts
from .._gradients import TaskGradients
from .._rule import State
from .agreement import Agreement, digest, leaves
from .alone import Meeting, Member, Outlook, Ranks
from .reach import Mask, Reaches, broken, digest_of, mask_of, promised, staying_sparse
from .rounds import Round
from .sections import VOLATILE, sections
from .sparse import Exchange
from .wire import Wire

PASS, PREPARE, _COMBINE, _REFUSE = range(4)
_KINDS = ("given", "alike", "mixed", "sum")
_COUNTED = 0b1100  # the kinds that are known ahead of a pass


class Facts(NamedTuple):
    """What a rank tells the others at a meeting.

    Attributes:
        doing: what it is about to do.
        kinds: the kinds of losses that it had in this step, a bit mask.
        reach: a digest of the tasks that reached each parameter.
        streams: whether rows could travel in parts.
        order: a digest of the order in which they would; 0 if it is not known.
    """

    doing: int
    kinds: int
    reach: int = 0
    streams: int = 0
    order: int = 0


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

    def __init__(self, group: dist.ProcessGroup, *, result: bool = False, check: bool = False) -> None:
        self._wire = Wire(group)
        self.size = self._wire.size
        self._result = result
        self._check = check
        self._settled = False
        self._reaches = Reaches(self._wire)

    def join(self, surgery: Member) -> None:
        self._surgery = surgery
        compared = sections(surgery, result=self._result, whole=self.divisor == 1)
        self._agreement = Agreement(self._wire, compared, VOLATILE, self._adopt)
        self._seen: Sequence[str] = ()  # the order in which this rank's groups were complete
        self._loose: set[int] = set()  # parameters whose rows were sparse in some step, on all ranks
        self.forget()

    def _adopt(self, section: str, description: object) -> None:
        if section == "tasks" and isinstance(description, dict):
            self._surgery.set_tasks(list(description))

    def renew(self) -> None:
        self._agreement.renew()
        self._reaches.forget()
        self.order, self._seen, self._loose = (), (), set()

    def forget(self) -> None:
        self._kinds: set[str] = set()
        self._counts: list[float] | None = None  # of this rank's passes, whose shares are settled afterwards
        self._passes: list[int] = []  # for each task, how many meetings it has been at,
        self._own_passes: list[int] = []  # and with losses of this rank
        self._there: list[bool] = []
        self._shares: list[float] = []
        self._promised: Mask | None = None  # what was known ahead of the passes
        self._streams = False
        self._surprise = ""
        self.parts = None

    def reopen(self) -> None:
        self._settled = False

    # --- Ahead of a backward pass -------------------------------------------------------------------------------------

    def meet(
        self, losses: Tensor, present: Tensor, counts: Counts, *, ahead: bool, outlook: Outlook | None = None
    ) -> Meeting:
        self._settled = False
        self._kinds.add(counts.kind)
        if not (ahead or counts.kind in ("mixed", "sum")):
            old = self._counts or [0.0] * len(counts.of)
            self._counts = [a + b for a, b in zip(old, counts.of, strict=True)]
            return Meeting(losses, present, None)
        facts, mask = Facts(PASS, self._kind_bits), None
        if outlook is not None:
            promise = self._look(outlook)
            self._promised = promise if self._promised is None else self._promised | promise
            if outlook.streams and not staying_sparse(rows := self._mask()):
                mask = rows | promise
                facts = facts._replace(reach=digest_of(mask), streams=1, order=self._order_digest)
        return self._enter(self._meet(facts), losses, counts, mask)

    def _meet(self, facts: Facts) -> list[Facts]:
        table = [Facts(*row) for row in self._agreement.meet(*facts)]
        for rank, theirs in zip(self._wire.names, table, strict=True):
            if theirs.doing == _REFUSE != facts.doing:
                raise RuntimeError(
                    f"Rank {rank} called backward() once more in a step whose surgery was done already, on all ranks. Its "
                    "own message says what to do."
                )
        return table

    def refuse(self) -> None:
        self._meet(Facts(_REFUSE, 0))

    def _enter(self, table: Sequence[Facts], losses: Tensor, counts: Counts | None, mask: Mask | None = None) -> Meeting:
        """Begins a pass of some ranks; this one may have none. Where all are ready, rows travel inside of it."""
        self._check_kinds(table)
        meeting = self._pass(losses, counts)
        self._streams = all(theirs.streams for theirs in table)
        if self._streams:
            self._settled = True
            self._shares = [1.0] * len(losses)
            self._agreed = self._mask() if mask is None else mask
            self._reaches.learn(tuple(theirs.reach for theirs in table), self._agreed)
            self._part(table)
        return meeting._replace(streams=self._streams)

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
    def _check_kinds(table: Sequence[Facts]) -> int:
        bits = 0
        for theirs in table:
            bits |= theirs.kinds
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
        self._notice(mask)
        able = not self._surgery.why_not_streaming() and not self._surgery.reuse.rests and not staying_sparse(mask)
        facts = Facts(_COMBINE, self._kind_bits, digest_of(mask), int(able), self._order_digest)
        table = self._meet(facts)
        while any(theirs.doing != _COMBINE for theirs in table):
            self._wait(table)
            if self._streams:
                return True
            table = self._meet(facts)
        self._settled = True
        kinds = self._check_kinds(table)
        if not kinds:
            return False
        count = len(self._surgery.per_task)
        if any(self._there):
            self._shares = [1.0] * count
        else:
            own = self._counts or [0.0] * count
            totals = self._wire.host_sum(own)
            self._there = [total > 0 for total in totals]
            self._shares = [n / total if total else 0.0 for n, total in zip(own, totals, strict=True)]
        mask = self._mask()  # this rank may have learnt the tasks by now
        self._reaches.learn(tuple(theirs.reach for theirs in table), mask)
        self._loose.update(self._reaches.sparse())
        if kinds & _COUNTED and all(theirs.streams for theirs in table):
            self._part(table)
        return True

    def _wait(self, table: Sequence[Facts]) -> None:
        """Takes part in another pass of others, without losses."""
        meeting = self._enter(table, self._surgery.per_task, None)
        if self._surgery.weighs_ahead:
            self._surgery.weigh(meeting)

    def _mask(self) -> Mask:
        return mask_of(self._surgery.gradients.rows, len(self._surgery.tasks or ()))

    def _look(self, outlook: Outlook) -> Mask:
        """Which rows a pass will have; and the order in which it will complete surgery groups."""
        gradients = self._surgery.gradients
        reach, complete = outlook.look()
        if not self._seen:
            names = list(gradients.groups)
            self._seen = list(dict.fromkeys(names[gradients.group_of[p]] for p in reversed(complete)))[::-1]
        return promised(reach, len(self._surgery.per_task))

    def _notice(self, mask: Mask) -> None:
        """Compares the rows of a step with what was known ahead of its passes."""
        if self._promised is None or self.why_not_streaming:
            return
        names = self._surgery.gradients.names
        if sparse := staying_sparse(mask):
            self.why_not_streaming = (
                f"gradients of {names[sparse[0]]!r} are sparse: how much is to be sent shows at the end of a backward pass"
            )
        elif len(odd := np.flatnonzero((self._promised[:, :-2] != mask[:, :-2]).any(1))):
            self.why_not_streaming = f"which tasks reach {names[odd[0]]!r} shows at the end of a backward pass only"

    @property
    def _order_digest(self) -> int:
        return digest(dict.fromkeys(self.order, "")) if self.order else 0

    def _part(self, table: Sequence[Facts]) -> None:
        """Settles in which parts rows travel, the same on all ranks whatever is complete first on each of them."""
        if len({theirs.order for theirs in table}) > 1 or not table[0].order:
            found = self._wire.gather_objects((list(self.order), list(self._seen)))
            self.order = next((order for orders in zip(*found, strict=True) for order in orders if order), ())
        self.parts = self._reaches.parts(self.order, self._surgery.gradients, self._loose)

    def own(self, losses: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        # Where the shares were known ahead, they are in the losses.
        shares = torch.tensor(self._shares, dtype=torch.float64).to(losses)
        return losses * shares, torch.tensor(self._there, device=present.device)

    # --- Rows ---------------------------------------------------------------------------------------------------------

    def reduce(self, gradients: TaskGradients) -> TaskGradients:
        reached = [p for p, tasks in enumerate(self._reaches.tasks) if tasks]
        self._round = self._new_round(gradients, reached, self._reaches.layouts(reached))
        self._round.start(1)
        return self._round.rows()

    def gather(self, combined: Iterable[tuple[int, Tensor]]) -> Iterable[tuple[int, Tensor]]:
        return self._round.gather(combined)

    def travel(self, gradients: TaskGradients, parameters: Sequence[int]) -> Round:
        layouts = self._reaches.layouts(parameters)
        if self._streams:
            for p in parameters:
                self._check_promise(p)
            layouts = dict.fromkeys(parameters, (True, True))
            if loose := [p for p in parameters if p in self._loose]:
                mask = self._wire.host_max(torch.from_numpy(self._mask()[loose, -2:]))
                known = zip(loose, mask.bool().tolist(), strict=True)
                layouts.update((p, (dense or not to_be, to_be)) for p, (dense, to_be) in known)
        found = self._new_round(gradients, parameters, layouts)
        found.start()
        return found

    def _new_round(
        self, gradients: TaskGradients, parameters: Sequence[int], layouts: Mapping[int, tuple[bool, bool]]
    ) -> Round:
        """What takes these parameters' rows to the others: sparse ones here and now, where that is less."""
        reach = self._reaches.tasks
        dense = {p: reach[p] for p in parameters if layouts[p][0]}
        exchanged = {}
        if sparse := [p for p in parameters if p not in dense]:
            exchange = Exchange(self._wire, [gradients.rows[p] for p in sparse], self._shares)
            factor = float(self._wire.rank == 0) / (self.size if self._result else 1)
            for i, p in enumerate(sparse):
                parameter, tasks, to_be_dense = gradients.parameters[p], reach[p], layouts[p][1]
                if to_be_dense and exchange.is_larger(i, parameter, tasks):
                    dense[p] = tasks
                else:
                    exchanged[p] = exchange.rows(i, parameter, tasks, to_be_dense, factor)
                    gradients.rows[p].clear()
        buckets = self._reaches.buckets(dense, gradients)
        return Round(self._wire, gradients, buckets, self._shares, exchanged, result=self._result)

    def _check_promise(self, p: int) -> None:
        if self._streams and broken(self._surgery.gradients.rows[p], self._agreed, p):
            self._surprise = self._surprise or self._surgery.gradients.names[p]

    def confirm(self, error: Exception | None) -> None:
        if not self._streams:
            if error is not None:  # of the rule, say: all ranks see the same
                raise error
            return
        left = [p for p, rows in enumerate(self._surgery.gradients.rows) if rows.tasks]
        if error is None and (left or self._surprise):
            name = self._surprise or self._surgery.gradients.names[left[0]]
            error = unforeseen(name, "Make the optimizers of all ranks with stream=False.")
        self._raise_together(error)

    def _raise_together(self, error: Exception | None) -> None:
        if any(failed for (failed,) in self._wire.gather_numbers([error is not None])):
            texts = self._wire.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
            if error is not None:
                raise error
            rank, text = next((r, text) for r, text in zip(self._wire.names, texts, strict=True) if text is not None)
            raise RuntimeError(
                f"Rank {rank} failed in the backward pass of this step, in which rows travel. Gradients and state are what "
                f"they were before it, on all ranks. Its error: {text}"
            )

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        *grams, losses, overflows = tensors
        if self._result:  # the mean over the ranks, of gradients that are as long as the whole one where all are alike
            grams = [gram * self.size for gram in grams]
        together = self._wire.sum(torch.cat([tensor.reshape(-1) for tensor in (*grams, losses, overflows)]))
        pieces = torch.split(together, [tensor.numel() for tensor in tensors])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]

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


def unforeseen(name: str, remedy: str) -> RuntimeError:
    """The error for rows that are not those that had been told to the other ranks."""
    return RuntimeError(
        f"The gradients of {name!r} in this single pass are of other tasks, or of another layout, than had been known "
        f"ahead of it, and told to the other ranks. {remedy}"
    )
