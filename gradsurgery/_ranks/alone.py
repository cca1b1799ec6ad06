"""The contract, and one process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from .._counts import Counts
from .._gradients import TaskGradients
from .._reuse import Reuse
from .._rule import State

if TYPE_CHECKING:
    from ..sources._split import Pass
    from .rounds import Round
    from .unsharded import Inflow


class Meeting(NamedTuple):
    """What is known of a backward pass of all ranks before it starts.

    Attributes:
        losses: ``[K]``, the tasks' losses; zero for absent ones.
        present: ``[K]``, the tasks that are there.
        shares: ``[K]``, how much this rank's losses count in them; None where that is all, or is settled afterwards.
        streams: whether surgery happens inside the pass.
    """

    losses: Tensor
    present: Tensor
    shares: Tensor | None
    streams: bool = False


class Outlook(NamedTuple):
    """What this rank knows of a single pass before it runs.

    Attributes:
        streams: whether surgery could happen inside it, as far as this rank is concerned.
        verify: whether a plain backward pass will follow, to compare with.
        look: returns for each parameter the tasks that will reach it, and the order in which parameters will be complete.
    """

    streams: bool
    verify: bool
    look: Callable[[], tuple[Sequence[Collection[int]], Sequence[int]]]


class Member(Protocol):
    """What a rank's surgery has to show to the others: all that has to be equal, and what its steps depend on.

    Attributes:
        gradients: its rows.
        tasks: names of the tasks; None until they are known.
        generator: that random rules draw from.
        scale: of the losses, by a GradScaler.
        nonfinite: what becomes of gradients that are not finite.
        reuse: when there is surgery.
        given: the rule.
        source: what computes the rows.
        per_task: zeros, one for each task.
        weighs_ahead: whether losses are weighed ahead of the backward pass.
    """

    gradients: TaskGradients
    tasks: tuple[str, ...] | None
    generator: torch.Generator
    scale: Tensor | None
    nonfinite: str
    reuse: Reuse

    @property
    def given(self) -> object: ...

    @property
    def source(self) -> object: ...

    @property
    def per_task(self) -> Tensor: ...

    @property
    def weighs_ahead(self) -> bool: ...

    def why_not_streaming(self) -> str:
        """The reason; empty if surgery can happen inside the backward pass."""
        ...

    def set_tasks(self, tasks: Iterable[str]) -> None:
        """Makes the tasks' names known."""
        ...

    def weigh(self, meeting: Meeting) -> None:
        """Weighs losses ahead of a backward pass."""
        ...


class Ranks:
    """The processes that train one model together: here, this one alone.

    Every method is called by all ranks alike, in the same order, except that a rank may have fewer backward passes than
    another, or none.

    Attributes:
        size: how many there are.
        divisor: by how much gradients are too small when a backward pass is over, since means were taken in it.
        why_not_streaming: the reason why surgery has to wait for the end of the backward pass; empty if it need not.
        why_not_split: the reason why mixed batches cannot be split; empty if they can.
        parts: in which parts rows travel in this step, one after the other: of each, the parameters, which make up whole
            surgery groups. None if they travel all at once, or not at all.
        order: names of the surgery groups, in the order in which their rows travel; empty while it is not known.
    """

    size = 1
    divisor = 1
    why_not_streaming = ""
    why_not_split = ""
    parts: Sequence[Sequence[int]] | None = None
    order: Sequence[str] = ()

    def join(self, surgery: Member) -> None:
        """Says whose step it is. Called once."""

    def meet(
        self, losses: Tensor, present: Tensor, counts: Counts, *, ahead: bool, outlook: Outlook | None = None
    ) -> Meeting:
        """Ahead of a backward pass.

        Args:
            losses: ``[K]``, of this rank.
            present: ``[K]``, the tasks that are there on this rank.
            counts: of this rank's samples.
            ahead: whether the shares have to be known before the pass.
            outlook: what is known of a single pass.
        """
        return Meeting(losses, present, None, outlook is not None and outlook.streams)

    def refuse(self) -> None:
        """This rank cannot go on, since it has another backward pass after surgery: the others are not to wait for it."""

    def confirm(self, error: Exception | None) -> None:
        """At the end of surgery on one part of the parameters after the other, inside a backward pass or after it.

        Args:
            error: what went wrong on this rank, which kept up with the others nevertheless.

        Raises:
            Exception: that, if there is one; and if there is one on another rank.
        """

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

    def inflow(self, trained: Sequence[int]) -> Inflow | None:
        """Where the rows of a single pass go first; None if that is where they belong."""
        return None

    def run(self, single: Pass, inflow: Inflow, seeds: Tensor, *, retain_graph: bool) -> None:
        """Runs a single pass whose rows go there."""
        raise NotImplementedError

    def plain(
        self, losses: Tensor, seeds: Tensor, parameters: Sequence[Tensor], *, retain_graph: bool
    ) -> Sequence[Tensor | None]:
        """Gradients of a plain backward pass, to compare with."""
        return torch.autograd.grad([losses], parameters, [seeds], retain_graph=retain_graph, allow_unused=True)

    def together(self, error: Exception | None) -> None:
        """Raises on all ranks what went wrong on one, if their next steps depend on each other."""
        if error is not None:
            raise error

    def reduce(self, gradients: TaskGradients) -> TaskGradients:
        """The rows of all ranks: those that this rank multiplies and combines."""
        return gradients

    def travel(self, gradients: TaskGradients, parameters: Sequence[int]) -> Round:
        """Sends the rows of one of the :attr:`parts` on their way."""
        raise NotImplementedError

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
