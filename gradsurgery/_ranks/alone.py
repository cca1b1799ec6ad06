"""The contract, and one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .._counts import Counts
from .._gradients import TaskGradients
from .._rule import State

if TYPE_CHECKING:
    from .._surgery import Surgery


class Meeting(NamedTuple):
    """What is known of a backward pass of all ranks before it starts.

    Attributes:
        losses: ``[K]``, the tasks' losses; zero for absent ones.
        present: ``[K]``, the tasks that are there.
        shares: ``[K]``, how much this rank's losses count in them; None where that is all, or is settled afterwards.
    """

    losses: Tensor
    present: Tensor
    shares: Tensor | None


class Ranks:
    """The processes that train one model together: here, this one alone.

    Every method is called by all ranks alike, in the same order, except that a rank may have fewer backward passes than
    another, or none.

    Attributes:
        size: how many there are.
        why_not_streaming: the reason why surgery has to wait for the end of the backward pass; empty if it need not.
    """

    size = 1
    why_not_streaming = ""

    def join(self, surgery: Surgery) -> None:
        """Says whose step it is. Called once."""

    def meet(self, losses: Tensor, present: Tensor, counts: Counts, *, ahead: bool) -> Meeting:
        """Ahead of a backward pass.

        Args:
            losses: ``[K]``, of this rank.
            present: ``[K]``, the tasks that are there on this rank.
            counts: of this rank's samples.
            ahead: whether the shares have to be known before the pass.
        """
        return Meeting(losses, present, None)

    def settle(self, due: bool) -> bool:
        """After the last backward pass of a step: whether any rank has gradients, given whether this one has."""
        return due

    def reopen(self) -> None:
        """The step is over."""

    def forget(self) -> None:
        """Forgets everything about the step that is under way."""

    def renew(self) -> None:
        """The tasks, the parameters or the state have been replaced."""

    def own(self, losses: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part ``[K]`` of the tasks' losses, and which tasks any rank has, given this rank's."""
        return losses, present

    def reduce(self, gradients: TaskGradients) -> TaskGradients:
        """The rows of all ranks: those that this rank multiplies and combines."""
        return gradients

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the ranks of what each computed from its rows."""
        return list(tensors)

    def gather(self, combined: Iterable[tuple[int, Tensor]]) -> Iterable[tuple[int, Tensor]]:
        """Whole combined gradients, by parameter, from what each rank made of its rows."""
        return combined

    def union(self, places: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """Pairs of a task and a parameter that any rank found."""
        return places

    def check(self, state: State) -> None:
        """Compares what has to be equal on all ranks after a step, if that was asked for."""
