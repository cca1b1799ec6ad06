"""Joint losses: training loops that call ``loss.backward()`` themselves get what ``backward(losses)`` does."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import Bent, Heads, batch, check_same, wrap
from torch import nn

import gradsurgery as gs

RULES = [gs.PCGrad(), gs.GradVac(beta=0.3), gs.MGDA(), gs.Mean()]


def pair(rule, model_class=Bent, **settings):
    """Twice the same model and optimizer: the first is for joint losses."""
    model = model_class()
    twin = copy.deepcopy(model)
    return model, wrap(model, rule, **settings), twin, wrap(twin, rule, **settings)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("source", ["autograd", "batched"])
@pytest.mark.parametrize("model_class", [Heads, Bent])
def test_same_as_backward(rule, source, model_class):
    model, opt, twin, other = pair(rule, model_class, source=source)
    for number in range(4):
        loss = opt.joint_loss(model.losses(batch(number)))
        losses = twin.losses(batch(number))
        torch.testing.assert_close(loss.detach(), sum(losses.values()).detach())
        loss.backward()
        other.backward(losses)
        for o in (opt, other):
            o.step()
            o.zero_grad()
        assert torch.equal(opt.last.gram, other.last.gram)
        assert torch.equal(opt.last.losses, other.last.losses)
    check_same(model, twin)


def mixed():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 2, 0])
    return model, ids


@pytest.mark.parametrize("groups", ["model", "layer"])
def test_mixed_batches(groups):
    model, ids = mixed()
    twin = copy.deepcopy(model)
    opt, other = (wrap(m, gs.GradVac(beta=0.3), tasks=3, groups=groups) for m in (model, twin))
    for number in range(4):  # with layers, the later ones stream
        x = batch(number)
        with opt.split(ids):
            losses = (model(x)[:, 0] - ids).square()
        loss = opt.joint_loss(losses)
        opt.zero_grad()  # as loops do between forward and backward pass
        loss.backward()
        with other.split(ids):
            losses = (twin(x)[:, 0] - ids).square()
        other.backward(losses)
        opt.step()
        other.step()
        other.zero_grad()
        assert torch.equal(loss.detach(), other.last.losses.sum().float())
    check_same(model, twin)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_loop_may_scale_it(rule):
    """The mean over accumulated passes, under a scaler: rules see the mean, without the scale."""
    model, opt, twin, other = pair(rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(3):
        for number in range(4):
            loss = opt.joint_loss(model.losses(batch(4 * step + number)), scaler=scaler) / 4
            scaler.scale(loss).backward()
        opt.combine()
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        for number in range(4):
            other.backward({task: loss / 4 for task, loss in twin.losses(batch(4 * step + number)).items()})
        other.step()
        assert torch.equal(opt.last.gram, other.last.gram)
        assert torch.equal(opt.last.losses, other.last.losses)
        opt.zero_grad()
        other.zero_grad()
    check_same(model, twin)


def test_steps_between_surgery():
    model, opt, twin, other = pair(gs.PCGrad(), every=2)
    for number in range(4):
        (opt.joint_loss(model.losses(batch(number))) / 2).backward()
        other.backward({task: loss / 2 for task, loss in twin.losses(batch(number)).items()})
        for o in (opt, other):
            o.step()
            o.zero_grad()
    check_same(model, twin)


def test_the_gradient_of_a_half_precision_loss_has_room_for_a_scale():
    model = Bent()
    opt = wrap(model, gs.PCGrad())
    losses = {task: loss.half() for task, loss in model.losses(batch()).items()}
    loss = opt.joint_loss(losses)
    assert loss.dtype == torch.float32
    assert opt.joint_loss({task: loss.double() for task, loss in losses.items()}).dtype == torch.float64


def test_an_overflow_shows_up_in_the_gradients():
    model = Bent()
    opt = wrap(model, gs.GradVac(beta=0.3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before = copy.deepcopy(model)
    losses = model.losses(batch())
    losses["b"] = losses["b"] * torch.inf
    scaler.scale(opt.joint_loss(losses, scaler=scaler, combine=True)).backward()
    scaler.step(opt)
    scaler.update()
    check_same(model, before)
    assert scaler.get_scale() == 2.0**11
    assert not opt.rule_state["target"].any()


def test_further_terms_go_past_the_rule():
    model, opt, twin, other = pair(gs.PCGrad())
    penalty = lambda m: 0.1 * m.layers[0].weight.square().sum()  # noqa: E731
    (opt.joint_loss(model.losses(batch())) + penalty(model)).backward()
    other.backward(twin.losses(batch()))
    penalty(twin).backward()
    opt.step()
    other.step()
    check_same(model, twin)


def test_combining_at_the_end_of_the_backward_pass():
    model, opt, twin, other = pair(gs.PCGrad())
    opt.joint_loss(model.losses(batch(0))).backward()
    assert opt.due
    opt.joint_loss(model.losses(batch(1)), combine=True).backward()
    assert not opt.due
    for number in range(2):
        other.backward(twin.losses(batch(number)))
    other.combine()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)
    with pytest.raises(RuntimeError, match=r"combined by the joint loss, and cannot take in more .*one joint loss"):
        opt.joint_loss(model.losses(batch(2))).backward()


@pytest.mark.parametrize("clear", ["step", "zero_grad", "model"])
def test_what_ends_a_step_that_was_combined(clear):
    model = Bent()
    opt = wrap(model, gs.PCGrad())
    opt.joint_loss(model.losses(batch()), combine=True).backward()
    {"step": opt.step, "zero_grad": opt.zero_grad, "model": model.zero_grad}[clear]()
    opt.joint_loss(model.losses(batch()), combine=True).backward()


def test_a_second_backward_pass():
    model = Bent()
    loss = wrap(model, gs.PCGrad()).joint_loss(model.losses(batch()))
    loss.backward()
    with pytest.raises(RuntimeError, match=r"for the second time\. Make a new one"):
        loss.backward()


def test_errors_come_at_once_or_as_they_are():
    model = Bent()
    opt = wrap(model, gs.PCGrad())
    with pytest.raises(ValueError, match="has no graph"):
        opt.joint_loss({"a": torch.zeros(())})
    unreached = nn.Parameter(torch.ones(()))
    loss = opt.joint_loss({"a": unreached * 2, "b": unreached.square()})
    with pytest.raises(ValueError, match="The loss of task 'a' reaches none"):
        loss.backward()
    assert not opt.due


def test_what_it_is_multiplied_with_may_be_trained():
    model = Bent()
    opt = wrap(model, gs.PCGrad())
    loss = opt.joint_loss(model.losses(batch()))
    factor = torch.ones((), requires_grad=True)
    (loss * factor).backward()
    assert torch.equal(factor.grad, loss.detach())
    assert opt.due


def test_the_graph_is_freed():
    model = Bent()
    opt = wrap(model, gs.PCGrad())
    losses = model.losses(batch())

    def probe(gradient):
        return None

    losses["a"].register_hook(probe)
    kept = weakref.ref(probe)
    loss = opt.joint_loss(losses)
    del losses, probe
    assert kept() is not None
    loss.backward()
    gc.collect()
    assert loss.grad_fn is not None
    assert kept() is None


def test_a_model_that_was_moved_after_its_optimizer_was_made():
    """Made as if on another device: names of the same one that differ do."""
    model, opt, twin, other = pair(gs.PCGrad(), tasks=["a", "b", "c"], seed=3)
    opt._surgery.gradients.device = torch.device("cpu", 7)
    opt._surgery.generator = torch.Generator().manual_seed(99)
    for number in range(2):
        opt.backward(model.losses(batch(number)))
        opt.step()
        other.backward(twin.losses(batch(number)))
        other.step()
    assert opt._surgery.gradients.device == torch.device("cpu")
    check_same(model, twin)


@pytest.mark.parametrize("joint", [False, True])
def test_a_model_that_was_moved_ahead_of_a_mixed_batch(joint):
    model, ids = mixed()
    opt = wrap(model, gs.PCGrad(), tasks=3)
    opt._surgery.gradients.device = torch.device("cpu", 7)
    with opt.split(ids):
        losses = model(batch())[:, 0].square()
    if joint:
        opt.joint_loss(losses).backward()
    else:
        opt.backward(losses)
    opt.step()
    assert opt.last.losses.isfinite().all()
