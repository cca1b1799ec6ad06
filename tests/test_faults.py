"""Faults found in public implementations of gradient surgery, none of which is to come back here."""

import copy

import pytest
import torch
from conftest import TASKS, Bent, Heads, batch, check_same, pcgrad, task_gradients, wrap
from torch import nn

import gradsurgery as gs

RULES = [gs.Mean(), gs.PCGrad(), gs.GradVac(target=0.5), gs.MGDA()]


class TwoHeads(nn.Module):
    """A shared vector on which the two tasks conflict, and heads whose gradients are much longer than that conflict."""

    def __init__(self, head_scale=10.0):
        super().__init__()
        self.shared = nn.Parameter(torch.tensor([1.0, 1.0]))
        self.head_a, self.head_b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.head_scale = head_scale

    def losses(self):
        a = self.shared @ torch.tensor([1.0, 1.0]) + self.head_scale * self.head_a.sum()
        b = self.shared @ torch.tensor([-1.0, 0.0]) + self.head_scale * self.head_b.sum()
        return {"a": a, "b": b}


def test_heads_do_not_dilute_the_projection():
    # The worked case (1, 1), (-1, 0). Over the whole vector the heads' length would all but cancel the projection.
    for head_scale in (0.0, 10.0, 1e4):
        model = TwoHeads(head_scale)
        opt = wrap(model, gs.Chain(gs.PCGrad(), gs.Mean()))
        opt.backward(model.losses())
        opt.combine()
        torch.testing.assert_close(model.shared.grad, torch.tensor([-0.25, 0.75]))
        torch.testing.assert_close(opt.last.cosines[0, 0, 1].item(), -(0.5**0.5))


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_other_tasks_heads_are_not_changed(rule, source):
    model = TwoHeads()
    opt = wrap(model, rule, source=source)
    opt.backward(model.losses())
    opt.combine()
    assert torch.equal(model.head_a.grad, torch.full((3,), 10.0))
    assert torch.equal(model.head_b.grad, torch.full((3,), 10.0))


def test_parameters_of_some_tasks_are_not_averaged_over_all():
    model = Heads()
    rows = task_gradients(model.losses(batch()), dict(model.named_parameters()))
    opt = wrap(model, gs.Mean())
    opt.backward(model.losses(batch()))
    opt.combine()
    for name, parameter in model.named_parameters():
        there = [rows[task][name] for task in TASKS if rows[task][name] is not None]
        torch.testing.assert_close(parameter.grad, sum(there) / len(there), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["frozen", "unused"])
@pytest.mark.parametrize("source", ["autograd", "batched"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_weight_decay_does_not_move_what_is_frozen_or_unused(what, source, set_to_none):
    model = Heads()
    model.extra = nn.Linear(3, 3)
    if what == "frozen":
        model.extra.requires_grad_(False)
    before = copy.deepcopy(model)
    opt = wrap(model, gs.PCGrad(), torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5), source=source)
    for number in range(2):
        opt.backward(model.losses(batch(number)))
        opt.step()
        opt.zero_grad(set_to_none)
    check_same(model.extra, before.extra)
    assert model.extra.weight.grad is None
    assert not torch.equal(model.adapter.weight, before.adapter.weight)


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_who_is_there_is_not_read_off_the_values(source):
    # The gradient of b happens to be zero: b is still one of two tasks, of which the mean is taken.
    model = nn.Linear(4, 1)
    opt = wrap(model, gs.Mean(), source=source)
    opt.backward({"a": model(batch()).sum(), "b": torch.relu(model(batch()) - 1e6).sum()})
    opt.combine()
    assert opt.last.active.tolist() == [[True, True]]
    assert opt.last.norms[0, 1] == 0
    torch.testing.assert_close(model.bias.grad, torch.tensor([4.0]))
    # And a coordinate that happens to be zero does not take its parameter out of the projection.
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3))
    vectors = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 3.0, 0.0]])
    opt = wrap(model, gs.PCGrad(), source=source)
    opt.backward({"a": model.weight @ vectors[0], "b": model.weight @ vectors[1]})
    opt.combine()
    torch.testing.assert_close(model.weight.grad, pcgrad(*vectors))


def test_the_wrapper_keeps_the_state_dict_groups_and_schedulers_whole():
    model = Bent()
    inner = torch.optim.Adam(model.parameters(), lr=0.5)
    opt = wrap(model, gs.PCGrad(), inner)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    opt.backward(model.losses(batch()))
    opt.step()
    scheduler.step()
    assert inner.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == 0.25
    assert opt.state_dict()["state"] == inner.state_dict()["state"]
    assert opt.state_dict()["state"]
    model.more = nn.Linear(2, 2)
    opt.add_param_group({"params": model.more.parameters()})
    assert len(inner.param_groups) == 2


def test_the_moving_average_is_in_the_checkpoint():
    model = Bent()
    opt = wrap(model, gs.GradVac(beta=0.5), groups="layer")
    for number in range(3):
        opt.backward(model.losses(batch(number)))
        opt.step()
        opt.zero_grad()
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    fresh = Bent()
    other = wrap(fresh, gs.GradVac(beta=0.5), groups="layer")  # which has not seen any task yet
    fresh.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert opt.rule_state["target"].any()
    assert torch.equal(other.rule_state["target"], opt.rule_state["target"])


def test_the_moving_average_moves_whether_the_rule_fires_or_not():
    # It would only fall if it were updated by conflicts alone.
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2))
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # cosine 0.6
    opt = wrap(model, gs.GradVac(beta=0.5))
    targets = []
    for _ in range(3):
        opt.backward({"a": model.weight @ vectors[0], "b": model.weight @ vectors[1]})
        opt.combine()
        targets.append(opt.rule_state["target"][0, 0, 1].item())
    torch.testing.assert_close(targets, [0.3, 0.45, 0.525])


@pytest.mark.parametrize("spec", ["model", "layer", "module", "tensor"])
def test_parameters_of_a_non_leaf_module_are_not_missed(spec):
    model = nn.Module()
    model.position = nn.Parameter(torch.ones(4))  # held by the root, which has children
    model.block = nn.Module()
    model.block.gate = nn.Parameter(torch.ones(4))
    model.block.linear = nn.Linear(4, 2)

    def losses():
        out = model.block.linear((batch() + model.position) * model.block.gate)
        return {"a": out[:, 0].mean(), "b": -out[:, 0].mean() + out[:, 1].square().mean()}

    opt = wrap(model, gs.PCGrad(), groups=spec)
    members = [name for names in opt.groups.values() for name in names]
    assert sorted(members) == sorted(name for name, _ in model.named_parameters())
    opt.backward(losses())
    opt.combine()
    rows = task_gradients(losses(), dict(model.named_parameters()))
    for names in opt.groups.values():
        a, b = (torch.cat([rows[task][name].flatten() for name in names]) for task in "ab")
        found = torch.cat([dict(model.named_parameters())[name].grad.flatten() for name in names])
        torch.testing.assert_close(found, pcgrad(a, b), rtol=1e-4, atol=1e-6)


def test_processes_with_the_same_seed_draw_the_same_order():
    results = []
    for rank in range(2):
        torch.manual_seed(0)
        model = Bent("abcde")
        opt = wrap(model, gs.PCGrad(), seed=11)
        torch.manual_seed(rank)  # as data-parallel processes have it, so that their dropout differs
        torch.rand(rank)
        for number in range(3):
            opt.backward(model.losses(batch(number)))
            opt.step()
            opt.zero_grad()
        results.append(model)
    check_same(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conflicts_are_not_measured_in_half_precision(dtype):
    # Two nearly orthogonal gradients whose conflict is a few thousandths: sums in half precision lose its sign.
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(4096, generator=generator)
    b = torch.randn(4096, generator=generator)
    b = b - (b @ a) / (a @ a) * a - 2e-3 * a
    a, b = a.to(dtype), b.to(dtype)
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(4096, dtype=dtype))
    opt = wrap(model, gs.PCGrad())
    opt.backward({"a": (model.weight * a).sum(), "b": (model.weight * b).sum()})
    opt.combine()
    exact = a.double() @ b.double()
    assert exact < 0
    torch.testing.assert_close(opt.last.gram[0, 0, 1], exact, rtol=1e-4, atol=0)
    assert opt.last.conflicts[0, 0, 1]
    expected = pcgrad(a.double(), b.double())
    torch.testing.assert_close(model.weight.grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1e-12, 1e-25])
@pytest.mark.parametrize("rule", [gs.PCGrad(), gs.MGDA()], ids=repr)
def test_small_gradients_are_operated_on_too(rule, scale):
    model = TwoHeads()
    opt = wrap(model, rule)
    opt.backward({task: loss * scale for task, loss in model.losses().items()})
    opt.combine()
    rows = torch.tensor([[1.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(model.shared.grad.double() / scale, gs.operate(rows, rule), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vectors", [[[1, 2], [2, 4]], [[1, 2], [-1, -2]], [[1, 2], [0, 0]], [[0, 0], [0, 0]]], ids=str)
@pytest.mark.parametrize("rule", [*RULES, gs.GradVac(beta=0.5)], ids=repr)
def test_parallel_opposite_and_zero_gradients_are_finite(rule, vectors):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2))
    opt = wrap(model, rule)
    for _ in range(3):
        opt.backward({str(k): model.weight @ torch.tensor(v, dtype=torch.float32) for k, v in enumerate(vectors)})
        opt.step()
        opt.zero_grad()
        assert model.weight.isfinite().all()
    assert all(value.isfinite().all() for value in opt.rule_state.values())
