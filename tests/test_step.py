"""One combination: cells, absent tasks, gradients that are not finite, and the record of what happened."""

import copy
import logging
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from conftest import TASKS, Bent, Heads, batch, check_gradients, check_same, combined, task_gradients, wrap
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurgery as gs

RULES = [gs.Sum(), gs.Mean(), gs.PCGrad(), gs.GradVac(beta=0.5), gs.GradVac(target=0.9), gs.MGDA()]
RULES.append(gs.Chain(gs.PCGrad(), gs.GradVac(), gs.Mean()))


def vector(gradients, names):
    return torch.cat([gradients[name].double().flatten() for name in names])


# --- Cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_a_parameter_of_one_task_alone_gets_its_gradient_bit_for_bit(rule, source):
    model = Heads()
    opt = wrap(model, rule, source=source)
    alone = {name: name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("heads")}
    for number in range(2):
        gradients = task_gradients(model.losses(batch(number)), dict(model.named_parameters()))
        opt.backward(model.losses(batch(number)))
        rows = dict(zip(opt._surgery.gradients.names, opt._surgery.gradients.rows, strict=True))
        left = {name: next(iter(rows[name].of.values())).clone() for name in alone}
        opt.combine()
        for name, task in alone.items():
            found = model.get_parameter(name).grad
            assert torch.equal(found, left[name])  # as the source left it
            torch.testing.assert_close(found, gradients[task][name], rtol=1e-5, atol=1e-6)
            if source == "autograd":
                assert torch.equal(found, gradients[task][name])
        opt.zero_grad()


@pytest.mark.parametrize("spec", ["model", "layer", "tensor"])
@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_partly_shared_parameters_are_a_cell_of_their_own(spec, source):
    model = Heads()
    opt = wrap(model, gs.MGDA(), groups=spec, source=source)
    group_of = {name: group for group, names in opt.groups.items() for name in names}
    for number in range(2):
        rows = task_gradients(model.losses(batch(number)), dict(model.named_parameters()))
        opt.backward(model.losses(batch(number)))
        opt.combine()
        check_gradients(model, combined(rows, group_of.get, gs.MGDA()), rtol=1e-4, atol=1e-6)
        opt.zero_grad()


def test_names_of_cells():
    model = Heads()
    opt = wrap(model, gs.PCGrad())
    opt.backward(model.losses(batch()))
    opt.combine()
    assert opt.last.groups == ("model", "model [a, b]")
    assert opt.last.active.tolist() == [[True, True, True], [True, True, False]]
    opt = wrap(model, gs.PCGrad(), groups=lambda name, _: name.split(".")[0])
    opt.backward(model.losses(batch()))
    opt.combine()
    assert opt.last.groups == ("trunk", "adapter")  # heads belong to one task each
    assert opt.last.active.tolist() == [[True, True, True], [True, True, False]]


def test_several_cells_share_the_state_of_their_group():
    model = Heads()
    opt = wrap(model, gs.GradVac(beta=0.25))
    opt.backward(model.losses(batch()))
    opt.combine()
    cosines = opt.last.cosines
    first = opt.rule_state["target"][0]
    assert first.shape == (3, 3)
    assert first[0, 1] != 0
    assert not torch.isclose(first[0, 1], 0.25 * cosines[0, 0, 1])  # the second cell has moved it on


# --- Absent tasks -----------------------------------------------------------------------------------------------------


def test_absent_pairs_keep_their_state_bit_for_bit():
    model = Bent()
    opt = wrap(model, gs.GradVac(beta=0.3), groups="tensor")
    for number in range(3):
        opt.backward(model.losses(batch(number)))
        opt.step()
        opt.zero_grad()
    before = opt.rule_state["target"].clone()
    losses = model.losses(batch(5))
    opt.backward({"a": losses["a"], "c": losses["c"]})
    opt.step()
    after = opt.rule_state["target"]
    assert torch.equal(after[:, 1], before[:, 1])
    assert torch.equal(after[:, :, 1], before[:, :, 1])
    assert (after[:, 0, 2] != before[:, 0, 2]).all()
    assert (after[:, 2, 0] != before[:, 2, 0]).all()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_absent_tasks_play_no_part(rule):
    if any(isinstance(part, (gs.PCGrad, gs.GradVac)) for part in getattr(rule, "rules", (rule,))):
        names = ("a", "c")  # two tasks: the random order makes no difference
    else:
        names = ("a", "c", "d")
    model = Bent(("a", "b", "c", "d"))
    gradients = task_gradients(model.losses(batch()), dict(model.named_parameters()))
    expected = combined({t: gradients[t] for t in names}, lambda _: "model", rule)
    opt = wrap(model, rule, tasks=("a", "b", "c", "d"))
    opt.backward({task: loss for task, loss in model.losses(batch()).items() if task in names})
    opt.combine()
    check_gradients(model, expected, rtol=1e-4, atol=1e-6)


def test_one_task_in_a_step_is_not_operated_on():
    model = Heads()
    opt = wrap(model, gs.GradVac(beta=0.3), tasks=TASKS)
    opt.backward(model.losses(batch()))
    opt.step()
    opt.zero_grad()
    before = opt.rule_state["target"].clone()
    loss = model.losses(batch(1))["b"]
    gradients = task_gradients({"b": loss}, dict(model.named_parameters()))["b"]
    opt.backward({"b": loss})
    opt.combine()
    check_gradients(model, gradients, rtol=0, atol=0)
    assert torch.equal(opt.rule_state["target"], before)
    assert opt.last.groups == ()
    torch.testing.assert_close(opt.last.losses, torch.tensor([torch.nan, loss.item(), torch.nan]).double(), equal_nan=True)


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_frozen_and_unused_parameters_have_no_gradient(source):
    model = Heads()
    model.unused = nn.Linear(3, 3)
    model.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    opt = wrap(model, gs.Mean(), torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5), source=source)
    for _ in range(2):
        opt.backward(model.losses(batch()))
        opt.combine()
        assert model.frozen.grad is None
        assert model.unused.weight.grad is None
        opt.step()
        opt.zero_grad()


# --- Gradients that are not finite ------------------------------------------------------------------------------------


def bad_losses(model, task="b", factor=float("nan"), number=0):
    losses = model.losses(batch(number))
    losses[task] = losses[task] * factor
    return losses


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_propagate(factor):
    model = Bent()
    opt = wrap(model, gs.GradVac(beta=0.5))
    opt.backward(model.losses(batch()))
    opt.combine()
    opt.zero_grad()
    before = opt.rule_state["target"].clone()
    opt.backward(bad_losses(model, factor=factor))
    opt.combine()
    assert not any(parameter.grad.isfinite().any() for parameter in model.parameters())
    assert torch.equal(opt.rule_state["target"], before)
    assert not opt.skipped


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_raise(factor):
    model = Heads()
    opt = wrap(model, gs.GradVac(), nonfinite="raise")
    opt.backward(model.losses(batch()))
    opt.step()
    opt.zero_grad()
    before = copy.deepcopy((model, opt.rule_state["target"]))
    losses = model.losses(batch())
    losses["b"] = losses["b"] + (model.heads["b"].weight * factor).sum()
    opt.backward(losses)
    with pytest.raises(
        FloatingPointError, match=r"gradient of task 'b' for parameter 'heads\.b\.weight' holds inf or nan\."
    ):
        opt.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    check_same(model, before[0])
    assert torch.equal(opt.rule_state["target"], before[1])
    opt.zero_grad()
    opt.backward(model.losses(batch()))
    opt.step()


def test_raise_counts_the_others():
    model = Bent()
    opt = wrap(model, gs.PCGrad(), nonfinite="raise")
    opt.backward(bad_losses(model, "c"))
    message = r"gradient of task 'c' for parameter 'layers\.0\.weight' holds inf or nan, and so do 3 more\."
    with pytest.raises(FloatingPointError, match=message):
        opt.combine()


def test_skip(caplog):
    model = Heads()
    gradients = task_gradients(model.losses(batch()), dict(model.named_parameters()))
    expected = combined({t: gradients[t] for t in ("a", "c")}, lambda _: "model", gs.MGDA())
    opt = wrap(model, gs.MGDA(), nonfinite="skip")
    for times in (1, 2):
        with caplog.at_level(logging.WARNING, logger="gradsurgery"):
            opt.backward(bad_losses(model))
            opt.combine()
        check_gradients(model, expected, rtol=1e-4, atol=1e-6)
        assert expected["heads.b.weight"] is None  # b sits out everywhere
        assert opt.skipped == {"b": times}
        (record,) = caplog.records
        assert record.getMessage() == (
            f"task 'b' sits out this step ({times} so far): its gradient for 'trunk.0.weight' holds inf or nan"
        )
        caplog.clear()
        opt.zero_grad()
    assert opt.last.active[0].tolist() == [True, False, True]


def test_skip_looks_at_every_gradient():
    model = Heads()
    opt = wrap(model, gs.MGDA(), nonfinite="skip")
    losses = model.losses(batch())
    losses["a"] = losses["a"] + (model.heads["a"].bias * float("inf")).sum()  # a parameter that no other task has
    opt.backward(losses)
    opt.combine()
    assert opt.skipped == {"a": 1}
    assert model.heads["a"].weight.grad is None
    assert model.heads["b"].weight.grad is not None


def test_skip_keeps_the_state_of_the_pairs():
    model = Bent()
    opt = wrap(model, gs.GradVac(beta=0.5), nonfinite="skip")
    opt.backward(model.losses(batch()))
    opt.step()
    opt.zero_grad()
    before = opt.rule_state["target"].clone()
    opt.backward(bad_losses(model))
    opt.step()
    after = opt.rule_state["target"]
    assert torch.equal(after[:, 1], before[:, 1])
    assert torch.equal(after[:, :, 1], before[:, :, 1])
    assert after[0, 0, 2] != before[0, 0, 2]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_skip_everything():
    model = Bent()
    before = copy.deepcopy(model)
    opt = wrap(model, gs.GradVac(), torch.optim.AdamW(model.parameters(), lr=0.1), nonfinite="skip")
    opt.backward({task: loss * float("nan") for task, loss in model.losses(batch()).items()})
    opt.step()
    check_same(model, before)
    assert opt.skipped == {"a": 1, "b": 1, "c": 1}
    assert opt.last.groups == ()


def test_skip_of_sparse_gradients():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    opt = wrap(model, gs.MGDA(), nonfinite="skip")
    a, b = model(torch.tensor([1, 2])).sum(), model(torch.tensor([2, 3])).square().sum() * float("inf")
    gradients = torch.autograd.grad(a, list(model.parameters()), retain_graph=True)
    opt.backward({"a": a, "b": b})
    opt.combine()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad.to_dense(), gradient.to_dense())


def test_the_count_survives_a_checkpoint():
    model = Bent()
    opt = wrap(model, gs.PCGrad(), nonfinite="skip")
    for _ in range(2):
        opt.backward(bad_losses(model))
        opt.step()
        opt.zero_grad()
    other = wrap(Bent(), gs.PCGrad(), nonfinite="skip")
    other.load_state_dict(opt.state_dict())
    assert other.skipped == {"b": 2}


def test_the_count_in_a_checkpoint_is_a_copy():
    model = Bent()
    opt = wrap(model, gs.PCGrad(), nonfinite="skip")
    for number in range(2):
        opt.backward(bad_losses(model))
        opt.combine()
        if not number:
            saved = opt.state_dict()
    assert saved["surgery"]["skipped"] == {"b": 1}
    opt.load_state_dict(saved)
    opt.backward(bad_losses(model))
    opt.combine()
    assert opt.skipped == {"b": 2}
    assert saved["surgery"]["skipped"] == {"b": 1}


def test_skip_under_a_scaler():
    model = Bent()
    opt = wrap(model, gs.MGDA(), nonfinite="skip")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    opt.backward(bad_losses(model), scaler=scaler)
    opt.combine()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 4.0  # what is left is finite
    assert opt.skipped == {"b": 1}


# --- The record -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded():
    """A step with two surgery groups, three cells and the gradients of each task."""
    model = Heads()
    opt = wrap(model, gs.PCGrad(), groups={"bottom": ["trunk.0.*"], "top": ["*"]})
    losses = model.losses(batch())
    gradients = task_gradients(losses, dict(model.named_parameters()))
    opt.backward(losses)
    opt.combine()
    cells = {
        "bottom": (("trunk.0.weight", "trunk.0.bias"), "abc"),
        "top": (("trunk.2.weight", "trunk.2.bias"), "abc"),
        "top [a, b]": (("adapter.weight", "adapter.bias"), "ab"),
    }
    rows = {cell: {t: vector(gradients[t], names) for t in tasks} for cell, (names, tasks) in cells.items()}
    return opt.last, rows, losses


def test_record_of_gradients(recorded):
    last, rows, losses = recorded
    assert last.tasks == TASKS
    assert last.groups == tuple(rows)
    assert last.active.tolist() == [[True] * 3, [True] * 3, [True, True, False]]
    assert last.gram.dtype == torch.float64
    torch.testing.assert_close(last.losses, torch.stack(list(losses.values())).double())
    for c, cell in enumerate(rows.values()):
        for i, task in enumerate(TASKS):
            if task not in cell:
                assert last.norms[c, i].isnan()
                assert not last.gram[c, i].any()
                continue
            torch.testing.assert_close(last.norms[c, i], cell[task].norm(), rtol=1e-6, atol=0)
            for j, other in enumerate(TASKS):
                if other not in cell:
                    assert last.gram[c, i, j] == 0
                    assert last.cosines[c, i, j].isnan()
                    continue
                product = cell[task] @ cell[other]
                torch.testing.assert_close(last.gram[c, i, j], product, rtol=1e-5, atol=1e-7)
                if i == j:
                    assert last.cosines[c, i, j].isnan()
                else:
                    cosine = product / cell[task].norm() / cell[other].norm()
                    torch.testing.assert_close(last.cosines[c, i, j], cosine, rtol=1e-5, atol=1e-6)
                    assert last.conflicts[c, i, j] == (product < 0)


def test_record_of_operations(recorded):
    last, rows, _ = recorded
    wanted = [
        (cell, i, j) for cell, tasks in rows.items() for i in tasks for j in tasks if i != j and tasks[i] @ tasks[j] < 0
    ]
    assert wanted
    assert last.named_pairs(last.conflicts) == wanted
    narrow = [(i, j) for cell, i, j in wanted if cell == "top [a, b]"]
    assert [(i, j) for cell, i, j in last.named_pairs(last.operated) if cell == "top [a, b]"] == narrow  # two tasks
    operated = last.mixing.clone()
    operated.diagonal(dim1=1, dim2=2).zero_()
    operated[2, 2] = operated[2, :, 2] = 0
    assert torch.equal(last.operated, operated != 0)
    assert not (last.operated & ~last.pairs).any()
    total = len([1 for cell in rows.values() for i in cell for j in cell if i != j])
    assert total == int(last.pairs.sum()) == 14
    operated_on = int(last.operated.sum())
    assert (
        repr(last)
        == f"Step(3 tasks, 3 groups: {len(wanted)} of 14 pairs in conflict, {operated_on} of 14 pairs operated on)"
    )


def test_weights_are_how_much_of_each_gradient_is_in_the_result():
    for rule in RULES:
        model = Heads()
        opt = wrap(model, rule)
        gradients = task_gradients(model.losses(batch()), dict(model.named_parameters()))
        opt.backward(model.losses(batch()))
        opt.combine()
        for c, (name, tasks) in enumerate({"trunk.0.weight": "abc", "adapter.weight": "ab"}.items()):
            expected = sum(opt.last.weights[c, k].float() * gradients[task][name] for k, task in enumerate(tasks))
            torch.testing.assert_close(dict(model.named_parameters())[name].grad, expected, rtol=1e-4, atol=1e-5)
        assert opt.last.weights[1, 2].isnan()
        opt.zero_grad()


def test_a_zero_gradient_has_no_cosine():
    model = nn.Linear(4, 2)
    opt = wrap(model, gs.PCGrad())
    opt.backward({"a": model(batch()).sum(), "zero": 0 * model(batch()).sum()})
    opt.combine()
    assert opt.last.cosines.isnan().all()
    assert not opt.last.conflicts.any()
    assert opt.last.norms[0, 1] == 0


class Count(TorchDispatchMode):
    """Counts the operations that touch a tensor of at least so many elements."""

    def __init__(self, least):
        super().__init__()
        self.least = least
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        if any(isinstance(leaf, torch.Tensor) and leaf.numel() >= self.least for leaf in leaves):
            self.names.append(func.overloadpacket.__name__)
        return result


VIEWS = {
    "view",
    "t",
    "transpose",
    "_unsafe_view",
    "as_strided",
    "select",
    "slice",
    "detach",
    "alias",
    "empty_like",
    "permute",
}


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_two_passes_over_the_gradients_and_no_more(rule, source):
    model = nn.Linear(50, 40, bias=False)
    opt = wrap(model, rule, source=source)
    for _ in range(2):
        opt.zero_grad()
        out = model(torch.randn(3, 50))
        opt.backward({"a": out.mean(), "b": out.square().mean(), "c": -out[:, 0].sum()})
        with Count(2000) as count:
            opt.combine()
    assert sorted(name for name in count.names if name not in VIEWS) == ["mm", "mv"]  # the Gram matrix, the combination
    with Count(2000) as count:
        for what in ("norms", "cosines", "conflicts", "operated", "weights", "losses"):
            getattr(opt.last, what)
        repr(opt.last)
    assert count.names == []


def test_two_passes_when_tasks_come_and_go():
    model = nn.Linear(50, 40, bias=False)
    opt = wrap(model, gs.PCGrad(), tasks=TASKS)
    for tasks in ("ab", "bc", "abc", "ac", "abc"):
        out = model(torch.randn(3, 50))
        opt.backward({task: out[:, k].square().mean() + out.mean() for k, task in enumerate("abc") if task in tasks})
        with Count(2000) as count:
            opt.combine()
        opt.zero_grad()
        if tasks == "abc":  # each task has been seen here before, so that its row has a place
            assert sorted(name for name in count.names if name not in VIEWS) == ["mm", "mv"]


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_vectorised_pass_cannot_tell_whose_gradient_is_not_finite(nonfinite):
    with pytest.raises(ValueError, match=f"nonfinite='{nonfinite}' needs source='autograd'"):
        wrap(Heads(), gs.Sum(), nonfinite=nonfinite, source="batched")


def test_records_are_the_same_if_they_are_the_same_object():
    opt = wrap(model := Bent(), gs.PCGrad())
    opt.backward(model.losses(batch()))
    opt.combine()
    assert opt.last == opt.last
    assert opt.last != copy.copy(opt.last)
    assert opt.last not in [copy.deepcopy(opt.last)]


@dataclass(frozen=True)
class Draws(gs.Rule):
    """Notes the random numbers that it draws, one in each level."""

    random: ClassVar[bool] = True

    seen: list[float] = field(default_factory=list, compare=False, repr=False)

    def mix(self, gram, state, *, active=None, generator=None):
        self.seen.append(float(torch.rand((), generator=generator)))
        return super().mix(gram, state, active=active, generator=generator)


@pytest.mark.parametrize("model_class", [Bent, Heads])
def test_random_numbers_go_on_from_level_to_level_and_from_step_to_step(model_class):
    model, rule = model_class(), Draws()
    opt = wrap(model, rule, seed=5)
    for number in range(3):
        opt.backward(model.losses(batch(number)))
        opt.step()
        opt.zero_grad()
    generator = torch.Generator().manual_seed(5)
    levels = 1 if model_class is Bent else 2
    assert rule.seen == [float(torch.rand((), generator=generator)) for _ in range(3 * levels)]
    assert torch.equal(opt.state_dict()["surgery"]["generator"], generator.get_state())


def test_gradients_at_right_angles_are_no_conflict():
    x = nn.Parameter(torch.ones(3))
    opt = gs.SurgeryOptimizer(torch.optim.SGD([x], lr=0.1), gs.PCGrad())
    opt.backward({"a": x[0], "b": x[1], "c": x[2] - x[0]})
    opt.step()
    figures = opt.last.figures()
    assert figures["surgery/conflict/model"] == pytest.approx(2 / 6)
    assert figures["surgery/operated/model"] == pytest.approx(2 / 6)
    assert figures["surgery/cosine/model"] == pytest.approx(-(2**-0.5) / 3)
