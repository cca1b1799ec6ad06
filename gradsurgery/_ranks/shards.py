"""Processes that each hold a part of the model's parameters: FSDP2, tensor parallelism, and what is composed of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from .._buffer import Rows
from .._counts import Counts
from .._gradients import TaskGradients
from .._rule import State
from .agreement import digest, leaves
from .alone import Meeting, Outlook
from .replicas import PASS, Facts, Replicas

if TYPE_CHECKING:
    from .._surgery import Surgery


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
        fsdp: whether FSDP2 is among what divides them.
        check: compare states and random generators after each step.
    """

    def __init__(self, group: dist.ProcessGroup, *, fsdp: bool, check: bool = False) -> None:
        super().__init__(group, check=check)
        self.divisor = self.size  # FSDP2 takes means, and a tensor-parallel group counts its samples once for each rank
        self._fsdp = fsdp
        self.why_not_streaming = "parameters are sharded: rows are complete at the end of a backward pass"
        self.why_not_split = (
            "parameters are sharded over several processes, and the single pass needs whole ones. Call backward() with one "
            "loss for each task"
        )

    def join(self, surgery: Surgery) -> None:
        super().join(surgery)
        self._prepare()

    def renew(self) -> None:
        super().renew()
        self._prepare()

    def _prepare(self) -> None:
        gradients = self._surgery.gradients
        self._counted = False
        if not all(isinstance(rows, LocalRows) for rows in gradients.rows):
            gradients.rows = [LocalRows(parameter) for parameter in gradients.parameters]

    def meet(
        self, losses: Tensor, present: Tensor, counts: Counts, *, ahead: bool, outlook: Outlook | None = None
    ) -> Meeting:
        if self._fsdp:
            table = self._meet(Facts(PASS, 0, digest({"tasks": str(present.tolist())})))
            if len(set(table)) > 1:
                self._wait(table)
        return super().meet(losses, present, counts, ahead=True)

    def _wait(self, table: Sequence[Facts]) -> None:
        if not self._fsdp:
            return super()._wait(table)
        raise ValueError(
            "The ranks bring different tasks, or one of them has no more backward passes in this step. FSDP2 exchanges "
            "gradients in each backward pass, so that every rank needs the same tasks. Where a rank has no samples of one, "
            "pass a loss of zero that depends on the model, and samples={...: 0} for it."
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
