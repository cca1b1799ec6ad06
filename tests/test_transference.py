"""Transference against its definition: gradients' inner products, and what a step on one task does to the others."""

import copy

import numpy as np
import pytest
import torch
from conftest import TASKS, Bent, Heads, batch, task_gradients, wrap
from test_checkpoint import check_equal_trees, saved_and_loaded

import gradsurgery as gs


def inner(gradients, one, other, names):
    """The inner product over the parameters that both reach."""
    pairs = ((gradients[one][name], gradients[other][name]) for name in names)
    both = [(a * b).sum() for a, b in pairs if a is not None and b is not None]
    return sum(both).item() if both else None


@pytest.mark.parametrize("rule", [gs.Sum(), gs.PCGrad(), gs.DWA()], ids=repr)
@pytest.mark.parametrize("groups", ["model", "layer", "tensor"])
@pytest.mark.parametrize("relative", [True, False])
def test_it_is_the_inner_products_of_each_step(groups, relative, rule):
    model = Heads().double()
    transference = gs.Transference(lr=0.3, relative=relative, beta=0.2)
    opt = wrap(model, gs.Chain(rule, transference), groups=groups, tasks=TASKS)
    parameters = dict(model.named_parameters())
    shape = (len(opt.groups), 3, 3)
    mean, total, steps = np.full(shape, np.nan), np.zeros(shape), np.zeros(shape)
    for number in range(5):
        losses = model.losses(batch(number).double())
        if number in (1, 3):
            del losses["abc"[number - 1]]
        gradients = task_gradients(losses, parameters)
        opt.backward(losses)
        opt.combine()
        weights = opt.last.loss_weights
        for g, names in enumerate(opt.groups.values()):
            for j, source in enumerate(TASKS):
                for i, target in enumerate(TASKS):
                    if source not in losses or target not in losses:
                        continue
                    # A parameter that one task alone reaches is operated on by no rule, and is in no Gram matrix.
                    shared = [n for n in names if sum(gradients[t][n] is not None for t in losses) > 1]
                    product = inner(gradients, source, target, shared)
                    if product is None:
                        continue
                    value = 0.3 * product * (1.0 if weights is None else weights[j].item())
                    value /= losses[target].item() if relative else 1.0
                    mean[g, j, i] = value if steps[g, j, i] == 0 else 0.8 * mean[g, j, i] + 0.2 * value
                    total[g, j, i] += value
                    steps[g, j, i] += 1
        opt.step()
        opt.zero_grad()
    found = transference.read(opt)
    assert (found.tasks, found.groups) == (TASKS, tuple(opt.groups))
    np.testing.assert_array_equal(found.steps, steps)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(found.total, total, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found.matrix, total.sum(0), rtol=1e-6)


def test_it_is_the_lookahead_ratio_to_first_order():
    model = Bent().double()
    errors = []
    for lr in (1e-3, 1e-4):
        transference = gs.Transference(lr=lr)
        opt = wrap(model, transference, tasks=TASKS)
        opt.backward(model.losses(batch().double()))
        opt.combine()
        opt.zero_grad()
        found = transference.read(opt).matrix
        before = {task: loss.item() for task, loss in model.losses(batch().double()).items()}
        for j, source in enumerate(TASKS):
            after = copy.deepcopy(model)
            sgd = torch.optim.SGD(after.parameters(), lr=lr)
            after.losses(batch().double())[source].backward()
            sgd.step()
            then = after.losses(batch().double())
            for i, target in enumerate(TASKS):
                errors.append(abs(1 - then[target].item() / before[target] - found[j, i]) / lr)
    coarse, fine = max(errors[:9]), max(errors[9:])
    assert fine < 0.15 * coarse  # what is left out is of second order


def test_pairs_that_never_met():
    model = Heads().double()
    transference = gs.Transference()
    opt = wrap(model, transference, tasks=TASKS)
    opt.backward({"a": model.losses(batch().double())["a"], "b": model.losses(batch().double())["b"]})
    opt.step()
    found = transference.read(opt)
    assert np.isnan(found.matrix[2]).all()
    assert np.isnan(found.of("c", "a"))
    assert [task for task, _ in found.ranked("a")] == ["b"]
    assert found.ranked("c") == []
    assert "nan" in str(found)


def test_after_a_single_step_the_mean_is_that_step():
    x = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    transference = gs.Transference(relative=False)
    opt = wrap(torch.nn.ParameterList([x]), transference, tasks=["a", "b", "c"])
    opt.backward({"a": x.sum(), "b": x[0] - 4 * x[1]})
    opt.combine()
    found = transference.read(opt)
    np.testing.assert_array_equal(found.mean, [[[2, -3, np.nan], [-3, 17, np.nan], [np.nan] * 3]])
    np.testing.assert_array_equal(found.total, [[[2, -3, 0], [-3, 17, 0], [0] * 3]])
    assert found.ranked("a") == [("b", -3.0)]
    opt.zero_grad()
    opt.backward({"a": x.sum(), "c": 5 * x[1]})
    opt.combine()
    assert transference.read(opt).ranked("a") == [("c", 5.0), ("b", -3.0)]
    assert str(found).splitlines()[0].split() == ["source", "\\", "target", "a", "b", "c"]


def test_zero_losses_are_left_out():
    x = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    transference = gs.Transference()
    opt = wrap(torch.nn.ParameterList([x]), transference, tasks=["a", "b"])
    opt.backward({"a": x.sum() - 2, "b": x.square().sum()})
    opt.combine()
    found = transference.read(opt)
    assert found.steps[0].tolist() == [[0, 1], [0, 1]]
    assert np.isfinite(found.total).all()
    assert found.of("a", "b") == pytest.approx(4 / 2)


def test_it_changes_nothing():
    def run(rule):
        model = Heads()
        opt = wrap(model, rule, torch.optim.Adam(model.parameters(), lr=0.01))
        for number in range(3):
            opt.backward(model.losses(batch(number)))
            opt.step()
            opt.zero_grad()
        return model.state_dict()

    torch.manual_seed(0)
    first = run(gs.PCGrad())
    torch.manual_seed(0)
    check_equal_trees(run(gs.Chain(gs.PCGrad(), gs.Transference())), first)


def test_it_resumes_bit_for_bit():
    def fresh():
        torch.manual_seed(0)
        model = Heads()
        return model, wrap(model, gs.Chain(gs.Transference(), gs.PCGrad()), groups="layer", tasks=TASKS)

    def train(model, opt, numbers):
        for number in numbers:
            losses = model.losses(batch(number))
            del losses["abc"[number % 3]]
            opt.backward(losses)
            opt.step()
            opt.zero_grad()

    whole, first, second = fresh(), fresh(), fresh()
    train(*whole, range(6))
    train(*first, range(3))
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(saved_and_loaded(old.state_dict()))
    train(*second, range(3, 6))
    check_equal_trees([part.state_dict() for part in second], [part.state_dict() for part in whole])


def test_reading_needs_the_rule_and_the_tasks():
    model = Bent()
    transference = gs.Transference()
    with pytest.raises(ValueError, match="without Transference"):
        transference.read(wrap(model, gs.Chain(gs.Sum(), gs.Transference(beta=0.5)), tasks=TASKS))
    with pytest.raises(ValueError, match="does not know its tasks yet"):
        transference.read(wrap(model, transference))
    found = transference.read(wrap(model, transference, tasks=TASKS))
    with pytest.raises(ValueError, match=r"no task 'z': the tasks are \['a', 'b', 'c'\]"):
        found.ranked("z")


@pytest.mark.parametrize("given", [{"lr": 0}, {"lr": float("inf")}, {"beta": 0}, {"beta": 1.5}])
def test_settings_are_checked(given):
    with pytest.raises(ValueError, match=f"`{next(iter(given))}`"):
        gs.Transference(**given)
