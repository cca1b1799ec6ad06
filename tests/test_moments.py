"""The moments of a rule beside `mix`: `weigh` before the backward pass, `observe` after the combination."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import gradsurgery as gs


@dataclass(frozen=True)
class ByLoss(gs.Rule):
    """Weighs each loss by its own value, and counts the steps in which each task was there."""

    def init(self, tasks, groups, *, device=None, dtype=torch.float64):
        return {"seen": torch.zeros(len(tasks), device=device)}

    def weigh(self, losses, state, *, active=None):
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
