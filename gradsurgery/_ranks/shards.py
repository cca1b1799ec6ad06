"""Processes that each hold a part of the model's parameters: FSDP2, tensor parallelism, and what is composed of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from .._buffer import Rows
from .._counts import Counts
from .._gradients import TaskGradients
from .._rule import State
from ..sources._backward import plainly
from .agreement import digest, leaves
from .alone import Meeting, Member, Outlook
from .buckets import parted
from .lockstep import Lockstep
from .reach import digest_of, promised
from .replicas import PASS, PREPARE, Facts, Replicas, unforeseen
from .unsharded import Inflow, Whole, adding_up, why_not_whole

if TYPE_CHECKING:
    from ..sources._split import Pass


class LocalRows(Rows):
    """This rank's part of the rows of a parameter. Of parts that several ranks hold, one counts the products.

    Args:
        parameter: whose.
    """

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self._placements = parameter.placements if isinstance(parameter, DTensor) else None
        self.counts = True

    def add(self, task: int, gradient: Tensor, *, dense: bool = False) -> None:
        if isinstance(gradient, DTensor):
            gradient = gradient.redistribute(placements=self._placements).to_local()
        super().add(task, gradient, dense=dense)

    def products(self, dtype: object) -> list[Tensor]:
        return super().products(dtype) if self.counts else []  # type: ignore[arg-type]


class Shards(Replicas):
    """Rows stay where their parameters are; inner products are those of the parts, summed over all ranks.

    What FSDP2 adds up over its ranks, it adds up in the backward pass, one task after the other. So every rank has to bring
    the same tasks. Ranks that are no data-parallel ones, but hold parts of the same samples' work, count these alike.

    Args:
        group: all processes that hold a part of the model.
        model: the model.
        fsdp: whether FSDP2 is among what divides them.
        check: compare states and random generators after each step.
    """

    def __init__(self, group: dist.ProcessGroup, *, model: nn.Module, fsdp: bool, check: bool = False) -> None:
        super().__init__(group, check=check)
        self._model = model
        self._whole: Whole | None = None
        self.divisor = self.size  # FSDP2 takes means, and a tensor-parallel group counts its samples once for each rank
        self._fsdp = fsdp
        self.why_not_streaming = "parameters are sharded: rows are complete at the end of a backward pass"

    def join(self, surgery: Member) -> None:
        super().join(surgery)
        self._prepare()

    def renew(self) -> None:
        super().renew()
        self._prepare()

    def _prepare(self) -> None:
        gradients = self._surgery.gradients
        self._counted, self._whole = False, None
        named = {n: p for n, p in zip(gradients.names, gradients.parameters, strict=True) if p.requires_grad}
        why = why_not_whole(named, self._wire.names) if self._fsdp else "the single pass needs whole parameters"
        self.why_not_split = why and f"parameters are sharded, and {why}. Call backward() with one loss for each task"
        if not all(isinstance(rows, LocalRows) for rows in gradients.rows):
            gradients.rows = [LocalRows(parameter) for parameter in gradients.parameters]

    def meet(
        self, losses: Tensor, present: Tensor, counts: Counts, *, ahead: bool, outlook: Outlook | None = None
    ) -> Meeting:
        if outlook is not None:
            return self._meet_mixed(losses, counts, outlook)
        if self._fsdp:
            self._settled = False
            self._kinds.add(counts.kind)
            table = self._meet(Facts(PASS, self._kind_bits, digest({"tasks": str(present.tolist())})))
            if len(set(table)) > 1:
                self._wait(table)
        return super().meet(losses, present, counts, ahead=True)

    def _meet_mixed(self, losses: Tensor, counts: Counts, outlook: Outlook) -> Meeting:
        self._settled = False
        self._kinds.add(counts.kind)
        reach, order = outlook.look()
        self._told = promised(reach, len(losses))
        facts = Facts(PASS, self._kind_bits, digest_of(self._told), int(outlook.verify), self._order_digest)
        table = self._meet(facts)
        if any(theirs.doing != PASS for theirs in table):
            self._wait(table)
        self._check_kinds(table)
        if len({theirs.streams for theirs in table}) > 1:
            raise ValueError("The ranks disagree about the settings: `verify` is True on some, and False on others.")
        gradients = self._surgery.gradients
        self._reaches.learn(tuple(theirs.reach for theirs in table), self._told)
        if len({theirs.order for theirs in table}) > 1 or not table[0].order:
            ours = self.order or [gradients.names[p] for p in order]
            self.order = self._wire.gather_objects(list(ours))[0]
        index = {name: p for p, name in enumerate(gradients.names)}
        one_by_one = dict.fromkeys([*(index[n] for n in self.order if n in index), *reversed(index.values())])
        self._parts = parted([[p] for p in one_by_one], self._reaches.tasks, gradients.parameters)
        return self._pass(losses, counts)

    def inflow(self, trained: Sequence[int]) -> Inflow | None:
        if self._whole is None:
            table = self._meet(Facts(PREPARE, self._kind_bits))  # is everyone here? What follows would wait for ever
            if any(theirs.doing != PREPARE for theirs in table):
                self._wait(table)
            self._whole = Whole(self._model, self._surgery.gradients.names, self._wire)
        return Inflow(self._whole, self._surgery.gradients, trained)

    def run(self, single: Pass, inflow: Inflow, seeds: Tensor, *, retain_graph: bool) -> None:
        assert self._whole is not None
        stages = partial(inflow.stages, reach=self._reaches.tasks, told=self._told)
        rows = Lockstep(stages, self._parts, [inflow.trained[i] for i in single.reached])
        names = self._surgery.gradients.names
        with self._whole.held([names[inflow.trained[i]] for i in single.late]):
            single.run(seeds, retain_graph=retain_graph, complete=lambda i: rows.complete(inflow.trained[i]))
        rows.finish()
        inflow.finish()
        remedy = "Call backward() with one loss for each task."
        self._raise_together(unforeseen(inflow.odd, remedy) if inflow.odd else None)

    def plain(
        self, losses: Tensor, seeds: Tensor, parameters: Sequence[Tensor], *, retain_graph: bool
    ) -> Sequence[Tensor | None]:
        if not self._fsdp:
            return super().plain(losses, seeds, parameters, retain_graph=retain_graph)
        with plainly(parameters), adding_up(self._model):
            torch.autograd.backward([losses], [seeds], retain_graph=retain_graph)
            found = [parameter.grad for parameter in parameters]
        return [g.to_local() * self.divisor if isinstance(g, DTensor) else g for g in found]

    def together(self, error: Exception | None) -> None:
        self._raise_together(error)

    def _wait(self, table: Sequence[Facts]) -> None:
        if not self._fsdp:
            return super()._wait(table)
        self._check_kinds(table)
        raise ValueError(
            "The ranks bring different tasks, or one of them has no more backward passes in this step, or no split(). "
            "FSDP2 exchanges gradients in each backward pass, so that every rank needs the same tasks. Where a rank has no "
            "samples of one, pass a loss of zero that depends on the model, and samples={...: 0} for it. After split(), "
            "tasks may differ, but every rank needs as many backward passes."
        )

    def reduce(self, gradients: TaskGradients) -> TaskGradients:
        if not self._counted:
            pieces = self._wire.gather_objects([_piece(parameter) for parameter in gradients.parameters])
            for p, rows in enumerate(gradients.rows):
                first = next(rank for rank, theirs in enumerate(pieces) if theirs[p] == pieces[self._wire.rank][p])
                if isinstance(rows, LocalRows):
                    rows.counts = first == self._wire.rank
            self._counted = True
        return gradients

    def gather(self, combined: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        for p, part in combined:
            parameter = self._surgery.gradients.parameters[p]
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                shape, stride = parameter.shape, parameter.stride()
                part = DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
            yield p, part

    def check(self, state: State) -> None:
        if self._check:
            generator = self._surgery.generator.get_state()
            self._agreement.compare({"rule's state": leaves(state), "random generator": leaves({"state": generator})})


def _piece(parameter: Tensor) -> Sequence[int]:
    """Which part of the parameter this rank holds: its coordinates, in those dimensions of the mesh that divide it."""
    if not isinstance(parameter, DTensor):
        return ()
    place: Sequence[int] = parameter.device_mesh.get_coordinate() or ()
    return tuple(x for x, how in zip(place, parameter.placements, strict=True) if not isinstance(how, Replicate))
