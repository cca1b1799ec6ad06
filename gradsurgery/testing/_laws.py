"""The laws of rules. Each is a function whose docstring says what holds; :class:`gradsurgery.Rule` lists them."""

from __future__ import annotations

import io
import random as python_random
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._rule import Rule, State, implements
from .._state import loaded
from .._step import Step
from ._situation import (
    Answer,
    Given,
    LawBroken,
    Situation,
    ask,
    check_close,
    check_equal,
    check_same_state,
    copied,
    differs,
    leaves,
    mapped,
    of_tasks,
    shown,
)

Check = Callable[[Rule, Situation], None]


@dataclass(frozen=True)
class Law:
    """A law.

    Attributes:
        check: raises :class:`LawBroken` where it does not hold.
        claimed: whether a rule claims it.
        kind: which Jacobians show whether it holds: those whose rows are ``"apart"``, or ``"any"``.
        widest: exponent of the scale that they reach.
        free_losses: whether losses reach from 1e-10 to 1e15, instead of 0.1 to 10.
        most: at most so many examples, where they are much alike.
    """

    check: Check
    claimed: Callable[[Rule], bool] = lambda rule: True
    kind: str = "apart"
    widest: int = 1
    free_losses: bool = False
    most: int | None = None

    @property
    def name(self) -> str:
        """By which the law is called."""
        return self.check.__name__.strip("_")

    @property
    def text(self) -> str:
        """What holds."""
        return " ".join((self.check.__doc__ or "").split())


def shape(rule: Rule, s: Situation) -> None:
    """Mixing matrices have the shape, dtype and device of the Gram matrices, and weights those of the losses, without a
    graph; also for no groups at all."""
    answer = s.answer(rule)
    groups, count = s.groups, len(s.tasks)
    _check_form("mixing matrices", answer.mixing, (groups, count, count))
    _check_form("weights", answer.weights, (count,))
    none = ask(rule, rule.init(s.tasks, []), s.now.pick(groups=[]), seed=s.seed)
    _check_form("mixing matrices of no groups", none.mixing, (0, count, count))


def batched(rule: Rule, s: Situation) -> None:
    """``mix`` on ``[G, K, K]`` equals ``mix`` on each group alone: no group sees another."""
    found = s.answer(rule).mixing
    for g in range(s.groups):
        if rule.random:  # the numbers that it draws depend on how many groups there are, but not on what they hold
            others = [g if h == g else (h + 1) % s.groups for h in range(s.groups)]
            given = s.each(lambda given, g=g, others=others: _turned(given.pick(others), g))  # type: ignore[misc]
            expected, row = given.answer(rule).mixing, g
        else:
            expected, row = s.each(lambda given, g=g: given.pick([g])).answer(rule).mixing, 0  # type: ignore[misc]
        alone = s.now.pick([g])
        what = f"Group {g} with the others changed" if rule.random else f"Group {g} by itself"
        check_close(what, found[g : g + 1], expected[row : row + 1], alone, s.tolerance)


def absent(rule: Rule, s: Situation) -> None:
    """Rows and columns of a task that is not active are those of the identity, and its weight is 1; no other entry depends
    on that task, and the state of its pairs stays bit for bit as it was."""
    state, active, count = s.state(rule), s.present, len(s.tasks)
    clean = Given(s.now.jacobian * s.active[:, :, None], s.now.losses * s.active.any(0))
    dirty_rows = np.where(s.active[:, :, None], s.now.jacobian, 1e3 * np.roll(s.now.jacobian, 1, axis=1))
    dirty = Given(dirty_rows, np.where(s.active.any(0), s.now.losses, 7.0))
    before = copied(state)
    answer, other = (ask(rule, copied(state), given, seed=s.seed, active=active) for given in (clean, dirty))
    seen = f"active = {shown(active)}"
    other_one = f"Another gradient and loss in place of absent ones; {seen}"
    check_equal(f"{other_one}: mixing matrices", other.mixing, answer.mixing)
    check_equal(f"{other_one}: weights", other.weights, answer.weights)
    check_same_state(other_one, other.state, answer.state)

    eye = torch.eye(count, dtype=answer.mixing.dtype).expand_as(answer.mixing)
    keep = active[:, :, None] & active[:, None, :]
    found, expected = (torch.where(keep, 0.0, mixing) for mixing in (answer.mixing, eye))
    check_equal(f"Rows and columns of absent tasks (others as 0); {seen}", found, expected)
    gone = ~active.any(0)
    check_equal(f"Weights of absent tasks; {seen}", answer.weights[gone], torch.ones_like(answer.weights[gone]))
    old = dict(leaves(before))
    for key, value in leaves(answer.state):
        for g in range(s.groups):
            there = active[g] if isinstance(value, Tensor) and _by_group(value, s.groups) else active.any(0)
            away = [k for k in range(count) if not there[k]]
            now, then = (_of_absent(v, g, away, s.groups, count) for v in (value, old.get(key)))
            check_equal(f"state[{key!r}] of absent tasks {away}; {seen}", now, then)
    if not rule.random:
        _check_alone(rule, s, before, active[0])


def _check_alone(rule: Rule, s: Situation, state: State, here: Tensor) -> None:
    """Tasks are operated on as if there were no others."""
    index, count = [k for k in range(len(s.tasks)) if here[k]], len(s.tasks)
    if not index:
        return
    everywhere = here.expand(s.groups, count)
    clean = Given(s.now.jacobian * here[:, None].numpy(), s.now.losses * here.numpy())
    answer = ask(rule, copied(state), clean, seed=s.seed, active=everywhere)
    alone = ask(rule, mapped(lambda v: of_tasks(v, index, count), state), s.now.pick(tasks=index), seed=s.seed)
    what = f"Tasks {index} beside absent ones, compared with them alone"
    check_close(what, answer.mixing[:, index][:, :, index], alone.mixing, s.now.pick(tasks=index), s.tolerance)
    if not torch.allclose(answer.weights[index], alone.weights, rtol=s.tolerance, atol=0):
        raise LawBroken(differs(f"{what}: weights", answer.weights[index], alone.weights))


def pure(rule: Rule, s: Situation) -> None:
    """Neither the arguments nor the rule are modified: asked once more, it gives the same answer."""
    state, settings = s.state(rule), (repr(rule), repr(vars(rule)))
    jacobian = torch.tensor(s.now.jacobian)
    gram, losses, active = jacobian @ jacobian.mT, torch.tensor(s.now.losses), s.present
    gram, losses = gram * active[:, :, None] * active[:, None, :], losses * active.any(0)
    twins = gram.clone(), losses.clone(), active.clone(), copied(state)
    answers = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(s.seed)
        weights, between = rule.weigh(losses, state, active=active.any(0), generator=generator)
        after_weigh = copied(between)
        mixing, new = rule.mix(gram, between, active=active, generator=generator)
        check_same_state("`mix` modified its state", between, after_weigh)
        step = Step(s.tasks, tuple(f"group{g}" for g in range(s.groups)), active, gram, mixing, losses, weights)
        after_mix, mixed = copied(new), mixing.clone()
        observed = rule.observe(step, new)
        check_same_state("`observe` modified its state", new, after_mix)
        check_equal("`observe` modified the step's mixing matrices", mixing, mixed)
        for what, now, then in zip(("gram", "losses", "active"), (gram, losses, active), twins[:3], strict=True):
            check_equal(f"`{what}` was modified", now, then)
        check_same_state("`state` was modified", state, twins[3])
        check_equal("The rule was modified", (repr(rule), repr(vars(rule))), settings)
        answers.append(Answer(weights.clone(), mixed, copied(observed)))
    first, again = answers
    check_equal("Asked once more, from the same random numbers: weights", again.weights, first.weights)
    check_equal("Asked once more, from the same random numbers: mixing matrices", again.mixing, first.mixing)
    check_same_state("Asked once more, from the same random numbers", again.state, first.state)


def finite(rule: Rule, s: Situation) -> None:
    """A finite positive semi-definite Gram matrix, whatever its rank and scale, gives finite mixing matrices; positive
    losses give finite weights; and the state stays finite."""
    for dtype in (torch.float64, torch.float32):
        if dtype == torch.float32 and (implements(rule, "weigh") or not _within_float32(s)):
            continue
        state = rule.init(s.tasks, [f"group{g}" for g in range(s.groups)], dtype=dtype)
        for number, given in enumerate([*s.before, s.now]):
            answer = ask(rule, state, given, seed=s.seed + number, dtype=dtype)
            state = answer.state
            check_finite = {"mixing matrices": answer.mixing, "weights": answer.weights}
            for key, value in [*check_finite.items(), *leaves(state)]:
                if isinstance(value, Tensor) and not value.isfinite().all():
                    raise LawBroken(f"In {dtype}, {key} = {shown(value)}")


def device(rule: Rule, s: Situation) -> None:
    """No value is read back to the host (on the CPU, where that costs nothing, it may be), and all tensors are on the
    device of the Gram matrices."""
    # Meta tensors have no values: whatever reads one raises. So a machine without a GPU sees where one would be waited for.
    groups, count = s.groups, len(s.tasks)
    try:
        state = rule.init(s.tasks, [f"group{g}" for g in range(groups)], device="meta")
        losses = torch.ones(count, dtype=torch.float64, device="meta")
        gram = torch.ones(groups, count, count, dtype=torch.float64, device="meta")
        for active in (None, torch.ones(groups, count, dtype=torch.bool, device="meta")):
            weights, state = rule.weigh(losses, state, active=None if active is None else active.any(0))
            mixing, state = rule.mix(gram, state, active=active)
            tensors = [("weights", weights), ("mixing matrices", mixing), *leaves(state)]
            for what, value in tensors:
                if isinstance(value, Tensor) and value.device.type != "meta":
                    raise LawBroken(f"For Gram matrices on another device, {what} came out on the {value.device}.")
    except LawBroken:
        raise
    except Exception as error:
        raise LawBroken(f"On a device whose values cannot be read, {_where(error)}") from error


def loadable(rule: Rule, s: Situation) -> None:
    """The state keeps the entries, shapes and dtypes that ``init`` gave it, so that it can be saved, loaded into a fresh
    rule, and continued bit for bit."""
    fresh, state = rule.init(s.tasks, [f"group{g}" for g in range(s.groups)]), s.state(rule)
    for _ in range(2):
        form, expected = ([(key, _form(value)) for key, value in leaves(tree)] for tree in (state, fresh))
        check_equal("The entries of the state", form, expected)
        masked = Given(s.now.jacobian * s.active[:, :, None], s.now.losses * s.active.any(0))
        state = ask(rule, state, masked, seed=s.seed, active=s.present).state
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    except Exception as error:
        raise LawBroken(f"The state could not be saved and loaded: {error}") from error
    answer, again = (ask(rule, each, s.now, seed=s.seed) for each in (state, loaded(saved, fresh)))
    check_equal("From the loaded state: weights", again.weights, answer.weights)
    check_equal("From the loaded state: mixing matrices", again.mixing, answer.mixing)
    check_same_state("From the loaded state", again.state, answer.state)


def separable(rule: Rule, s: Situation) -> None:
    """``mix`` with some groups active and then, from the same random numbers, with the others, equals ``mix`` with all."""
    state, part = s.state(rule), torch.tensor(s.part)[:, None]
    everyone = torch.ones(s.groups, len(s.tasks), dtype=torch.bool)
    jacobian = torch.tensor(s.now.jacobian)
    gram = jacobian @ jacobian.mT

    def mix(active: Tensor, state: State) -> tuple[Tensor, State]:
        masked = gram * active[:, :, None] * active[:, None, :]
        return rule.mix(masked, state, active=active, generator=torch.Generator().manual_seed(s.seed))

    whole, expected = mix(everyone, copied(state))
    first, between = mix(everyone & part, copied(state))
    second, found = mix(everyone & ~part, between)
    both = torch.where(part[:, :, None], first, second)
    check_close(f"Groups {s.part.nonzero()[0].tolist()}, and then the others", both, whole, s.now, s.tolerance)
    theirs = dict(leaves(expected))
    for key, value in leaves(found):
        if isinstance(value, Tensor) and not torch.allclose(value.double(), theirs[key].double(), equal_nan=True):
            raise LawBroken(differs(f"Bit by bit: state[{key!r}]", value, theirs[key]))


def random(rule: Rule, s: Situation) -> None:
    """A rule that is ``random`` draws from the given generator only, and one that is not draws from none."""
    state, generator = s.state(rule), torch.Generator().manual_seed(s.seed)
    before, others = generator.get_state(), _other_generators()
    ask(rule, state, s.now, generator=generator)
    for name, then, now in zip(("PyTorch's", "NumPy's", "Python's"), others, _other_generators(), strict=True):
        if then != now:
            raise LawBroken(f"It drew from {name} global generator. Draw from the `generator` that it is given.")
    if not rule.random and not torch.equal(before, generator.get_state()):
        raise LawBroken("It drew random numbers. Say so: random: ClassVar[bool] = True.")


def symmetric(rule: Rule, s: Situation) -> None:
    """Permuting the tasks permutes the result: what a task is treated like depends on its name at most."""
    order = list(s.order)
    answer = s.answer(rule)
    turned = s.each(lambda given: given.pick(tasks=order))
    other = Situation(**{**vars(turned), "tasks": tuple(s.tasks[k] for k in order)}).answer(rule)
    what = f"Tasks in the order {order}"
    check_close(what, other.mixing, answer.mixing[:, order][:, :, order], turned.now, s.tolerance)
    if not torch.allclose(other.weights, answer.weights[order], rtol=s.tolerance, atol=0):
        raise LawBroken(differs(f"{what}: weights", other.weights, answer.weights[order]))


def scale_equivariant(rule: Rule, s: Situation) -> None:
    """A common factor of all gradients, in all steps, is a factor of the result: mixing matrices and weights stay
    as they are."""
    found, expected = s.each(lambda given: Given(given.jacobian * s.factor, given.losses)).answer(rule), s.answer(rule)
    what = f"All gradients times {s.factor:g}"
    check_close(what, found.mixing, expected.mixing, s.now, s.tolerance)
    if not torch.allclose(found.weights, expected.weights, rtol=s.tolerance, atol=0):
        raise LawBroken(differs(f"{what}: weights", found.weights, expected.weights))


def non_conflicting(rule: Rule, s: Situation) -> None:
    """The combined gradient has no negative inner product with any task's gradient."""
    jacobian = torch.tensor(s.now.jacobian)
    answer = s.answer(rule)
    combined = ((answer.mixing.sum(-2) * answer.weights)[:, None, :] @ jacobian).squeeze(-2)
    products = (jacobian @ combined[..., None]).squeeze(-1)
    lengths = jacobian.norm(dim=-1)
    allowed = s.tolerance * lengths.amax(-1, keepdim=True) * torch.maximum(combined.norm(dim=-1), lengths.amax(-1))[:, None]
    if bool((products < -allowed).any()):
        g, k = (int(i) for i in (products < -allowed).nonzero()[0])
        raise LawBroken(
            f"Group {g}: the combined gradient {shown(combined[g])}\nhas the inner product {products[g, k].item():.3g} "
            f"with the gradient of task {s.tasks[k]!r}."
        )


LAWS = {
    law.name: law
    for law in (
        Law(shape),
        Law(batched, lambda rule: rule.separable),
        Law(absent),
        Law(pure, kind="any", widest=3),
        Law(finite, kind="any", widest=10, free_losses=True),
        Law(device, most=3),
        Law(loadable),
        Law(random),
        Law(separable, lambda rule: rule.separable),
        Law(symmetric, lambda rule: rule.symmetric and not rule.random),
        Law(scale_equivariant, lambda rule: rule.scale_equivariant),
        Law(non_conflicting, lambda rule: rule.non_conflicting, kind="any", widest=2),
    )
}
"""The laws, by name."""


# --- Small things -----------------------------------------------------------------------------------------------------


def _check_form(what: str, found: Tensor, expected: tuple[int, ...]) -> None:
    form = tuple(found.shape), found.dtype, found.device.type, found.requires_grad
    check_equal(f"Shape, dtype, device and graph of {what}", form, (expected, torch.float64, "cpu", False))


def _form(value: object) -> object:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value)


def _turned(given: Given, keep: int) -> Given:
    """Other gradients in all groups but one."""
    turned = np.where(np.arange(len(given.jacobian))[:, None, None] == keep, given.jacobian, -2 * given.jacobian[:, ::-1])
    return Given(turned, given.losses)


def _by_group(value: Tensor, groups: int) -> bool:
    return value.dim() > 0 and len(value) == groups


def _of_absent(value: object, group: int, away: list[int], groups: int, count: int) -> object:
    """What a state says of the pairs of absent tasks: for each dimension of their number, the slices of those."""
    if not isinstance(value, Tensor):
        return None
    if _by_group(value, groups):
        value = value[group]
    dims = [dim for dim, size in enumerate(value.shape) if size == count]
    index = torch.tensor(away, dtype=torch.long)
    return torch.cat([value.index_select(dim, index).flatten() for dim in dims]) if dims else None


def _within_float32(s: Situation) -> bool:
    squares = np.concatenate([np.square(given.jacobian).sum(-1).ravel() for given in [*s.before, s.now]])
    return bool(((squares == 0) | (squares > 1e-30)).all() and (squares < 1e30).all())


def _other_generators() -> list[str]:
    states = torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), repr(python_random.getstate())  # noqa: NPY002
    return [str(hash(state)) for state in states]


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    own = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    frame = own[-1] if own else frame
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f'{type(error).__name__} in "{frame.line}" ({frame.filename}:{frame.lineno}):\n  {message}'
