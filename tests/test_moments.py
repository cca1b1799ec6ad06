"""The moments of a rule beside `mix`: `weigh` before the backward pass, `observe` after the combination."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import TASKS, Bent, Heads, batch, task_gradients, wrap
from torch import nn

import gradsurgery as gs


@dataclass(frozen=True)
class ByLoss(gs.Rule):
    """Weighs each loss by its own value, and counts the steps in which each task was there."""

    def init(self, tasks, groups, *, device=None, dtype=torch.float64):
        return {"seen": torch.zeros(len(tasks), device=device)}

    def weigh(self, losses, state, *, active=None, generator=None):
        return losses.clone(), {"seen": state["seen"] + active}


@dataclass(frozen=True)
class Conflicts(gs.Rule):
    """Adds up the number of conflicts in each group."""

    def init(self, tasks, groups, *, device=None, dtype=torch.float64):
        return {"count": torch.zeros(len(groups), device=device)}

    def observe(self, step, state):
        return {"count": state["count"] + step.conflicts.sum((1, 2))}


def losses_of(model, x):
    out = model(x)
    return {"a": (out[:, 0] - 1).square().mean(), "b": (out[:, 0] + 2 * out[:, 1]).square().mean()}


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_weights_multiply_the_gradients(source):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    expected = torch.zeros_like(model.weight)
    for loss in losses_of(model, x).values():
        expected += loss.detach() * torch.autograd.grad(loss, model.weight, retain_graph=True)[0]
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ByLoss(), model=model, source=source)
    opt.backward(losses_of(model, x))
    opt.combine()
    torch.testing.assert_close(model.weight.grad, expected)
    assert opt.rule_state["seen"].tolist() == [1, 1]


def test_a_mix_sees_the_weighted_gradients():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    rows = []
    for loss in losses_of(model, x).values():
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        rows.append(loss.detach() * torch.cat([g.flatten() for g in gradients]))
    expected = gs.operate(torch.stack(rows), gs.PCGrad())
    chain = gs.Chain(ByLoss(), gs.PCGrad())
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), chain, model=model)
    opt.backward(losses_of(model, x))
    opt.combine()
    torch.testing.assert_close(torch.cat([model.weight.grad.flatten(), model.bias.grad]), expected)


def test_weights_of_a_chain_multiply():
    torch.manual_seed(0)
    losses = torch.tensor([2.0, 3.0])
    rule = gs.Chain(ByLoss(), ByLoss())
    state = rule.init(["a", "b"], ["all"])
    weights, state = rule.weigh(losses, state, active=torch.tensor([True, False]))
    torch.testing.assert_close(weights, losses * (losses * losses))  # the second sees the weighted losses
    assert state["1"]["seen"].tolist() == [1, 0]


def test_observe_sees_the_finished_step():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    chain = gs.Chain(gs.PCGrad(), Conflicts())
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), chain, model=model, groups="tensor")
    counts = torch.zeros(2)
    for _ in range(4):
        opt.backward(losses_of(model, torch.randn(5, 3)))
        opt.step()
        opt.zero_grad()
        counts += opt.last.conflicts.sum((1, 2))
    assert counts.sum() > 0
    torch.testing.assert_close(opt.rule_state["1"]["count"], counts)


def test_the_base_rule_is_the_identity():
    jacobian = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(gs.operate(jacobian, gs.Rule()), jacobian.sum(0))
    weights, state = gs.Rule().weigh(torch.ones(3), {})
    assert weights.tolist() == [1, 1, 1]
    assert state == {}


# --- When losses are weighed ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noted(gs.Rule):
    """Weighs each loss by its value, at random, and notes what it was asked."""

    random: ClassVar[bool] = True

    def init(self, tasks, groups, *, device=None, dtype=torch.float64):
        return {key: torch.zeros(len(tasks), dtype=dtype) for key in ("calls", "losses")}

    def weigh(self, losses, state, *, active=None, generator=None):
        noise = torch.rand(losses.shape, generator=generator, dtype=losses.dtype)
        return torch.where(active, losses + noise, 1.0), {"calls": state["calls"] + active, "losses": losses.clone()}


def seen_weights(opt):
    return opt.last.loss_weights.tolist()


@pytest.mark.parametrize("rule", [Noted(), gs.Chain(Noted(), gs.PCGrad())], ids=repr)
def test_accumulated_passes_are_weighed_once_by_their_sum(rule):
    whole = Heads().double()
    parts = copy.deepcopy(whole)
    opt, other = wrap(whole, rule, seed=3), wrap(parts, rule, seed=3)
    for number in range(3):
        pieces = [parts.losses(x) for x in batch(number).double().split(4)]
        other.backward(pieces[0])
        other.backward({"a": pieces[1]["a"]})
        losses = [whole.losses(x) for x in batch(number).double().split(4)]
        opt.backward({**losses[0], "a": losses[0]["a"] + losses[1]["a"]})
        for each in (opt, other):
            each.step()
            each.zero_grad()
        assert seen_weights(opt) == pytest.approx(seen_weights(other))
        state = other.rule_state.get("0", other.rule_state)
        assert state["calls"].tolist() == [number + 1] * 3
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_head_gets_the_gradient_of_its_weighted_loss():
    model = Heads().double()
    opt = wrap(model, ByLoss(), tasks=TASKS)
    losses = model.losses(batch().double())
    expected = task_gradients(losses, dict(model.named_parameters()))
    opt.backward(losses)
    opt.combine()
    for task, loss in losses.items():
        torch.testing.assert_close(model.heads[task].weight.grad, loss.item() * expected[task][f"heads.{task}.weight"])
    assert seen_weights(opt) == pytest.approx([loss.item() for loss in losses.values()])


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_the_state_of_weights_stays_where_a_step_is_not_finite(where):
    trunk = torch.nn.Parameter(torch.ones(3))
    opt = gs.SurgeryOptimizer(torch.optim.SGD([trunk], lr=0.1), gs.IMTLL(lr=0.1), tasks=("a", "b"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(3):
        before = copy.deepcopy(opt.rule_state)
        wrong = torch.inf if number == 1 else 1.0
        # A gradient that overflows where the loss does not, and a loss that does where its gradient does not.
        first = (trunk - trunk.detach()).sum() * wrong if where == "gradient" else trunk.sum() + (wrong - 1.0)
        if where == "gradient":
            first = first.nan_to_num() + 1
        opt.backward({"a": first, "b": trunk.square().sum()}, scaler=scaler)
        opt.combine()
        kept = all(torch.equal(before["adam"][key], opt.rule_state["adam"][key]) for key in before["adam"])
        assert kept == torch.equal(before["scale"], opt.rule_state["scale"]) == (number == 1)
        opt.zero_grad()


def test_a_task_that_sits_out_is_not_weighed():
    model = Heads().double()
    opt = wrap(model, Noted(), nonfinite="skip", tasks=TASKS)
    losses = model.losses(batch().double())
    losses["b"] = losses["b"] * torch.inf
    opt.backward(losses)
    opt.combine()
    assert opt.rule_state["calls"].tolist() == [1, 0, 1]
    assert opt.rule_state["losses"][1] == 0
    assert opt.last.losses[1].isnan()
    assert opt.last.loss_weights[1] == 1
    assert all(p.grad.isfinite().all() for p in model.trunk.parameters())
    opt.zero_grad()
    opt.backward(model.losses(batch(1).double()))  # and is back in the next step
    opt.combine()
    assert opt.rule_state["calls"].tolist() == [2, 1, 2]


@pytest.mark.parametrize("mixed", [False, True])
def test_steps_between_reuse_the_weights(mixed):
    model = Bent().double()
    opt = wrap(model, gs.Chain(Noted(), gs.PCGrad()), every=3, tasks=TASKS)
    named = dict(model.named_parameters())
    for number in range(5):
        x = batch(number).double()[:6]
        if mixed:
            with opt.split([0, 1, 2, 0, 1, 2]):
                out = model.layers(x).square().sum(1)
            losses = {task: out[k::3].mean() for k, task in enumerate(TASKS)}
        else:
            losses = model.losses(x)
        gradients = task_gradients(losses, named)
        opt.backward(out if mixed else losses)
        opt.combine()
        weights = opt.last.weights[0] * opt.last.loss_weights
        for name, parameter in named.items():
            expected = sum(w * gradients[task][name] for w, task in zip(weights, TASKS, strict=True))
            torch.testing.assert_close(parameter.grad, expected)
        assert opt.rule_state["0"]["calls"].tolist() == [1 + number // 3] * 3
        opt.step()
        opt.zero_grad()


def test_heads_keep_their_weight_in_the_steps_between():
    model = Heads().double()
    opt = wrap(model, gs.Chain(ByLoss(), gs.MGDA()), every=2, tasks=TASKS)
    for number in range(2):
        losses = model.losses(batch(number).double())
        gradients = task_gradients(losses, dict(model.named_parameters()))
        opt.backward(losses)
        opt.combine()
        for weight, task in zip(opt.last.loss_weights, TASKS, strict=True):
            name = f"heads.{task}.weight"
            torch.testing.assert_close(model.get_parameter(name).grad, weight * gradients[task][name])
        saved = opt.state_dict()
        opt.step()
        opt.zero_grad()
    assert saved["surgery"]["reuse"]["own"].tolist() == opt.last.loss_weights.tolist()


@pytest.mark.parametrize("rule", [Noted(), gs.Chain(gs.FAMO(), Noted(), gs.PCGrad())], ids=repr)
def test_streaming_weighs_alike(rule):
    results = []
    for stream in (False, None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        opt = wrap(model, rule, groups="layer", tasks=TASKS, stream=stream)
        for number in range(4):
            with opt.split([0, 1, 2, 0, 1, 2, 0, 1]):
                losses = model(batch(number).double()).square().mean(1)
            opt.backward(losses)
            opt.step()
            opt.zero_grad()
        assert bool(opt.streaming) == (stream is None)
        results.append((model, opt))
    (model, opt), (twin, other) = results
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    torch.testing.assert_close(other.rule_state, opt.rule_state)


def test_a_rule_that_wraps_another_weighs_if_that_does():
    jacobian, losses = torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), torch.tensor([2.0, 0.5])
    assert gs.operate(jacobian, gs.CRMOGM(gs.MGDA())).shape == (2,)
    wrapped = gs.Chain(gs.CRMOGM(gs.ScaleInvariant()), gs.Mean())
    with pytest.raises(ValueError, match="weighs losses"):
        gs.operate(jacobian, wrapped)
    expected = gs.operate(jacobian, gs.Chain(gs.ScaleInvariant(), gs.Mean()), losses=losses)
    torch.testing.assert_close(gs.operate(jacobian, wrapped, losses=losses), expected)


def test_a_rule_on_given_gradients_needs_their_losses():
    jacobian = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    losses = torch.tensor([2.0, 0.5])
    found = gs.operate(jacobian, gs.Chain(gs.ScaleInvariant(), gs.PCGrad()), losses=losses)
    torch.testing.assert_close(found, gs.operate(jacobian / losses[:, None], gs.PCGrad()))
    _, state = gs.operate(jacobian, gs.IMTLL(), losses=losses, state={})
    assert state["adam"]["steps"].tolist() == [1, 1]
    for wrong, seen in ((None, "none"), (losses[:1], r"shape \(1,\)")):
        with pytest.raises(ValueError, match=rf"GLS\(\) weighs losses: pass `losses`.* 2 tasks. Found {seen}"):
            gs.operate(jacobian, gs.GLS(), losses=wrong)
