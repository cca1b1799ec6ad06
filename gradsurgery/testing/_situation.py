"""What a rule is asked, and how its answers are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._rule import Rule, State, implements
from .._step import Step

Array: TypeAlias = npt.NDArray[np.float64]


class LawBroken(AssertionError):
    """A rule's answer is not what a law says."""


@dataclass(frozen=True, eq=False)
class Given:
    """What a rule sees in one step: ``jacobian`` ``[G, K, D]`` and positive ``losses`` ``[K]``."""

    jacobian: Array
    losses: Array

    def pick(self, groups: Sequence[int] | None = None, tasks: Sequence[int] | None = None) -> Given:
        """Some of the groups, and some of the tasks."""
        some = self.jacobian if groups is None else self.jacobian[list(groups)]
        if tasks is None:
            return Given(some, self.losses)
        return Given(some[:, list(tasks)], self.losses[list(tasks)])


@dataclass(frozen=True, eq=False)
class Answer:
    """What a rule answered: ``weights`` ``[K]``, ``mixing`` ``[G, K, K]`` and its new state."""

    weights: Tensor
    mixing: Tensor
    state: State


@dataclass(frozen=True, eq=False)
class Situation:
    """A step of training, and those before it.

    Attributes:
        tasks: names of the ``K`` tasks.
        now: the step.
        before: the steps before.
        active: ``[G, K]``, for laws on absent tasks.
        part: ``[G]``, for laws on some of the groups.
        order: a permutation of the tasks, for laws on their order.
        factor: for laws on scale.
        seed: of the generator.
        tolerance: of comparisons, in units of the longest gradient.
    """

    tasks: tuple[str, ...]
    now: Given
    before: tuple[Given, ...]
    active: npt.NDArray[np.bool_]
    part: npt.NDArray[np.bool_]
    order: tuple[int, ...]
    factor: float
    seed: int
    tolerance: float

    @property
    def groups(self) -> int:
        """``G``."""
        return len(self.now.jacobian)

    @property
    def present(self) -> Tensor:
        """``[G, K]``, ``active`` as a tensor."""
        return torch.tensor(self.active)

    def each(self, function: Callable[[Given], Given]) -> Situation:
        """The same with other steps."""
        return replace(self, now=function(self.now), before=tuple(function(given) for given in self.before))

    def state(self, rule: Rule) -> State:
        """The rule's state after the steps before, which held all tasks."""
        state = rule.init(self.tasks, [f"group{g}" for g in range(self.groups)])
        for number, given in enumerate(self.before):
            state = ask(rule, state, given, seed=self.seed + 1 + number).state
        return state

    def answer(self, rule: Rule) -> Answer:
        """To this step, with all tasks, after the steps before."""
        return ask(rule, self.state(rule), self.now, seed=self.seed)

    def __str__(self) -> str:
        groups, tasks, _ = self.now.jacobian.shape
        counts = [f"{groups} group{'s' * (groups != 1)}", f"{tasks} task{'s' * (tasks != 1)}"]
        lines = [", ".join([*counts, f"{len(self.before)} step{'s' * (len(self.before) != 1)} before"])]
        for number, given in enumerate([*self.before, self.now]):
            label = "now" if number == len(self.before) else f"step {number}"
            lines += [f"{label}, jacobian[{g}] = {shown(rows)}" for g, rows in enumerate(given.jacobian)]
            lines.append(f"{label}, losses = {shown(given.losses)}")
        return "\n".join(lines)


def ask(
    rule: Rule,
    state: State,
    given: Given,
    *,
    seed: int = 0,
    active: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Answer:
    """One step: the rule weighs the losses, mixes the gradients of the weighted losses, and observes what came of it."""
    generator = torch.Generator().manual_seed(seed) if generator is None else generator
    jacobian = torch.tensor(given.jacobian)
    gram = jacobian @ jacobian.mT
    losses = torch.tensor(given.losses, dtype=dtype)
    weights = torch.ones_like(losses)
    if implements(rule, "weigh"):
        present = None if active is None else active.any(0) if len(active) else torch.ones_like(losses, dtype=torch.bool)
        weights, state = rule.weigh(losses, state, active=present, generator=generator)
        if weights.shape == losses.shape:
            gram = gram * weights[:, None] * weights
    gram = gram.to(dtype)
    mixing, state = rule.mix(gram, state, active=active, generator=generator)
    if implements(rule, "observe"):
        names = [str(k) for k in range(len(losses))], [str(g) for g in range(len(gram))]
        there = torch.ones(gram.shape[:2], dtype=torch.bool) if active is None else active
        step = Step(
            tasks=tuple(names[0]),
            groups=tuple(names[1]),
            active=there,
            gram=gram,
            mixing=mixing,
            losses=losses.masked_fill(~there.any(0), torch.nan) if len(gram) else losses,
            loss_weights=weights if implements(rule, "weigh") else None,
        )
        state = rule.observe(step, state)
    return Answer(weights, mixing, state)


# --- States -----------------------------------------------------------------------------------------------------------


def leaves(state: State, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a state, by path."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def mapped(function: Callable[[Any], Any], state: State) -> State:
    """The state with another value in place of each entry."""
    return {k: mapped(function, v) if isinstance(v, dict) else function(v) for k, v in state.items()}


def copied(state: State) -> State:
    """A copy of all tensors."""
    return mapped(lambda value: value.clone() if isinstance(value, Tensor) else value, state)


def of_tasks(value: Any, tasks: Sequence[int], count: int) -> Any:
    """The entry of some of the ``count`` tasks: along each dimension of that length."""
    if isinstance(value, Tensor):
        index = torch.tensor(tasks, dtype=torch.long)
        for dim, size in enumerate(value.shape):
            if size == count:
                value = value.index_select(dim, index)
    return value


# --- Comparing --------------------------------------------------------------------------------------------------------


def check_equal(what: str, found: Any, expected: Any) -> None:
    """Bit for bit.

    Raises:
        LawBroken: showing both.
    """
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        same = found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)
    else:
        same = type(found) is type(expected) and found == expected
    if not same:
        raise LawBroken(differs(what, found, expected))


def check_same_state(what: str, found: State, expected: State) -> None:
    """Bit for bit, entry by entry."""
    theirs = dict(leaves(expected))
    check_equal(f"{what}: entries of the state", [key for key, _ in leaves(found)], list(theirs))
    for key, value in leaves(found):
        check_equal(f"{what}: state[{key!r}]", value, theirs[key])


def check_close(what: str, found: Tensor, expected: Tensor, given: Given, tolerance: float) -> None:
    """Two mixing matrices ``[G, K, K]``: the modified gradients agree, in units of the longest gradient of the group.

    Raises:
        LawBroken: showing those of the group that is furthest off.
    """
    jacobian = torch.tensor(given.jacobian)
    ours, theirs = found.double() @ jacobian, expected.double() @ jacobian
    if not len(ours):
        return
    longest = torch.maximum(jacobian.norm(dim=-1).amax(-1), theirs.norm(dim=-1).amax(-1))
    distance = (ours - theirs).norm(dim=-1).amax(-1) / torch.where(longest > 0, longest, 1.0)
    worst = int(distance.nan_to_num(nan=torch.inf).argmax())
    if not distance[worst] <= tolerance:
        where = f" in group {worst}" if len(found) > 1 else ""
        raise LawBroken(
            differs(f"{what}: mixing matrix{where}", found[worst], expected[worst])
            + f"\nThe modified gradients differ by {distance[worst].item():.1e} of the longest gradient, where "
            f"{tolerance:.1e} is allowed."
        )


def differs(what: str, found: Any, expected: Any) -> str:
    """The message."""
    return f"{what}\n  found     {shown(found)}\n  expected  {shown(expected)}"


def shown(value: Any) -> str:
    """A short form of tensors and arrays, on one line."""
    if isinstance(value, Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        text = np.array2string(value, precision=6, separator=", ", max_line_width=10**6, threshold=200)
        return " ".join(text.split())
    return str(value)
