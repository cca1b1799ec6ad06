"""A target-only run beside the real one: bit for bit what a run of its own would be."""

import copy

import pytest
import torch
from conftest import batch, check_gradients, wrap
from test_checkpoint import check_equal_trees, saved_and_loaded
from torch import nn

import gradsurgery as gs


class Net(nn.Module):
    """A trunk with dropout and batch normalisation, and two heads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4))
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in ("a", "b")})

    def loss(self, task, x):
        return (self.heads[task](self.trunk(x))[:, 0] - (3 if task == "a" else -3) * x.sum(1)).square().mean()


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
    "adam, capturable": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.02)),
}


def training(optimizer, steps, *, tasks=("a", "b"), shadow=True, start=0, made=None):
    """Model, optimizer, scheduler and shadow after some steps."""
    if made is None:
        model = Net()
        opt = wrap(model, gs.PCGrad(), OPTIMIZERS[optimizer](model.parameters()), tasks=["a", "b"])
        scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
        made = model, opt, scheduler, gs.Shadow(opt, target="a") if shadow else None
        torch.manual_seed(7)
    model, opt, scheduler, beside = made
    for number in range(start, start + steps):
        x = batch(number)
        if beside is not None:
            beside.step(lambda m, x=x: m.loss("a", x))
        for task in tasks:
            opt.backward({task: model.loss(task, x)})
        opt.step()
        opt.zero_grad()
        scheduler.step()
    return made


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_target_only_run_bit_for_bit(optimizer):
    model, *_, shadow = training(optimizer, 5, tasks=("a",))
    check_equal_trees(shadow.model.state_dict(), model.state_dict())
    assert shadow.gap(lambda m: m.loss("a", batch(9))) == 0
    assert shadow.steps == 5


def test_other_tasks_do_not_reach_it():
    # One random number generator: "b" would draw other masks for "a" in the next step.
    class Without(Net):
        def __init__(self):
            super().__init__()
            self.trunk[3] = nn.Identity()

    def run(tasks):
        model = Without()
        opt = wrap(model, gs.PCGrad(), OPTIMIZERS["adamw"](model.parameters()), tasks=["a", "b"])
        return training(
            "adamw", 5, tasks=tasks, made=(model, opt, torch.optim.lr_scheduler.StepLR(opt, 2), gs.Shadow(opt, target="a"))
        )

    alone, both = run(("a",)), run(("a", "b"))
    check_equal_trees(both[3].model.state_dict(), alone[0].state_dict())
    gap = both[3].gap(lambda m: m.loss("a", batch(9)))
    assert gap == both[3].history[0].gap != 0
    with torch.no_grad():
        expected = [run[0].eval().loss("a", batch(9)).item() for run in (both, alone)]
    assert both[3].history == [gs.GapRecord(5, *expected)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_real_training_does_not_notice(optimizer):
    beside, without = training(optimizer, 4), training(optimizer, 4, shadow=False)
    check_equal_trees(beside[0].state_dict(), without[0].state_dict())
    check_equal_trees(beside[1].state_dict(), without[1].state_dict())


def test_measuring_leaves_modes_and_random_numbers():
    model, *_, shadow = training("sgd", 2)
    model.trunk[1].eval()
    state = torch.get_rng_state()
    modes = [module.training for module in model.modules()]

    def risk(m):
        assert not m.training
        assert not torch.is_grad_enabled()
        return float(torch.rand(()))

    assert shadow.gap(risk) == 0  # the same numbers for both
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    shadow.step(lambda m: m.loss("a", batch(3)))
    assert [module.training for module in shadow.model.modules()] == modes


def test_it_starts_where_the_training_is():
    model, opt, *_ = training("adamw", 3)
    opt.backward({"a": model.loss("a", batch(8))})
    opt.combine()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    shadow = gs.Shadow(opt, target="a")
    check_equal_trees(shadow.model.state_dict(), model.state_dict())
    check_equal_trees(shadow.optimizer.state_dict(), opt.optimizer.state_dict())
    assert all(p.grad is None for p in shadow.model.parameters())
    check_gradients(model, {name: gradients.get(name) for name, _ in model.named_parameters()})
    ours = {id(p) for group in shadow.optimizer.param_groups for p in group["params"]}
    assert ours == {id(p) for p in shadow.model.parameters()}


def test_it_resumes_bit_for_bit():
    whole = training("adamw", 6)
    whole[3].gap(lambda m: m.loss("a", batch(9)))
    first = training("adamw", 3)
    random = torch.get_rng_state()
    second = training("adamw", 0)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(saved_and_loaded(old.state_dict()))
    torch.set_rng_state(random)
    training("adamw", 3, start=3, made=second)
    second[3].gap(lambda m: m.loss("a", batch(9)))
    check_equal_trees([part.state_dict() for part in second[:2]], [part.state_dict() for part in whole[:2]])
    check_equal_trees(second[3].state_dict(), whole[3].state_dict())


def test_gradients_can_be_clipped():
    *_, shadow = training("sgd", 0)
    before = copy.deepcopy(shadow.model)
    shadow.step(lambda m: m.loss("a", batch()), before_step=lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e-3))
    moved = torch.cat([(p - q).flatten() for p, q in zip(shadow.model.parameters(), before.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.05 * 1e-3, rel=1e-3)


def test_a_step_that_fails_leaves_nothing():
    def fails(model):
        raise MemoryError

    model, *_, shadow = training("sgd", 1)
    *_, other = training("sgd", 1)
    with pytest.raises(MemoryError):
        shadow.step(lambda m: m.loss("a", batch()), before_step=fails)
    assert all(parameter.grad is None for parameter in shadow.model.parameters())
    with pytest.raises(ValueError, match="reaches no parameter of the shadow"):
        shadow.step(lambda _: model.loss("a", batch()))
    for beside in (shadow, other):
        beside.step(lambda m: m.loss("a", batch()) + model.trunk[0].weight.sum())  # by mistake, of the real model too
    assert all(parameter.grad is None for parameter in model.parameters())
    for one, two in zip(shadow.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_frozen_parameters_are_followed():
    model, *_, shadow = training("sgd", 1)
    model.trunk.requires_grad_(False)
    before = shadow.model.trunk[0].weight.clone()
    shadow.step(lambda m: m.loss("a", batch()))
    assert torch.equal(shadow.model.trunk[0].weight, before)


def test_wrong_use_is_named():
    model, opt, _, shadow = training("sgd", 1)
    x = batch()
    for call, error, message in (
        (lambda: gs.Shadow(opt.optimizer, target="a"), TypeError, "`optimizer` must be a SurgeryOptimizer"),
        (lambda: gs.Shadow(opt, target="c"), ValueError, r"one of the tasks \['a', 'b'\]\. Found 'c'"),
        (lambda: shadow.step(lambda m: m.trunk(x)), ValueError, "must be a scalar with a graph"),
        (lambda: shadow.step(lambda m: 1.0), ValueError, "Found float"),
        (lambda: shadow.step(lambda _: model.loss("a", x)), ValueError, "reaches no parameter of the shadow"),
        (lambda: shadow.load_state_dict({"target": "b"}), ValueError, "is of 'b', this one is of 'a'"),
    ):
        with pytest.raises(error, match=message):
            call()
    plain = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.Sum())
    with pytest.raises(ValueError, match="make the optimizer with model="):
        gs.Shadow(plain, target="a")
    with pytest.raises(ValueError, match="Found LBFGS"):
        gs.Shadow(wrap(model, gs.Sum(), torch.optim.LBFGS(model.parameters())), target="a")
    opt.optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="other parameter groups"):
        shadow.step(lambda m: m.loss("a", x))
