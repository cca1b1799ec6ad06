"""Does a rule keep its promises?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .._coordinates import CoordinateRule
from .._rule import Rule, implements
from ._laws import LAWS, Law
from ._situation import Array, Given, LawBroken, Situation, ask, shown

if TYPE_CHECKING:
    from hypothesis import strategies as st

Oracle = Callable[[Array], Array]


@dataclass(frozen=True)
class RuleReport:
    """What was found out about a rule.

    Attributes:
        rule: its ``repr``.
        kept: names of the laws that were checked, and hold.
        not_claimed: names of those that the rule does not claim.
    """

    rule: str
    kept: tuple[str, ...]
    not_claimed: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.rule} keeps {', '.join(self.kept)}"]
        if self.not_claimed:
            lines.append(f"and does not claim {', '.join(self.not_claimed)}")
        return "\n".join(lines)


def check_rule(
    rule: Rule,
    *,
    laws: Iterable[str] | None = None,
    oracle: Oracle | None = None,
    tasks: Sequence[str] | None = None,
    tolerance: float = 1e-6,
    examples: int = 25,
) -> RuleReport:
    """Checks that a rule keeps the laws of :class:`gradsurgery.Rule`, and those that it claims. Needs hypothesis.

    Each law is tried on situations of all kinds: groups of few and more tasks, gradients that are aligned, in conflict,
    parallel, opposite, zero, tiny and huge, with and without steps before. Where one does not hold, the smallest situation
    that shows it is reported.

    Args:
        rule: the rule.
        laws: names of the laws to check; None means all that hold for every rule or are claimed.
        oracle: a naive version of the rule, for what it does in a first step. For a rule that mixes: from a Jacobian
            ``[K, D]``, a NumPy array, to the combined gradient ``[D]`` or to the modified gradients ``[K, D]``; for one
            that only weighs, from losses ``[K]`` to weights ``[K]``.
        tasks: names of the tasks, for rules whose settings name some; None means one to four tasks ``"0"``, ``"1"``, ….
        tolerance: of comparisons, in units of the longest gradient.
        examples: how many situations each law is tried on.

    Returns:
        The laws that hold, and those that are not claimed; prints as a sentence.

    Raises:
        AssertionError: naming the laws that do not hold, with an example of each.
        ImportError: without hypothesis.
        TypeError: if ``rule`` is no rule, or ends in a coordinate rule.
        ValueError: for an unknown law, and for a rule that does not accept the tasks.

    Example:
        >>> import gradsurgery as gs
        >>> print(gs.testing.check_rule(gs.MGDA(), laws=["absent", "finite", "non_conflicting"]))
        MGDA(tolerance=1e-14, iterations=32) keeps absent, finite, non_conflicting
        >>> report = gs.testing.check_rule(gs.MGDA(), laws=[], oracle=gs.testing.oracles.mgda)
        >>> report.kept
        ('oracle',)

    Note:
        The situations are the same in each run. A law that holds on all of them may fail on others. What ``device`` checks
        is seen on PyTorch's ``meta`` device; a generator is not passed there.
    """
    if isinstance(rule, CoordinateRule) or getattr(rule, "coordinates", None) is not None:
        raise TypeError(f"`check_rule` is for rules of losses and Gram matrices, which {rule!r} is not, or not alone.")
    if not isinstance(rule, Rule):
        raise TypeError(f"`rule` must be a gradsurgery rule, such as PCGrad(). Found {rule!r}.")
    chosen = None if laws is None else list(laws)
    if chosen is not None and (unknown := [name for name in chosen if name not in LAWS]):
        raise ValueError(f"There is no law {', '.join(map(repr, unknown))}. The laws are {', '.join(LAWS)}.")
    needs_hypothesis("check_rule")
    try:
        rule.init(["0"] if tasks is None else list(tasks), ["group"])
    except ValueError as error:
        raise ValueError(f"{rule!r} could not start: {error} If it needs other tasks, pass `tasks=[...]`.") from error
    asked = [law for name, law in LAWS.items() if (law.claimed(rule) if chosen is None else name in chosen)]
    if oracle is not None:
        asked.append(_oracle_law(oracle))
    broken = [report for law in asked if (report := _broken(rule, law, tasks, tolerance, examples))]
    if broken:
        raise AssertionError("\n\n".join(broken))
    kept = tuple(law.name for law in asked)
    return RuleReport(repr(rule), kept, tuple(name for name in LAWS if name not in kept) if chosen is None else ())


def _broken(rule: Rule, law: Law, tasks: Sequence[str] | None, tolerance: float, examples: int) -> str:
    """The report on a law that does not hold; empty if it does."""
    import hypothesis

    failure: tuple[Situation, Exception] | None = None

    def attempt(situation: Situation) -> None:
        nonlocal failure
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a solver's, on what it could not solve
                law.check(rule, situation)
        except Exception as error:
            failure = situation, error
            raise

    run = hypothesis.settings(
        max_examples=examples if law.most is None else min(examples, law.most),
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )(hypothesis.given(_situations(law, tasks, tolerance))(attempt))
    try:
        run()
    except Exception:  # the smallest example is tried last
        if failure is None:
            raise
        situation, error = failure
        what = str(error) if isinstance(error, LawBroken) else f"It raised {type(error).__name__}: {error}"
        return f"{rule!r} breaks the law `{law.name}`: {law.text}\n\n{what}\n\nSmallest example found: {situation}"
    return ""


def _situations(law: Law, tasks: Sequence[str] | None, tolerance: float) -> st.SearchStrategy[Situation]:
    from hypothesis import strategies as st

    from . import strategies

    @st.composite
    def situations(draw: st.DrawFn) -> Situation:
        count = draw(st.integers(1, 4)) if tasks is None else len(tasks)
        groups = 3 if count == 2 else 2  # not as many as tasks: dimensions of a state are told apart by their lengths
        make = strategies.apart if law.kind == "apart" else strategies.jacobians

        def given() -> Given:
            made = [draw(make(min_tasks=count, max_tasks=count, widest=law.widest)) for _ in range(groups)]
            smallest, largest = (-10, 15) if law.free_losses else (-1, 1)
            return Given(_stacked(made), draw(strategies.losses(count, smallest=smallest, largest=largest)))

        before = tuple(given() for _ in range(draw(st.integers(0, 2))))
        booleans = st.lists(st.booleans(), min_size=groups * count, max_size=groups * count)
        return Situation(
            tasks=tuple(str(k) for k in range(count)) if tasks is None else tuple(tasks),
            now=given(),
            before=before,
            active=np.array(draw(booleans), dtype=bool).reshape(groups, count),
            part=np.array(draw(st.lists(st.booleans(), min_size=groups, max_size=groups)), dtype=bool),
            order=tuple(draw(st.permutations(range(count)))),
            factor=draw(st.sampled_from([2.0, 0.5, 1e3, 1e-3, 1e7, 1e-7])),
            seed=draw(st.integers(0, 2**16)),
            tolerance=tolerance,
        )

    return situations()


def _stacked(jacobians: Sequence[Array]) -> Array:
    """``[G, K, D]``, of as many coordinates as the widest; zeros fill the others."""
    dim = max(jacobian.shape[1] for jacobian in jacobians)
    return np.stack([np.pad(jacobian, ((0, 0), (0, dim - jacobian.shape[1]))) for jacobian in jacobians])


def _oracle_law(naive: Oracle) -> Law:
    def oracle(rule: Rule, s: Situation) -> None:
        """In a first step, the rule does what its naive version does."""
        for g in range(s.groups):
            given = s.now.pick([g])
            answer = ask(rule, rule.init(s.tasks, ["group"]), given, seed=s.seed)
            only_weighs = implements(rule, "weigh") and not implements(rule, "mix")
            argument = given.losses if only_weighs else given.jacobian[0]
            expected = np.asarray(naive(argument.copy()))
            if only_weighs:
                found, scale = answer.weights.numpy(), float(np.abs(expected).max())
            else:
                found = answer.mixing[0].numpy() @ argument
                found = found.sum(0) if expected.ndim == 1 else found
                scale = max(float(np.linalg.norm(rows, axis=-1).max()) for rows in (argument, np.atleast_2d(expected)))
            if found.shape != expected.shape or not float(np.abs(found - expected).max()) <= s.tolerance * scale:
                what = "losses" if only_weighs else "Jacobian"
                raise LawBroken(
                    f"For the {what} {shown(argument)}\n  the rule gives    {shown(found)}\n"
                    f"  the oracle gives  {shown(expected)}"
                )

    return Law(oracle)


def needs_hypothesis(who: str) -> None:
    """Raises an ImportError that says what to do if hypothesis is not there."""
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{who} needs hypothesis: pip install "gradsurgery[testing]".') from error
