"""The kit for rules of one's own: it catches broken ones, and names the law that they break."""

import re
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import gradsurgery as gs
from gradsurgery.testing._laws import LAWS

strategies = gs.testing.strategies


def identity(gram):
    return torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)


def here(gram, active):
    return torch.ones(gram.shape[:2], dtype=torch.bool, device=gram.device) if active is None else active


@dataclass(frozen=True)
class Good(gs.Rule):
    """Halves each gradient that conflicts with another, and counts per task how often."""

    scale_equivariant: ClassVar[bool] = True

    def init(self, tasks, groups, *, device=None, dtype=torch.float64):
        return {"count": torch.zeros(len(groups), len(tasks), device=device, dtype=dtype)}

    def mix(self, gram, state, *, active=None, generator=None):
        conflict = (gram < 0) & here(gram, active)[:, :, None] & here(gram, active)[:, None, :]
        halved = conflict.any(-1)
        return torch.diag_embed(torch.where(halved, 0.5, 1.0).to(gram.dtype)), {"count": state["count"] + halved}


# --- Broken rules -----------------------------------------------------------------------------------------------------


class WeightsInPlaceOfMatrices(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        return gram.new_ones(gram.shape[:2]), state


class HalfPrecision(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        return identity(gram).float(), state


class WeightsWithAGraph(gs.Rule):
    def weigh(self, losses, state, *, active=None, generator=None):
        return torch.ones_like(losses, requires_grad=True), state


class SeesAllGroups(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        conflict = (gram < 0).any(-1) & here(gram, active)
        total = conflict.sum() * (here(gram, active).all() * 1.0)  # hidden from `absent`, and so from `separable`
        return identity(gram) * torch.where(here(gram, active), 1.0 + total, 1.0)[:, :, None], state


class HalvesAbsentTasks(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        return identity(gram) / 2, state


class MeanOverAbsentTasksToo(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        return identity(gram) * torch.where(here(gram, active), 1 / gram.shape[-1], 1.0)[:, :, None], state


class LooksAtAbsentTasks(gs.Rule):
    """The masks of pairs lack the second task."""

    def mix(self, gram, state, *, active=None, generator=None):
        conflict = ((gram < 0) & here(gram, active)[:, :, None]).any(-1)
        return torch.diag_embed(torch.where(conflict, 0.5, 1.0).to(gram.dtype)), state


class ForgetsAbsentTasks(Good):
    def mix(self, gram, state, *, active=None, generator=None):
        mixing, new = super().mix(gram, state, active=active, generator=generator)
        return mixing, {"count": 0.9 * new["count"] + 0.1}


class WeighsAbsentTasks(gs.Rule):
    def weigh(self, losses, state, *, active=None, generator=None):
        return torch.softmax(losses.clamp_max(5.0), 0), state


class LearnsFromAbsentTasks(gs.Rule):
    def init(self, tasks, groups, *, device=None, dtype=torch.float64):
        return {"mean": torch.zeros(len(tasks), device=device, dtype=dtype)}

    def weigh(self, losses, state, *, active=None, generator=None):
        return torch.ones_like(losses), {"mean": torch.lerp(state["mean"], losses, 0.1)}


class WorksInPlace(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        gram.clamp_(min=-1.0, max=1.0)
        return identity(gram), state


class ChangesItsState(Good):
    def mix(self, gram, state, *, active=None, generator=None):
        mixing, new = super().mix(gram, state, active=active)
        state["count"].copy_(new["count"])
        return mixing, state


class RemembersOnTheRule(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        object.__setattr__(self, "steps", getattr(self, "steps", 0) + 1)
        return identity(gram), state


class ChangesTheStep(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        return identity(gram).clone(), state

    def observe(self, step, state):
        step.mixing.mul_(2)
        return state


class DividesByZero(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        there = here(gram, active)
        mean = (norms * there).sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
        return torch.diag_embed(torch.where(there, mean / norms, 1.0)), state


class InverseLosses(gs.Rule):
    def weigh(self, losses, state, *, active=None, generator=None):
        there = torch.ones_like(losses, dtype=torch.bool) if active is None else active
        return torch.where(there, losses**-40, 1.0), state


class WaitsForTheDevice(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        if gram.numel() and gram.min().item() < -1e30:
            return -identity(gram), state
        return identity(gram), state


class MakesTensorsOnTheHost(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        return torch.eye(gram.shape[-1], dtype=gram.dtype).expand_as(gram), state


class SizedOnFirstUse(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        return identity(gram), {"seen": state.get("seen", torch.zeros(len(gram), device=gram.device)) + 1}


class Unsaveable(gs.Rule):
    def init(self, tasks, groups, *, device=None, dtype=torch.float64):
        return {"what": Good}


class GlobalRandomness(gs.Rule):
    random: ClassVar[bool] = True

    def mix(self, gram, state, *, active=None, generator=None):
        torch.rand(3)
        return identity(gram), state


class NumpyRandomness(gs.Rule):
    def weigh(self, losses, state, *, active=None, generator=None):
        np.random.rand()  # noqa: NPY002
        return torch.ones_like(losses), state


class UnannouncedRandomness(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        torch.rand(3, generator=generator)
        return identity(gram), state


class CountsCalls(gs.Rule):
    """Its state is of no group, so that streaming, which calls it several times in a step, counts too often."""

    def init(self, tasks, groups, *, device=None, dtype=torch.float64):
        return {"calls": torch.zeros((), device=device, dtype=dtype)}

    def mix(self, gram, state, *, active=None, generator=None):
        factor = torch.where(here(gram, active), 1 / (1 + state["calls"]), 1.0)
        return identity(gram) * factor[:, :, None], {"calls": state["calls"] + 1}


class FirstTaskFirst(gs.Rule):
    def mix(self, gram, state, *, active=None, generator=None):
        there = here(gram, active)
        first = there & (there.cumsum(-1) == 1)
        return identity(gram) * torch.where(first, 2.0, 1.0)[:, :, None], state


class AbsoluteThreshold(gs.Rule):
    scale_equivariant: ClassVar[bool] = True

    def mix(self, gram, state, *, active=None, generator=None):
        large = (gram.diagonal(dim1=-2, dim2=-1) > 1.0) & here(gram, active)
        return identity(gram) * torch.where(large, 0.5, 1.0)[:, :, None], state


class SumOfConflicts(gs.Rule):
    non_conflicting: ClassVar[bool] = True


BROKEN = {
    WeightsInPlaceOfMatrices: {"shape"},
    HalfPrecision: {"shape"},
    WeightsWithAGraph: {"shape"},
    SeesAllGroups: {"batched"},
    HalvesAbsentTasks: {"absent"},
    MeanOverAbsentTasksToo: {"absent"},
    LooksAtAbsentTasks: {"absent"},
    ForgetsAbsentTasks: {"absent", "separable"},
    WeighsAbsentTasks: {"absent"},
    LearnsFromAbsentTasks: {"absent"},
    WorksInPlace: {"pure"},
    ChangesItsState: {"pure"},
    RemembersOnTheRule: {"pure"},
    ChangesTheStep: {"pure"},
    DividesByZero: {"pure", "finite"},  # nan is not equal to itself
    InverseLosses: {"finite"},
    WaitsForTheDevice: {"device"},
    MakesTensorsOnTheHost: {"device"},
    SizedOnFirstUse: {"loadable"},
    Unsaveable: {"loadable"},
    GlobalRandomness: {"random"},
    NumpyRandomness: {"random"},
    UnannouncedRandomness: {"random"},
    CountsCalls: {"separable"},
    FirstTaskFirst: {"symmetric"},
    AbsoluteThreshold: {"scale_equivariant"},
    SumOfConflicts: {"non_conflicting"},
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_rule_is_caught_and_the_law_is_named(broken):
    laws = sorted(BROKEN[broken])
    with pytest.raises(AssertionError) as caught:
        gs.testing.check_rule(broken(), laws=laws)
    assert re.findall(r"breaks the law `(\w+)`", str(caught.value)) == [law for law in LAWS if law in laws]


def test_every_law_catches_a_broken_rule():
    assert set().union(*BROKEN.values()) == set(LAWS)


def test_a_good_rule_passes():
    report = gs.testing.check_rule(Good())
    assert set(report.kept) == set(LAWS) - {"non_conflicting"}
    assert report.not_claimed == ("non_conflicting",)
    assert str(report).endswith("and does not claim non_conflicting")


def test_the_report_shows_the_smallest_example():
    with pytest.raises(AssertionError) as caught:
        gs.testing.check_rule(HalvesAbsentTasks(), laws=["absent"])
    message = str(caught.value)
    assert message.startswith("HalvesAbsentTasks() breaks the law `absent`: Rows and columns")
    assert "its weight is 1" in message  # what the law says
    assert re.search(r"found +\[\[\[0\.5\]\], \[\[0\.5\]\]\]\n  expected +\[\[\[1\.\]\], \[\[1\.\]\]\]", message)
    assert "Smallest example found: 2 groups, 1 task, 0 steps before" in message


def test_a_rule_that_raises_breaks_a_law():
    class Raises(gs.Rule):
        def mix(self, gram, state, *, active=None, generator=None):
            raise KeyError("target")

    with pytest.raises(AssertionError, match=r"breaks the law `finite`.*\n\nIt raised KeyError: 'target'\n\nSmallest"):
        gs.testing.check_rule(Raises(), laws=["finite"])


def test_what_waits_for_the_device_is_shown():
    with pytest.raises(
        AssertionError, match=r'in "if gram.numel\(\) and gram.min\(\).item\(\) < -1e30:" \(.*test_check_rule'
    ):
        gs.testing.check_rule(WaitsForTheDevice(), laws=["device"])


# --- Oracles ----------------------------------------------------------------------------------------------------------


def test_oracles():
    assert gs.testing.check_rule(gs.Mean(), laws=[], oracle=gs.testing.oracles.mean).kept == ("oracle",)
    gs.testing.check_rule(gs.MGDA(), laws=[], oracle=gs.testing.oracles.mgda)
    gs.testing.check_rule(  # two tasks meet in one order only
        gs.PCGrad(), laws=[], tasks=["a", "b"], oracle=lambda jacobian: gs.testing.oracles.pcgrad(jacobian, [[1], [0]])
    )
    gs.testing.check_rule(gs.ScaleInvariant(), laws=[], oracle=lambda losses: 1 / losses)


@pytest.mark.parametrize(
    ("rule", "oracle"),
    [
        (gs.Sum(), lambda jacobian: jacobian / len(jacobian)),
        (gs.Mean(), lambda jacobian: jacobian.sum(0) * 1.001),
        (gs.Sum(), lambda jacobian: jacobian[0]),
        (gs.GLS(), lambda losses: 1 / losses),
    ],
)
def test_a_rule_that_is_not_its_oracle(rule, oracle):
    with pytest.raises(AssertionError, match=r"breaks the law `oracle`(.|\n)*the rule gives(.|\n)*the oracle gives"):
        gs.testing.check_rule(rule, laws=[], oracle=oracle)


# --- Arguments --------------------------------------------------------------------------------------------------------


def test_rules_that_name_tasks():
    rule = gs.GradVac(tasks=("fr",))
    assert "absent" in gs.testing.check_rule(rule, tasks=["en", "fr", "de"]).kept
    with pytest.raises(ValueError, match=r"could not start: GradVac's `tasks` names \['fr'\].*pass `tasks=\[...\]`"):
        gs.testing.check_rule(rule)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"`rule` must be a gradsurgery rule, such as PCGrad\(\). Found 'pcgrad'"):
        gs.testing.check_rule("pcgrad")
    with pytest.raises(ValueError, match="There is no law 'fast', 'good'. The laws are shape, batched"):
        gs.testing.check_rule(gs.Sum(), laws=["fast", "good", "pure"])


def test_hypothesis_is_needed_only_when_asked_for():
    code = """
import sys
sys.modules["hypothesis"] = None
import gradsurgery as gs
try:
    gs.testing.check_rule(gs.Sum())
except ImportError as error:
    assert 'pip install "gradsurgery[testing]"' in str(error), error
else:
    raise SystemExit("no error")
try:
    gs.testing.strategies
except ImportError as error:
    assert 'pip install "gradsurgery[testing]"' in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


# --- Strategies -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(jacobian=strategies.jacobians(min_tasks=2, conflict=True), other=strategies.jacobians(min_tasks=2, conflict=False))
def test_conflict_is_as_asked_for(jacobian, other):
    off = ~np.eye(len(jacobian), dtype=bool)
    assert ((jacobian @ jacobian.T)[off] < 0).all()
    assert ((other @ other.T)[~np.eye(len(other), dtype=bool)] > 0).all()


@pytest.mark.parametrize("rank", [0, 1, 2, 9])
def test_rank_is_as_asked_for(rank):
    @settings(deadline=None, max_examples=50)
    @given(jacobian=strategies.jacobians(rank=rank, widest=2), gram=strategies.grams(rank=rank, widest=2))
    def check(jacobian, gram):
        lengths = np.linalg.norm(jacobian, axis=1)[:, None]
        assert np.linalg.matrix_rank(jacobian / np.where(lengths > 0, lengths, 1)) == min(rank, len(jacobian))
        assert np.linalg.eigvalsh(gram).min() >= -1e-12 * np.abs(gram).max()

    check()


@settings(deadline=None, max_examples=50)
@given(jacobian=strategies.apart(widest=4), losses=strategies.losses(3))
def test_apart_is_apart(jacobian, losses):
    unit = jacobian / np.linalg.norm(jacobian, axis=1)[:, None]
    assert np.linalg.svd(unit, compute_uv=False).min() > 0.15
    assert ((losses >= 1e-10) & (losses <= 1e15)).all()


def test_rank_and_conflict_exclude_each_other():
    @given(strategies.jacobians(rank=1, conflict=True))
    def check(jacobian):
        pass

    with pytest.raises(ValueError, match="`rank` and `conflict` cannot both be chosen"):
        check()
