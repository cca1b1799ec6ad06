"""One combination of per-task gradients: Gram matrices, the rule, and the combined gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._coordinates import CoordinateRule, Coordinates
from ._gradients import TaskGradients
from ._plan import Level, Plan
from ._ranks import Ranks
from ._rule import Rule, State, implements
from ._state import guarded
from ._step import Step


class Combination:
    """Lets a rule operate on rows, adds the results to ``p.grad``, and frees the rows: all at once, or bit by bit.

    Bit by bit gives the same: a rule treats each surgery group by itself, and for each bit it sees the Gram matrices of all
    groups, with the others inactive, and the same random numbers.

    Args:
        gradients: the rows.
        rule: what operates on them.
        tasks: names of the tasks.
        state: the rule's.
        generator: that the rule draws from.
        scale: of the losses, or None: rules see gradients without it.
        losses: of the step, ``[K]``: this rank's part of them; zero for tasks that are not there.
        present: ``[K]``, the tasks that are there, on any rank.
        ranks: who else has rows.
        coordinates: what makes one gradient of those that the rule has mixed; None for their sum. Gram matrices are then
            computed only if the rule needs them.
        undoable: whether :meth:`undo` may be called. It takes a copy of each ``p.grad`` that is there.

    Attributes:
        loss_weights: ``[K]``, what the rule weighs the losses with; None if it does not.
        measured: whether there are Gram matrices.
    """

    def __init__(
        self,
        gradients: TaskGradients,
        rule: Rule,
        tasks: tuple[str, ...],
        state: State,
        generator: torch.Generator,
        scale: Tensor | None,
        losses: Tensor,
        present: Tensor,
        ranks: Ranks,
        coordinates: CoordinateRule | None = None,
        *,
        undoable: bool = False,
    ) -> None:
        self._gradients = gradients
        self._rule = rule
        self._tasks = tasks
        self._before = self._state = state
        self._generator = generator
        self._start = generator.get_state()
        self._scale = scale
        self._losses = losses
        self._present = present
        self._ranks = ranks
        self._coordinates = None if coordinates is None else Coordinates(coordinates, tasks, generator, scale)
        self._draws = coordinates is not None and coordinates.random
        self.measured = coordinates is None or implements(rule, "mix") or implements(rule, "observe")
        self._undoable = undoable
        self._summed = False  # whether the losses are those of all ranks
        self._old: dict[int, Tensor | None] = {}
        self._random: list[Tensor] = []  # the generator's state ahead of each level, and after the last
        self._finite: list[Tensor] = []
        self._done: list[tuple[int, Level, Tensor, Tensor]] = []  # depth, level, Gram and mixing matrices
        self.loss_weights: Tensor | None = None

    @torch.no_grad()
    def add(self, parameters: Sequence[int] | None = None) -> None:
        """Combines the rows of these parameters, which make up whole surgery groups; of all, by default."""
        gradients = self._gradients
        gradients.align(parameters)
        plan = gradients.plan(self._tasks, parameters)
        for p, combined in self._ranks.gather(self._combined(gradients, plan)):
            self._accumulate(p, combined)

    @torch.no_grad()
    def stages(self, parameters: Sequence[int]) -> Iterator[None]:
        """As :meth:`add`, of rows that have to be added up over the ranks, with time for other work while they travel: once
        before the sums are there, and once before the combined gradients are."""
        journey = self._ranks.travel(self._gradients, parameters)
        yield
        gradients = journey.rows()
        journey.start_back(self._combined(gradients, gradients.plan(self._tasks, parameters)))
        yield
        for p, combined in journey.arrive():
            self._accumulate(p, combined)

    def _combined(self, gradients: TaskGradients, plan: Plan) -> Iterator[tuple[int, Tensor]]:
        grams = [level.gram(gradients.rows, gradients.dtype) for level in plan.levels] if self.measured else []
        unseen = list(plan.alone) if self._before else []
        if self._before and not self.measured:
            unseen += [p for level in plan.levels for cell in level.cells for p in cell.parameters]
        rows = [gradients.rows[p] for p in unseen]
        overflown = [~own.finite(task).to(gradients.device) for own in rows for task in own.tasks]
        overflows = self._losses.new_zeros(())
        if overflown:
            overflows += torch.stack(overflown).sum()
        losses = self._losses[:0] if self._summed else self._losses
        *grams, losses, overflows = self._ranks.sum([*grams, losses, overflows])
        if not self._summed:
            self._losses, self._summed = losses, True
        if overflown:
            self._finite.append(overflows == 0)
        self._weigh()
        for depth, level in enumerate(plan.levels):
            mixing = self._mixing(depth, level, grams[depth]) if self.measured else None
            if self._coordinates is not None:
                yield from level.operate(gradients.rows, self._coordinates, self._weighted(mixing))
                continue
            assert mixing is not None
            coefficients = (mixing * level.active[:, :, None]).sum(-2)
            if self.loss_weights is not None:
                coefficients = coefficients * self.loss_weights
            yield from level.combine(gradients.rows, coefficients)
        for p in plan.alone:
            own = gradients.rows[p]
            yield p, own.alone() if self.loss_weights is None else own.combine(self.loss_weights[own.tasks[0], None])
            own.clear()

    def _mixing(self, depth: int, level: Level, gram: Tensor) -> Tensor:
        if self._scale is not None:
            gram = gram / self._scale.to(gram) ** 2
        if self.loss_weights is not None:
            gram = gram * self.loss_weights[:, None] * self.loss_weights
        mixing = self._mix(depth, gram, None if level.full else level.active)
        self._finite.append(gram.isfinite().all())
        self._done.append((depth, level, gram, mixing))
        return mixing

    def _weighted(self, mixing: Tensor | None) -> Tensor | None:
        """The mixing matrices ``[G, K, K]`` of the gradients of losses that were not weighed; None for the identity."""
        if self.loss_weights is None:
            return mixing
        if mixing is None:
            return torch.diag(self.loss_weights).expand(len(self._gradients.groups), -1, -1)
        return mixing * self.loss_weights

    def _weigh(self) -> None:
        # Weights multiply rows, not losses: they are those of the whole step, however many backward passes it had.
        if self.loss_weights is None and implements(self._rule, "weigh"):
            self.loss_weights, self._state = self._rule.weigh(
                self._losses, self._state, active=self._present, generator=self._generator
            )
            self._finite.append(self._losses.isfinite().all())

    def _accumulate(self, p: int, combined: Tensor) -> None:
        if self._undoable:
            old = self._gradients.parameters[p].grad
            self._old[p] = None if old is None else old.clone()
        self._gradients.accumulate(p, combined)

    @torch.no_grad()
    def undo(self) -> None:
        """Leaves ``p.grad`` and the generator as they were."""
        for p, old in self._old.items():
            parameter = self._gradients.parameters[p]
            if old is None:
                parameter.grad = None
            elif parameter.grad is not None and parameter.grad.layout == old.layout == torch.strided:
                parameter.grad.copy_(old)
            else:
                parameter.grad = old
        self._generator.set_state(self._start)

    def _mix(self, depth: int, gram: Tensor, active: Tensor | None) -> Tensor:
        if depth < len(self._random):
            self._generator.set_state(self._random[depth])
        else:
            self._random.append(self._generator.get_state())
        mixing, self._state = self._rule.mix(gram, self._state, active=active, generator=self._generator)
        after = self._generator.get_state()
        if depth + 1 == len(self._random):
            self._random.append(after)
        return mixing

    @property
    def shared(self) -> list[int]:
        """The parameters that were operated on."""
        return [p for _, level, _, _ in self._done for cell in level.cells for p in cell.parameters]

    @torch.no_grad()
    def finish(self) -> tuple[Step, State]:
        """The record of what was seen and done, and the rule's new state."""
        losses = self._losses.masked_fill(~self._present, torch.nan)
        if self._random:
            self._generator.set_state(self._random[-1])
        if self._draws:  # so that the next step's random numbers are others
            torch.rand((), generator=self._generator, device=self._generator.device)
        cells = [(depth, cell.group, cell.name) for depth, level, _, _ in self._done for cell in level.cells]
        order = sorted(range(len(cells)), key=lambda i: cells[i][:2])
        count = len(self._tasks)
        empty = torch.zeros(0, count, count, dtype=losses.dtype, device=losses.device)
        grams, mixings, actives, groups = [empty], [empty], [empty[:, 0].bool()], [empty[:, 0, 0].long()]
        for _, level, gram, mixing in self._done:
            grams.append(gram.index_select(0, level.groups))
            mixings.append(mixing.index_select(0, level.groups))
            actives.append(level.active.index_select(0, level.groups))
            groups.append(level.groups)
        tensors = tuple(map(torch.cat, (grams, mixings, actives, groups)))
        if order != list(range(len(cells))):
            index = torch.tensor(order, device=losses.device)
            tensors = tuple(tensor.index_select(0, index) for tensor in tensors)
        gram, mixing, active, group_of = tensors
        same = [cells[i][1] for i in order] == list(range(len(self._gradients.groups)))
        step = Step(
            tasks=self._tasks,
            groups=tuple(cells[i][2] for i in order),
            active=active,
            gram=gram,
            mixing=mixing,
            losses=losses,
            loss_weights=self.loss_weights,
            group_of=None if same else group_of,
        )
        return step, guarded([*self._finite, *self._gradients.finite], old=self._before, new=self._state)
