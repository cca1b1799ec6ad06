"""docs/migration.md: the blocks before and after train alike, and the conventions are as its tables say."""

import copy
import random

import pytest
import torch
from conftest import check_gradients, task_gradients, wrap
from test_docs import blocks
from torch import nn
from torchjd import aggregation

import gradsurgery as gs

CONFLICT = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])


def run(*codes):
    torch.manual_seed(0)
    namespace = {}
    for code in codes:
        exec(compile(code, "docs/migration.md", "exec"), namespace)
    return [parameter.detach().clone() for parameter in namespace["model"].parameters()]


def test_torchjd_before_and_after():
    setup, _, before, after, *_ = blocks("docs/migration.md")
    assert "torchjd" in before
    assert "torchjd" not in after
    trained = run(setup, before)
    for parameter, start in zip(trained, run(setup), strict=True):
        assert not torch.equal(parameter, start)
    for parameter, expected in zip(run(setup, after), trained, strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)  # TorchJD's MGDA stops at 1e-3


def pytorch_pcgrad(gradients, parameters):
    """Pytorch-PCGrad, line by line: name → gradient of one long vector, with zeros where a task has none."""
    long = {
        task: torch.cat([torch.zeros(parameters[name].numel()) if g is None else g.flatten() for name, g in rows.items()])
        for task, rows in gradients.items()
    }
    projected = []
    for task in long:
        g = long[task].clone()
        for other in random.sample(sorted(long), len(long)):
            product = g @ long[other]
            if product < 0:
                g -= product / long[other].norm() ** 2 * long[other]
        projected.append(g)
    sizes = [parameter.numel() for parameter in parameters.values()]
    result = {}
    for i, (name, parameter) in enumerate(parameters.items()):
        rows = torch.stack([g.split(sizes)[i] for g in projected])
        everyone = all(gradients[task][name] is not None for task in gradients)
        result[name] = (rows.mean(0) if everyone else rows.sum(0)).view_as(parameter)
    return result


def two_losses(model, heads=None):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    out = model(x)
    a, b = out.split(1, 1) if heads is None else (head(out) for head in heads)
    both = b + a if heads is None else b
    return {"a": (a[:, 0] - x.sum(1)).square().mean(), "b": (both[:, 0] + x.sum(1)).square().mean()}


def test_pytorch_pcgrad_without_heads():
    """The same, if the mean is asked for."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    model = nn.Sequential(model, nn.Linear(2, 2))
    parameters = dict(model.named_parameters())
    expected = pytorch_pcgrad(task_gradients(two_losses(model), parameters), parameters)
    opt = wrap(model, gs.Chain(gs.PCGrad(), gs.Mean()))
    opt.backward(two_losses(model))
    opt.combine()
    assert opt.last.conflicts.any()
    check_gradients(model, expected, rtol=1e-4, atol=1e-6)


def test_pytorch_pcgrad_with_heads():
    """There, a task's head is changed by the other task; here it is not."""
    trunk, heads = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])
    model = nn.ModuleList([trunk, heads])
    with torch.no_grad():
        heads[1].weight.copy_(heads[0].weight)  # opposite goals through the same weights: a conflict
    parameters = dict(model.named_parameters())
    rows = task_gradients(two_losses(trunk, heads), parameters)
    theirs = pytorch_pcgrad(rows, parameters)
    opt = wrap(model, gs.PCGrad())
    opt.backward(two_losses(trunk, heads))
    opt.combine()
    assert opt.last.conflicts.any()
    torch.testing.assert_close(heads[0].weight.grad, rows["a"]["1.0.weight"])
    assert not torch.allclose(theirs["1.0.weight"], rows["a"]["1.0.weight"])


@pytest.mark.parametrize(
    ("name", "expected"), [("Sum", (0, 1)), ("Mean", (0, 0.5)), ("PCGrad", (-0.5, 1.5)), ("MGDA", (-0.2, 0.4))]
)
def test_numbers_of_gradsurgery_and_torchjd(name, expected):
    torch.testing.assert_close(gs.operate(CONFLICT, getattr(gs, name)()), torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(getattr(aggregation, name)()(CONFLICT), torch.tensor(expected, dtype=torch.float32))


def test_numbers_of_pytorch_pcgrad():
    parameters = {"x": torch.zeros(2)}
    rows = {task: {"x": row} for task, row in zip("ab", CONFLICT, strict=True)}
    torch.testing.assert_close(pytorch_pcgrad(rows, parameters)["x"], torch.tensor([-0.25, 0.75]))
    mean = gs.operate(CONFLICT, gs.Chain(gs.PCGrad(), gs.Mean()))
    torch.testing.assert_close(mean, torch.tensor([-0.25, 0.75]))


def test_a_fresh_gradvac_of_torchjd_refuses_its_state():
    theirs = aggregation.GradVac()
    theirs(CONFLICT)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        aggregation.GradVac().load_state_dict(theirs.state_dict())
    model = nn.Linear(2, 1)
    opt = wrap(model, gs.GradVac(), tasks=2)
    opt.backward([model(torch.ones(2)).sum(), -model(torch.ones(2)).sum()])
    opt.step()
    fresh = wrap(copy.deepcopy(model), gs.GradVac(), tasks=2)
    fresh.load_state_dict(opt.state_dict())
    assert torch.equal(fresh.rule_state["target"], opt.rule_state["target"])
    assert opt.rule_state["target"].any()
