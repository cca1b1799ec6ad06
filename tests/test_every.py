"""``every=n``: the last mixing is reused in the steps between."""

import copy

import pytest
import torch
from conftest import Bent, Heads, batch, check_same, task_gradients, wrap
from torch import nn

import gradsurgery as gs
from gradsurgery._reuse import nearest_weights
from gradsurgery._step import Step


@pytest.mark.parametrize("rule", [gs.PCGrad(), gs.MGDA()], ids=repr)
def test_a_parameter_of_one_task_alone_keeps_its_gradient(rule):
    model = Heads().double()
    opt = wrap(model, rule, every=3)
    named = dict(model.named_parameters())
    for number in range(5):
        gradients = task_gradients(model.losses(batch(number).double()), named)
        opt.backward(model.losses(batch(number).double()))
        opt.combine()
        for task in gradients:
            torch.testing.assert_close(named[f"heads.{task}.weight"].grad, gradients[task][f"heads.{task}.weight"])
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("rule", [gs.PCGrad(), gs.GradVac(beta=0.5), gs.MGDA()], ids=repr)
@pytest.mark.parametrize("every", [2, 3])
def test_one_group_is_exact(rule, every):
    model = Bent().double()
    opt = wrap(model, rule, every=every)
    named = dict(model.named_parameters())
    for number in range(6):
        gradients = task_gradients(model.losses(batch(number).double()), named)
        opt.backward(model.losses(batch(number).double()))
        opt.combine()
        if number % every == 0:
            weights, seen = opt.last.weights[0], opt.last
        assert opt.last is seen
        for name, parameter in named.items():
            expected = sum(w * gradients[task][name] for w, task in zip(weights, opt.tasks, strict=True))
            torch.testing.assert_close(parameter.grad, expected)
        opt.step()
        opt.zero_grad()


def test_mixed_batches_reuse_it_too():
    model = Bent().double()
    twin = copy.deepcopy(model)
    opts = [wrap(m, gs.PCGrad(), every=2, tasks=["a", "b", "c"]) for m in (model, twin)]
    for number in range(5):
        x = batch(number).double()[:6]
        with opts[0].split([0, 1, 2, 0, 1, 2]):
            losses = model.layers(x).square().sum(1)
        opts[0].backward(losses)
        out = twin.layers(x).square().sum(1)
        opts[1].backward({task: out[k::3].mean() for k, task in enumerate("abc")})
        for opt in opts:
            opt.step()
            opt.zero_grad()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_accumulated_passes_are_one_step():
    model = Bent().double()
    twin = copy.deepcopy(model)
    opt, other = wrap(model, gs.PCGrad(), every=2), wrap(twin, gs.PCGrad(), every=2)
    for number in range(4):
        for half in (slice(4), slice(4, None)):
            opt.backward(model.losses(batch(number).double()[half]))
        opt.step()
        opt.zero_grad()
        parts = [twin.losses(batch(number).double()[half]) for half in (slice(4), slice(4, None))]
        other.backward({task: parts[0][task] + parts[1][task] for task in parts[0]})
        other.step()
        other.zero_grad()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("groups", ["model", "layer"])
def test_a_checkpoint_continues_bit_for_bit(groups):
    def steps(model, opt, numbers):
        for number in numbers:
            opt.backward(model.losses(batch(number)))
            opt.step()
            opt.zero_grad()

    model = Heads()
    opt = wrap(model, gs.GradVac(), groups=groups, every=3)
    steps(model, opt, range(5))
    twin = copy.deepcopy(model)
    again = wrap(twin, gs.GradVac(), groups=groups, every=3)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    steps(model, opt, range(5, 10))
    steps(twin, again, range(5, 10))
    check_same(model, twin)


def test_checkpoints_from_before_there_was_such_a_thing():
    model = Bent()
    opt = wrap(model, gs.PCGrad())
    opt.backward(model.losses(batch()))
    opt.step()
    state = opt.state_dict()
    del state["surgery"]["reuse"]
    again = wrap(model, gs.PCGrad(), every=2)
    again.load_state_dict(state)
    opt.backward(model.losses(batch()))


def test_a_task_that_was_absent_has_weight_one():
    model = Bent().double()
    opt = wrap(model, gs.MGDA(), every=2, tasks=["a", "b", "c"])
    losses = model.losses(batch().double())
    opt.backward({"a": losses["a"], "b": losses["b"]})
    opt.step()
    opt.zero_grad()
    gradient = task_gradients(model.losses(batch().double()), dict(model.named_parameters()))["c"]
    opt.backward({"c": model.losses(batch().double())["c"]})
    opt.combine()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradient[name])


def test_frozen_and_unused_parameters_keep_no_gradient():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "frozen": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    opt = wrap(model, gs.PCGrad(), every=2)
    for _ in range(4):
        out = model["frozen"](model["used"](torch.randn(5, 3)))
        opt.backward({"a": out.mean(), "b": -out.square().mean()})
        opt.combine()
        assert [name for name, p in model.named_parameters() if p.grad is not None] == ["used.weight", "used.bias"]
        opt.step()
        opt.zero_grad()


def test_nearest_weights_of_several_groups():
    jacobian = torch.randn(4, 3, 10, dtype=torch.float64)
    columns = torch.rand(4, 3, dtype=torch.float64)
    step = Step(
        tasks=("a", "b", "c"),
        groups=tuple("wxyz"),
        active=torch.ones(4, 3, dtype=torch.bool),
        gram=jacobian @ jacobian.mT,
        mixing=torch.diag_embed(columns),
        losses=torch.zeros(3, dtype=torch.float64),
    )
    target = (columns[..., None] * jacobian).sum(1).flatten()
    stacked = jacobian.transpose(0, 1).flatten(1)  # [K, G * D]
    best = torch.linalg.lstsq(stacked.T, target).solution
    torch.testing.assert_close(nearest_weights(step), best, rtol=2e-2, atol=2e-2)
    same = torch.diag_embed(columns[:1].expand(4, 3))
    equal = Step(step.tasks, step.groups, step.active, step.gram, same, step.losses)
    torch.testing.assert_close(nearest_weights(equal), columns[0])


@pytest.mark.parametrize("rule", [gs.PCGrad(), gs.Mean(), gs.Chain(gs.GLS(), gs.MGDA())], ids=repr)
@pytest.mark.parametrize("first", [True, False])
def test_what_a_skipped_step_found_is_not_reused(rule, first):
    model = Bent().double()
    opt = wrap(model, rule, every=3)
    named, weights = dict(model.named_parameters()), torch.ones(3, dtype=torch.float64)
    if not first:
        for _ in range(3):
            opt.backward(model.losses(batch().double()))
            opt.step()
            opt.zero_grad()
        weights = opt.last.weights[0] * (1 if opt.last.loss_weights is None else opt.last.loss_weights)
    losses = model.losses(batch().double())
    opt.backward({task: loss * (torch.inf if task == "b" else 1.0) for task, loss in losses.items()})
    opt.combine()
    assert not model.layers[0].weight.grad.isfinite().all()  # which a GradScaler looks for
    opt.zero_grad()
    for number in range(2):
        losses = model.losses(batch(number).double())
        gradients = task_gradients(losses, named)
        opt.backward(losses)
        opt.combine()
        expected = sum(w * gradients[task]["layers.0.weight"] for w, task in zip(weights, opt.tasks, strict=True))
        torch.testing.assert_close(model.layers[0].weight.grad, expected)
        opt.zero_grad()


@pytest.mark.parametrize("first", [True, False])
def test_heads_of_a_skipped_step_keep_the_weights_from_before(first):
    model = Heads().double()
    opt = wrap(model, gs.Chain(gs.GLS(), gs.MGDA()), every=2, tasks=["a", "b", "c"])
    weights = torch.ones(3, dtype=torch.float64)
    if not first:
        for number in range(2):
            opt.backward(model.losses(batch(number).double()))
            opt.step()
            opt.zero_grad()
        weights = opt.last.loss_weights
    opt.backward({task: loss * torch.inf for task, loss in model.losses(batch().double()).items()})
    opt.combine()
    opt.zero_grad()
    losses = model.losses(batch().double())
    gradients = task_gradients(losses, dict(model.named_parameters()))
    opt.backward(losses)
    opt.combine()
    for weight, task in zip(weights, opt.tasks, strict=True):
        name = f"heads.{task}.weight"
        torch.testing.assert_close(model.get_parameter(name).grad, weight * gradients[task][name])


def test_errors():
    model = Bent()
    for every in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="`every` must be a number of steps, at least 1"):
            wrap(model, gs.PCGrad(), every=every)
    with pytest.raises(ValueError, match="needs every=1"):
        wrap(model, gs.PCGrad(), every=2, nonfinite="skip")


@pytest.mark.parametrize("settings", [{"every": 2}, {"measure": False}], ids=str)
def test_gradients_that_are_equal_are_not_the_same_tensor(settings):
    model = nn.ParameterDict({name: torch.zeros(3) for name in "xyz"})
    opt = wrap(model, gs.Sum(), **settings)
    for _ in range(2):
        opt.zero_grad()
        total = model["x"] + model["y"] + model["z"]
        opt.backward([total.sum(), 2 * total.sum()])
        opt.combine()
    assert len({parameter.grad.data_ptr() for parameter in model.values()}) == 3
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert torch.cat([parameter.grad for parameter in model.values()]).norm() == pytest.approx(1.0, abs=1e-5)
