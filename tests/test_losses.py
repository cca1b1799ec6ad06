"""What `backward` takes as losses, and what it says about the rest."""

import pytest
import torch
from conftest import Bent, Heads, check_gradients, combined, task_gradients, wrap
from torch import nn

import gradsurgery as gs


def batch():
    return torch.randn(8, 4)


def expected_of(model, x, rule=None, names=None):
    losses = model.losses(x)
    gradients = task_gradients({task: losses[task] for task in names or losses}, dict(model.named_parameters()))
    return combined(gradients, lambda _: "model", rule or gs.MGDA())


# --- Forms ------------------------------------------------------------------------------------------------------------


def test_a_mapping():
    model, x = Heads(), batch()
    opt = wrap(model, gs.MGDA())
    expected = expected_of(model, x)
    opt.backward(model.losses(x))
    assert opt.tasks == ("a", "b", "c")
    opt.combine()
    check_gradients(model, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", [list, tuple])
def test_a_sequence_follows_the_order_of_the_tasks(form):
    model, x = Heads(), batch()
    opt = wrap(model, gs.MGDA(), tasks=list("cab"))
    losses = model.losses(x)
    opt.backward(form([losses["c"], losses["a"], losses["b"]]))
    opt.combine()
    torch.testing.assert_close(opt.last.losses, torch.stack([losses[t] for t in "cab"]).double())
    check_gradients(model, expected_of(model, x), rtol=1e-4, atol=1e-6)


def test_a_sequence_names_its_tasks_by_number():
    model = Heads()
    opt = wrap(model, gs.Sum())
    opt.backward(list(model.losses(batch()).values()))
    assert opt.tasks == ("0", "1", "2")


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_a_1d_tensor(source):
    model, x = nn.Linear(4, 3), batch()
    losses = lambda: (model(x) - 1).square().mean(0)  # noqa: E731
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses()]
    expected = gs.operate(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]), gs.MGDA())
    opt = wrap(model, gs.MGDA(), source=source)
    opt.backward(losses())
    assert opt.tasks == ("0", "1", "2")
    opt.combine()
    torch.testing.assert_close(torch.cat([model.weight.grad.flatten(), model.bias.grad]), expected, rtol=1e-4, atol=1e-6)


JOINED = {
    "stack": torch.stack,
    "cat": lambda losses: torch.cat([loss[None] for loss in losses]),
    "hstack": torch.hstack,
}


@pytest.mark.parametrize("source", ["autograd", "batched"])
@pytest.mark.parametrize("how", JOINED)
def test_joined_losses_keep_heads_apart(how, source):
    model, x = Heads(), batch()
    expected = expected_of(model, x)
    opt = wrap(model, gs.MGDA(), source=source, tasks=("a", "b", "c"))
    for _ in range(2):
        opt.backward(JOINED[how](list(model.losses(x).values())))
        opt.combine()
        check_gradients(model, expected, rtol=1e-4, atol=1e-6)
        assert opt.last.groups == ("model", "model [a, b]")
        torch.testing.assert_close(opt.last.losses, torch.stack(list(model.losses(x).values())).double())
        opt.zero_grad()


@pytest.mark.parametrize("source", ["autograd", "batched"])
@pytest.mark.parametrize("how", JOINED)
def test_joined_losses_of_different_dtypes(how, source):
    model, x = Bent(("a", "b")), batch()
    expected = expected_of(model, x)
    losses = model.losses(x)
    opt = wrap(model, gs.MGDA(), source=source)
    opt.backward(JOINED[how]([losses["a"], losses["b"].double()]))
    opt.combine()
    check_gradients(model, expected, rtol=1e-4, atol=1e-6)


def test_losses_of_shape_one():
    model, x = Heads(), batch()
    opt = wrap(model, gs.MGDA())
    opt.backward({task: loss.reshape(1, 1) for task, loss in model.losses(x).items()})
    opt.combine()
    check_gradients(model, expected_of(model, x), rtol=1e-4, atol=1e-6)


def test_one_task():
    model, x = Heads(), batch()
    opt = wrap(model, gs.PCGrad())
    opt.backward({"a": model.losses(x)["a"]})
    opt.combine()
    gradients = task_gradients({"a": model.losses(x)["a"]}, dict(model.named_parameters()))
    check_gradients(model, gradients["a"], rtol=0, atol=0)
    assert opt.last.gram.shape == (0, 1, 1)


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_the_order_of_a_mapping_makes_no_difference(source):
    model, x = Heads(), batch()
    rule = gs.GradVac(target=0.9, tasks=("b",))  # for which the tasks are not alike
    opt = wrap(model, rule, source=source, tasks=("a", "b", "c"))
    results = []
    for order in ("abc", "cba", "bca"):
        for _ in range(2):
            losses = model.losses(x)
            opt.backward({task: losses[task] for task in order})
            opt._surgery.generator.manual_seed(0)
            opt.combine()
            results.append((opt.last, {name: p.grad.clone() for name, p in model.named_parameters()}))
            opt.zero_grad()
    for last, gradients in results[1:]:
        torch.testing.assert_close(last.gram, results[0][0].gram, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(last.losses, results[0][0].losses)
        torch.testing.assert_close(gradients, results[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_two_tasks_may_have_the_same_loss(source):
    model, x = Bent(), batch()
    expected = expected_of(model, x, gs.Sum(), names=["a"])
    opt = wrap(model, gs.Sum(), source=source)
    loss = model.losses(x)["a"]
    opt.backward({"one": loss, "two": loss})
    opt.combine()
    check_gradients(model, {name: 2 * gradient for name, gradient in expected.items()}, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_a_parameter_may_be_a_loss(source):
    model = nn.Module()
    model.scalar, model.vector = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(3))
    opt = wrap(model, gs.Sum(), source=source)
    opt.backward({"itself": model.scalar, "other": model.scalar * model.vector.sum()})
    opt.combine()
    assert model.scalar.grad == 4
    assert torch.equal(model.vector.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_backward_works_whatever_the_gradient_mode(context):
    model, x = Heads(), batch()
    opt = wrap(model, gs.MGDA())
    losses = model.losses(x)
    with context():
        opt.backward(losses)
        opt.combine()
    check_gradients(model, expected_of(model, x), rtol=1e-4, atol=1e-6)
    assert not any(parameter.grad.requires_grad for parameter in model.parameters())


# --- Absent tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["left out", "None in a mapping", "None in a sequence"])
@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_absent_is_not_zero(form, source):
    model, x = Bent(), batch()
    expected = expected_of(model, x, gs.Mean(), names=["a", "c"])
    opt = wrap(model, gs.Mean(), source=source, tasks=("a", "b", "c"))
    losses = model.losses(x)
    if form == "left out":
        del losses["b"]
    else:
        losses["b"] = None
    opt.backward(list(losses.values()) if form == "None in a sequence" else losses)
    opt.combine()
    check_gradients(model, expected, rtol=1e-5, atol=1e-6)  # a mean over two, not over three
    assert opt.last.active.tolist() == [[True, False, True]]


@pytest.mark.parametrize("form", ["mapping", "sequence"])
def test_a_task_that_is_absent_in_the_first_step_is_known_afterwards(form):
    model, x = Bent(), batch()
    opt = wrap(model, gs.Sum())
    losses = {**model.losses(x), "b": None}
    opt.backward(losses if form == "mapping" else list(losses.values()))
    assert opt.tasks == (("a", "b", "c") if form == "mapping" else ("0", "1", "2"))
    opt.zero_grad()
    losses = model.losses(x)
    opt.backward(losses if form == "mapping" else list(losses.values()))
    opt.combine()
    assert opt.last.active.all()


# --- Bad input --------------------------------------------------------------------------------------------------------


def scalar(model):
    return model(torch.ones(1, 4)).sum()


LOSSES = {
    "an empty mapping": (lambda m: {}, ValueError, r"No losses: `backward` needs the loss of at least one task"),
    "an empty sequence": (lambda m: [], ValueError, r"No losses"),
    "only None": (lambda m: {"a": None, "b": None}, ValueError, r"Found none, or only None"),
    "only None in a sequence": (lambda m: [None, None], ValueError, r"Found none, or only None"),
    "no graph": (
        lambda m: {"a": scalar(m), "b": scalar(m).detach()},
        ValueError,
        r"The loss of task 'b' has no graph \(requires_grad=False\). Was it detached, or computed under",
    ),
    "no graph inside a stack": (
        lambda m: torch.stack([scalar(m), scalar(m).detach()]),
        ValueError,
        r"The loss of task '1' has no graph",
    ),
    "no graph in a tensor": (lambda m: torch.ones(2), ValueError, r"The loss of task '0' has no graph"),
    "a vector": (
        lambda m: {"a": m(torch.ones(3, 4))},
        ValueError,
        r"The loss of task 'a' must be a scalar. Found shape \(3, 2\); reduce it, say by .mean\(\)",
    ),
    "an empty loss": (lambda m: {"a": m(torch.ones(0, 4))}, ValueError, r"must be a scalar. Found shape \(0, 2\)"),
    "a number": (lambda m: {"a": 1.5}, TypeError, r"The loss of task 'a' must be a tensor. Found float"),
    "a 0-D tensor": (
        scalar,
        ValueError,
        r"A tensor of losses must be 1-D, one entry per task. Found shape \(\). Pass \{'task': loss\} for a single loss",
    ),
    "a 2-D tensor": (lambda m: m(torch.ones(3, 4)), ValueError, r"must be 1-D, one entry per task. Found shape \(3, 2\)"),
    "keys that are no strings": (
        lambda m: {0: scalar(m)},
        TypeError,
        r"Tasks are named by strings. Found 0 of type int",
    ),
    "something else": (
        lambda m: 3,
        TypeError,
        r"`losses` must be a mapping, a sequence or a 1-D tensor of losses. Found int",
    ),
    "a string": (lambda m: "loss", TypeError, r"`losses` must be a mapping.*Found str"),
}


@pytest.mark.parametrize("what", LOSSES)
def test_bad_losses(what):
    make, error, message = LOSSES[what]
    model = nn.Linear(4, 2)
    opt = wrap(model, gs.PCGrad())
    with pytest.raises(error, match=message):
        opt.backward(make(model))
    assert not opt.due
    opt.backward({"a": scalar(model)})
    opt.step()


KNOWN = {
    "an unknown task": (
        lambda m: {"a": scalar(m), "d": scalar(m)},
        r"Unknown task 'd': the tasks are \['a', 'b'\]. Pass all names as `tasks=` when the optimizer is made",
    ),
    "too many": (lambda m: [scalar(m)] * 3, r"one per task, in order: 2 for the tasks \['a', 'b'\]. Found 3. Name them"),
    "too few": (lambda m: [scalar(m)], r"Found 1. Name them in a mapping, or put None where a task is absent"),
    "too few in a tensor": (lambda m: torch.stack([scalar(m)]), r"2 for the tasks \['a', 'b'\]. Found 1"),
}


@pytest.mark.parametrize("what", KNOWN)
@pytest.mark.parametrize("given", [True, False])
def test_losses_that_do_not_fit_the_tasks(what, given):
    make, message = KNOWN[what]
    model = nn.Linear(4, 2)
    opt = wrap(model, gs.PCGrad(), tasks=["a", "b"] if given else None)
    if not given:
        opt.backward({"a": scalar(model), "b": -scalar(model)})
        opt.step()
    with pytest.raises(ValueError, match=message):
        opt.backward(make(model))
    assert opt.tasks == ("a", "b")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["a", "b", "a"], r"`tasks` must be distinct. Found 'a' more than once"),
        ([], r"`tasks` must be names, at least one. Found \(\)"),
        ([0, 1], r"`tasks` must be names, at least one. Found \(0, 1\)"),
        ("ab", r"`tasks` must be several names, or their number. Found the string 'ab'"),
    ],
)
def test_bad_tasks(tasks, message):
    with pytest.raises(ValueError, match=message):
        wrap(nn.Linear(4, 2), gs.PCGrad(), tasks=tasks)


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_a_loss_that_reaches_no_parameter(source):
    model = nn.Linear(4, 2)
    other = nn.Linear(4, 2)
    opt = wrap(model, gs.PCGrad(), source=source, tasks=("a", "b"))
    opt.backward({"a": scalar(model)})
    with pytest.raises(ValueError, match="loss of task 'b' reaches none of the optimizer's trainable parameters"):
        opt.backward({"a": scalar(model), "b": scalar(other)})
    assert not opt.due  # what had been filled is forgotten
    opt.step()
    assert model.weight.grad is None
    opt.backward({"a": scalar(model), "b": 2 * scalar(model)})
    opt.combine()
    torch.testing.assert_close(model.bias.grad, torch.full((2,), 3.0))


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_a_failed_first_step_teaches_no_tasks(source):
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    opt = wrap(model, gs.GradVac(), source=source)
    with pytest.raises(ValueError, match="reaches none"):
        opt.backward({"typo": scalar(other)})
    assert opt.tasks is None
    assert opt.rule_state == {}
    opt.backward({"a": scalar(model), "b": 2 * scalar(model)})
    opt.combine()
    assert opt.tasks == ("a", "b")


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_a_loss_of_frozen_parameters_only(source):
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    opt = wrap(model, gs.PCGrad(), source=source)
    with pytest.raises(ValueError, match="reaches none .* or are all parameters that it depends on frozen"):
        opt.backward({"a": model[0](torch.ones(1, 4).requires_grad_()).sum()})
