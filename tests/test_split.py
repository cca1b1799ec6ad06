"""The single pass inside the optimizer: a mixed batch trains as one backward pass per task does."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import check_same, combined, task_gradients, wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import check_equal_trees, saved_and_loaded
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from zoo import Net

import gradsurgery as gs
from gradsurgery.sources._split import Pass, cuts

IDS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
RULES = [gs.PCGrad(), gs.GradVac(beta=0.3)]


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network():
    """Every parameter is shared by all tasks."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def made(rule=None, tasks=3, model=None, optimizer=None, **settings):
    model = model or network()
    inner = optimizer and optimizer(model.parameters(), lr=0.01)
    return model, wrap(model, rule or gs.PCGrad(), inner, **{"groups": "layer", "tasks": tasks, **settings})


def batch(step=0, count=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 4, generator=generator), torch.randn(count, 3, generator=generator)


def errors(model, x, y, ids=None):
    """``[B, 3]``; each task has a direction of its own."""
    sign = 1 if ids is None else 1 - 2 * (torch.as_tensor(ids) % 2)[:, None]
    return (model(x) - sign * y - x[:, :3].sum(1, keepdim=True)).square()


def by_task(losses, ids, reduction="mean"):
    return {str(k): getattr(losses[ids == k], reduction)() for k in ids.unique().tolist()}


def backward(opt, model, step=0, ids=IDS, **options):
    with opt.split(ids):
        losses = errors(model, *batch(step, len(ids)), ids).mean(1)
    opt.backward(losses, **options)
    return losses


def gradients(opt):
    opt.combine()
    return [None if p.grad is None else p.grad.clone() for group in opt.param_groups for p in group["params"]]


def check_close(found, expected):
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-11)


# --- The same training ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_as_one_backward_pass_per_task(data):
    tasks = data.draw(st.integers(1, 5), label="tasks")
    rule = data.draw(st.sampled_from([*RULES, gs.Sum(), gs.Chain(gs.PCGrad(), gs.Mean())]), label="rule")
    optimizer = data.draw(st.sampled_from([torch.optim.SGD, torch.optim.AdamW]), label="optimizer")
    reduction = data.draw(st.sampled_from(["mean", "sum"]), label="reduction")
    flat = data.draw(st.booleans(), label="losses [B]")
    model, opt = made(rule, tasks, optimizer=optimizer)
    plain = copy.deepcopy(model)
    _, other = made(rule, tasks, plain, optimizer)
    for step in range(3):
        ids = torch.tensor(data.draw(st.lists(st.integers(0, tasks - 1), min_size=1, max_size=12), label="ids"))
        x, y = batch(data.draw(st.integers(0, 1000)) + step, len(ids))
        with opt.split(ids, reduction=reduction):
            losses = errors(model, x, y)
            losses = losses.mean(1) if flat else losses
        opt.backward(losses)
        expected = errors(plain, x, y)
        other.backward(by_task(expected.mean(1) if flat else expected, ids, reduction))
        for both in (opt, other):
            both.step()
            both.zero_grad()
        torch.testing.assert_close(opt.last.losses, other.last.losses, equal_nan=True)
        assert torch.equal(opt.last.active, other.last.active)
        check_close([opt.last.gram], [other.last.gram])
    check_close(model.parameters(), plain.parameters())
    torch.testing.assert_close(opt.rule_state, other.rule_state)


FORMS = {
    "names": [str(k) for k in IDS.tolist()],
    "a tuple of names": tuple(str(k) for k in IDS.tolist()),
    "names and indices": [str(k) if k else k for k in IDS.tolist()],
    "a list": IDS.tolist(),
    "numpy": IDS.numpy(),
    "int32": IDS.int(),
    "uint8": IDS.to(torch.uint8),
    "numpy int16": IDS.numpy().astype(np.int16),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_task_ids(form):
    model, opt = made()
    backward(opt, model)
    expected = gradients(opt)
    opt.zero_grad()
    opt = made(model=model)[1]
    with opt.split(FORMS[form]):
        losses = errors(model, *batch(), IDS).mean(1)
    opt.backward(losses)
    assert all(map(torch.equal, gradients(opt), expected))


def test_a_number_of_tasks():
    model, opt = made(tasks=3)
    assert opt.tasks == ("0", "1", "2")
    backward(opt, model)
    opt.combine()
    assert opt.last.tasks == ("0", "1", "2")


def test_tasks_learned_from_a_first_mapping():
    model, opt = made(tasks=None)
    opt.backward(by_task(errors(model, *batch()), IDS))
    opt.step()
    backward(opt, model)
    opt.step()
    assert opt.last.active.all()


def test_the_order_of_samples_does_not_matter():
    model, opt = made(gs.Sum())
    x, y = batch()
    results = []
    for order in (torch.arange(len(IDS)), torch.randperm(len(IDS)), IDS.argsort(stable=True)):
        with opt.split(IDS[order]):
            losses = errors(model, x[order], y[order])
        opt.backward(losses)
        results.append(gradients(opt))
        opt.zero_grad()
    check_close(results[1], results[0])
    check_close(results[2], results[0])


def test_absent_tasks():
    model, opt = made(gs.GradVac(beta=0.3), tasks=4)
    backward(opt, model, ids=torch.tensor([0, 1, 2, 3] * 2))
    opt.step()
    opt.zero_grad()
    before = opt.rule_state["target"].clone()
    backward(opt, model, 1, ids=torch.tensor([3, 0, 0, 2, 3, 0]))
    opt.step()
    assert opt.last.active.tolist() == [[True, False, True, True]] * len(opt.groups)
    assert opt.last.losses.isnan().tolist() == [False, True, False, False]
    after, here = opt.rule_state["target"], torch.tensor([0, 2, 3])
    assert torch.equal(after[:, 1], before[:, 1])
    assert torch.equal(after[:, :, 1], before[:, :, 1])
    off = ~torch.eye(3, dtype=torch.bool)
    assert (after != before)[:, here][:, :, here][:, off].all()


def test_only_one_task():
    model, opt = made(gs.GradVac())
    losses = errors(model, *batch()).mean(1)
    expected = torch.autograd.grad(losses.mean(), list(model.parameters()))
    backward(opt, model, ids=torch.ones(len(IDS), dtype=torch.long) * 2)
    check_close(gradients(opt), expected)
    assert opt.last.groups == ()


def test_losses_of_many_dimensions():
    model, opt = made(gs.Sum(), groups="model")
    x = torch.randn(len(IDS), 2, 5, 4)
    with opt.split(IDS):
        losses = model(x).square()
    opt.backward(losses)
    expected = sum(by_task(model(x).square(), IDS).values())
    check_close(gradients(opt), torch.autograd.grad(expected, list(model.parameters())))


# --- Several passes, and what goes on around them ---------------------------------------------------------------------


def test_passes_add_up():
    model, opt = made()
    plain = copy.deepcopy(model)
    _, other = made(model=plain)
    for step, ids in enumerate([IDS, torch.tensor([2, 2, 1]), torch.tensor([0])]):
        backward(opt, model, step, ids)
        other.backward(by_task(errors(plain, *batch(step, len(ids)), ids).mean(1), ids))
    check_close(gradients(opt), gradients(other))
    check_close([opt.last.gram, opt.last.losses], [other.last.gram, other.last.losses])


@pytest.mark.parametrize("split_first", [True, False])
def test_a_split_pass_and_a_mapping(split_first):
    model, opt = made()
    plain = copy.deepcopy(model)
    _, other = made(model=plain)
    for step in range(2):
        if (step == 0) == split_first:
            backward(opt, model, step)
        else:
            opt.backward(by_task(errors(model, *batch(step), IDS).mean(1), IDS))
        other.backward(by_task(errors(plain, *batch(step), IDS).mean(1), IDS))
    check_close(gradients(opt), gradients(other))


def test_gradients_add_up_until_zero_grad():
    model, opt = made(gs.Sum())
    backward(opt, model)
    once = gradients(opt)
    backward(opt, model)
    check_close(gradients(opt), [2 * gradient for gradient in once])
    opt.zero_grad()
    backward(opt, model)
    check_close(gradients(opt), once)


def test_zero_grad_forgets_a_pass():
    model, opt = made()
    backward(opt, model)
    expected = gradients(opt)
    opt = made(model=model)[1]
    backward(opt, model, 5, torch.tensor([1, 1, 0]))
    opt.zero_grad()
    assert not opt.due
    backward(opt, model)
    assert all(map(torch.equal, gradients(opt), expected))


@pytest.mark.parametrize("verify", [True, False])
def test_retain_graph(verify):
    model, opt = made(gs.Sum(), verify=verify)
    losses = backward(opt, model, retain_graph=True)
    once = gradients(opt)
    with opt.split(IDS):
        pass
    opt.backward(losses)
    check_close(gradients(opt), [2 * gradient for gradient in once])
    with pytest.raises(RuntimeError, match="second time"):
        losses.sum().backward()


@pytest.mark.parametrize("verify", [True, False])
def test_the_graph_is_freed(verify):
    model, opt = made(verify=verify)
    losses = backward(opt, model)
    with pytest.raises(RuntimeError, match="second time"):
        losses.sum().backward()


def test_backward_inside_the_block():
    model, opt = made()
    backward(opt, model)
    expected = gradients(opt)
    opt.zero_grad()
    opt = made(model=model)[1]
    with opt.split(IDS):
        opt.backward(errors(model, *batch(), IDS).mean(1))
    assert all(map(torch.equal, gradients(opt), expected))


def test_clipping():
    model, opt = made()
    backward(opt, model)
    plain = gradients(opt)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(norm, torch.cat([gradient.flatten() for gradient in plain]).norm())
    check_close([p.grad for p in model.parameters()], [gradient * 0.1 / (norm + 1e-6) for gradient in plain])
    opt.step()  # which does not combine again
    assert opt.last is not None


def test_a_closure():
    model, opt = made()
    plain = copy.deepcopy(model)
    _, other = made(model=plain)

    def closure():
        opt.zero_grad()
        return backward(opt, model).sum()

    assert opt.step(closure) > 0
    backward(other, plain)
    other.step()
    check_same(model, plain)


# --- Precision --------------------------------------------------------------------------------------------------------


def scaled_step(model, opt, scaler, step, factors=1.0):
    with opt.split(IDS):
        losses = errors(model, *batch(step), IDS).mean(1).float() * factors
    opt.backward(losses, scaler=scaler)
    opt.combine()
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


@pytest.mark.parametrize("rule", [*RULES, gs.MGDA()], ids=repr)
def test_a_scaler_changes_nothing(rule):
    model, opt = made(rule)
    plain = copy.deepcopy(model)
    _, other = made(rule, model=plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for step in range(4):
        scaled_step(model, opt, scaler, step)
        scaled_step(plain, other, torch.amp.GradScaler("cpu", enabled=False), step)
        assert torch.equal(opt.last.gram, other.last.gram)
        assert torch.equal(opt.last.losses, other.last.losses)
    assert scaler.get_scale() == 2.0**14
    check_same(model, plain)


def test_an_overflow_skips_the_step_and_leaves_the_state():
    model, opt = made(gs.GradVac(beta=0.3), optimizer=torch.optim.Adam)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(model, opt, scaler, 0)
    before = copy.deepcopy((model, opt.rule_state["target"]))
    scaled_step(model, opt, scaler, 1, torch.where(IDS == 1, torch.inf, 1.0))
    assert scaler.get_scale() == 512.0
    check_same(model, before[0])
    assert torch.equal(opt.rule_state["target"], before[1])
    scaled_step(model, opt, scaler, 2)
    assert not torch.equal(opt.rule_state["target"], before[1])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("cache", [True, False])
def test_autocast(cache):
    torch.set_default_dtype(torch.float32)
    model, opt = made(gs.Sum())
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache), opt.split(IDS):
        losses = errors(model, x, y, IDS)
    assert model(x).dtype == torch.float32
    expected = combined(task_gradients(by_task(losses, IDS), dict(model.named_parameters())), lambda _: "model", gs.Sum())
    opt.backward(losses)
    opt.combine()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - expected[name]).norm() <= 0.02 * expected[name].norm(), name


# --- Models -----------------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net[3:](checkpoint(self.net[:3], x, use_reentrant=False))


@pytest.mark.parametrize("stream", [None, False])
def test_activation_checkpointing(stream):
    model, opt = made(stream=stream)
    plain = copy.deepcopy(model)
    _, other = made(model=plain)
    wrapped = Checkpointed(model)
    for step in range(3):
        backward(opt, wrapped, step)
        backward(other, plain, step)
        for both in (opt, other):
            both.step()
            both.zero_grad()
    check_same(model, plain)


def test_a_function_of_parameters():
    model, opt = made()
    backward(opt, model)
    expected = gradients(opt)
    opt = made(model=model)[1]
    opt.zero_grad()
    backward(opt, lambda x: functional_call(model, dict(model.named_parameters()), (x,)))
    assert all(map(torch.equal, gradients(opt), expected))


def test_a_compiled_model():
    """If one insists: it is one operation then, taken task by task."""
    model, opt = made()
    compiled = torch.compile(model, backend="aot_eager")
    other = made(model=model)[1]

    def insisting(x):
        with torch.compiler.set_stance("default"):
            return compiled(x)

    for step in range(3):
        backward(opt, model, step)
        expected = gradients(opt)
        opt.zero_grad()
        backward(other, insisting, step)
        check_close(gradients(other), expected)
        other.zero_grad()


class Heads(nn.Module):
    """A trunk, and a head for each task; each head on the samples of its task."""

    def __init__(self, tasks=4):
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(tasks))

    def losses(self, x, ids, way):
        hidden = self.trunk(x).tanh()
        if way == "masked":
            losses = torch.zeros(len(x))
            for k, head in enumerate(self.heads):
                losses[ids == k] = head(hidden[ids == k]).square().sum(1)
            return losses
        if way == "put together":
            parts = [head(hidden[ids == k]).square().sum(1) for k, head in enumerate(self.heads)]
            return torch.cat(parts)[ids.argsort(stable=True).argsort()]
        return torch.stack([head(hidden).square().sum(1) for head in self.heads], 1)[torch.arange(len(x)), ids]


@pytest.mark.parametrize("groups", ["model", "layer", "tensor"])
@pytest.mark.parametrize("way", ["masked", "put together", "picked"])
def test_each_head_gets_its_task_alone(way, groups):
    model = Heads()
    _, opt = made(tasks=4, model=model, groups=groups)
    x, ids = torch.randn(8, 4), torch.tensor([1, 0, 3, 0, 1, 1, 3, 0])
    with opt.split(ids):
        losses = model.losses(x, ids, way)
    own = by_task(model.losses(x, ids, "masked"), ids)
    opt.backward(losses)
    opt.combine()
    for k, head in enumerate(model.heads):
        if str(k) in own:
            expected = torch.autograd.grad(own[str(k)], list(head.parameters()), retain_graph=True)
            check_close([p.grad for p in head.parameters()], expected)
        else:
            assert all(p.grad is None for p in head.parameters())
    assert {name.split(".")[0] for name in opt.last.groups} <= {"model", "trunk"}
    assert opt.last.active.tolist() == [[True, True, False, True]] * len(opt.last.groups)


def test_a_part_that_some_tasks_reach():
    model = nn.ModuleDict({"all": nn.Linear(4, 5), "some": nn.Linear(5, 5), "head": nn.Linear(5, 1)})
    _, opt = made(model=model, groups="model")
    x = torch.randn(len(IDS), 4)
    with opt.split(IDS):
        hidden = model["all"](x).tanh()
        hidden = hidden.index_put((IDS < 2,), model["some"](hidden[IDS < 2]))
        losses = model["head"](hidden)[:, 0].square()
    opt.backward(losses)
    opt.combine()
    assert opt.last.groups == ("model", "model [0, 1]")
    assert opt.last.active.tolist() == [[True, True, True], [True, True, False]]


def test_computed_weights_of_some_tasks():
    model = Net(None, first=(4, 3), second=(4, 3))
    _, opt = made(gs.Sum(), model=model, groups="model")
    x, low, high = torch.randn(len(IDS), 4), IDS < 2, IDS > 0
    with opt.split(IDS):
        out = x.new_zeros(len(IDS), 3).index_put((low,), x[low] @ model.first.exp())
        out = out + x.new_zeros(len(IDS), 3).index_put((high,), x[high] @ model.second.exp())
        losses = out.square().mean(1)
    expected = torch.autograd.grad(sum(by_task(losses, IDS).values()), list(model.parameters()), retain_graph=True)
    opt.backward(losses)
    check_close(gradients(opt), expected)
    assert opt.last.groups == ("model", "model [1, 2]")
    assert opt.last.active.tolist() == [[True, True, False], [False, True, True]]


@pytest.mark.parametrize("frozen", ["0", "2", "5"])
def test_frozen_parameters(frozen):
    model, opt = made()
    plain = copy.deepcopy(model)
    _, other = made(model=plain)
    for step, freeze in enumerate((True, False)):
        for net in (model, plain):
            net.get_submodule(frozen).requires_grad_(not freeze)
        backward(opt, model, step)
        other.backward(by_task(errors(plain, *batch(step), IDS).mean(1), IDS))
        check_close([g for g in gradients(opt) if g is not None], [g for g in gradients(other) if g is not None])
        assert all((p.grad is None) == (freeze and name.startswith(frozen)) for name, p in model.named_parameters())
        opt.zero_grad()
        other.zero_grad()


# --- What is not finite -----------------------------------------------------------------------------------------------

LAYERS = {
    "linear": lambda: seq(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "linear on [B, T, D]": lambda: seq(nn.Unflatten(1, (2, 2)), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Flatten()),
    "layer norm": lambda: seq(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
    "conv": lambda: seq(nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 3, 2), nn.GroupNorm(3, 3), nn.Flatten()),
    "embedding": lambda: Net(lambda m, x: m.out(m.embed((IDS + 1) % 3) * x), embed=nn.Embedding(3, 4), out=nn.Linear(4, 3)),
    "parameters": lambda: Net(lambda m, x: (x * m.scale + m.shift) @ m.w, scale=(4,), shift=(4,), w=(4, 3)),
}
seq = nn.Sequential


def nan_batch():
    x = torch.randn(len(IDS), 4)
    x[1, 2] = torch.nan  # of task 1, which has another sample too
    return x


@pytest.mark.parametrize("layer", LAYERS)
def test_nan_stays_in_its_task(layer):
    model, opt = made(model=LAYERS[layer](), nonfinite="raise", groups="model")
    with opt.split(IDS):
        losses = model(nan_batch()).square().mean(1)
    opt.backward(losses)
    held = opt._surgery.gradients
    for name, rows in zip(held.names, held.rows, strict=True):
        for task, row in rows.of.items():
            assert task == 1 or row.isfinite().all(), (name, task)
    with pytest.raises(FloatingPointError, match=r"The gradient of task '1' for parameter '.*' holds inf or nan"):
        opt.combine()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_task_with_nan_sits_out(layer, caplog):
    model, opt = made(model=LAYERS[layer](), nonfinite="skip", groups="model")
    x = nan_batch()
    with opt.split(IDS):
        losses = model(x).square().mean(1)
    opt.backward(losses)
    opt.combine()
    assert opt.skipped == {"1": 1}
    assert "task '1' sits out" in caplog.text
    assert not opt.last.active[:, 1].any()
    fine = model(x.nan_to_num()).square().mean(1)
    expected = {k: loss for k, loss in by_task(fine, IDS).items() if k != "1"}
    expected = combined(task_gradients(expected, dict(model.named_parameters())), lambda _: "model", gs.PCGrad())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


# --- Rules that weigh -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByLoss(gs.Rule):
    """Weighs each task by its loss, and remembers the losses."""

    def init(self, tasks, groups, *, device=None, dtype=torch.float64):
        return {"losses": torch.zeros(len(tasks), dtype=dtype, device=device)}

    def weigh(self, losses, state, *, active=None, generator=None):
        return losses + 1, {"losses": losses, "active": active}


def test_a_rule_that_weighs():
    model, opt = made(ByLoss(), tasks=4)
    losses = errors(model, *batch(), IDS).mean(1)
    own = by_task(losses, IDS)
    expected = torch.autograd.grad(sum((loss.detach() + 1) * loss for loss in own.values()), list(model.parameters()))
    backward(opt, model)
    opt.combine()
    check_close([opt.rule_state["losses"]], [torch.stack([*own.values(), torch.zeros(())]).detach()])
    assert opt.rule_state["active"].tolist() == [True, True, True, False]
    check_close(gradients(opt), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_losses_that_are_seen(reduction):
    model, opt = made(gs.Sum(), tasks=4)
    with opt.split(IDS, reduction=reduction):
        losses = errors(model, *batch())
    opt.backward(losses)
    opt.combine()
    expected = [*by_task(losses, IDS, reduction).values(), torch.tensor(torch.nan)]
    torch.testing.assert_close(opt.last.losses, torch.stack(expected).detach(), equal_nan=True)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*RULES, gs.Chain(gs.PCGrad(), gs.GradVac(beta=0.3))], ids=repr)
def test_a_checkpoint_continues_bit_for_bit(rule):
    model, opt = made(rule, optimizer=torch.optim.AdamW)

    def train(model, opt, steps):
        for step in steps:
            backward(opt, model, step, IDS.roll(step))
            opt.step()
            opt.zero_grad()

    train(model, opt, range(3))
    saved = saved_and_loaded({"model": model.state_dict(), "opt": opt.state_dict()})
    twin, other = made(rule, optimizer=torch.optim.AdamW)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    train(model, opt, range(3, 7))
    train(twin, other, range(3, 7))
    check_same(model, twin)
    check_equal_trees(other.state_dict(), opt.state_dict())


# --- Errors -----------------------------------------------------------------------------------------------------------

WRONG_IDS = {
    "an unknown index": ([0, 3], ValueError, r"`task_ids` must be indices of the 3 tasks, 0 to 2\. Found 3\."),
    "a negative index": ([0, -1], ValueError, r"0 to 2\. Found -1\."),
    "an unknown name": (["0", "x"], ValueError, r"Unknown task 'x' in `task_ids`: the tasks are \['0', '1', '2'\]"),
    "no ids": ([], ValueError, r"`task_ids` is empty: .* one for each sample"),
    "an empty tensor": (torch.zeros(0, dtype=torch.long), ValueError, r"`task_ids` is empty"),
    "2-D ids": (IDS.view(2, 4), ValueError, r"`task_ids` must be 1-D, .* Found shape \(2, 4\)"),
    "0-dim ids": (torch.tensor(1), ValueError, r"must be 1-D, one for each sample\. Found shape \(\)"),
    "float ids": (IDS.double(), TypeError, r"`task_ids` must be integers\. Found dtype torch\.float64"),
    "float numpy ids": (IDS.double().numpy(), TypeError, r"must be integers\. Found dtype torch\.float64"),
    "a mask": (IDS > 0, TypeError, r"must be integers\. Found dtype torch\.bool"),
    "complex ids": (IDS * 1j, TypeError, r"must be integers\. Found dtype torch\.complex64"),
    "a list of floats": ([0.0, 1.0], TypeError, r"`task_ids` must be indices or names of tasks\. Found 0\.0"),
    "a list of booleans": ([True, False], TypeError, r"must be indices or names of tasks\. Found True"),
    "one name": ("012", TypeError, r"must be a tensor of indices or a list of names\. Found str"),
    "a number": (3, TypeError, r"must be a tensor of indices or a list of names\. Found int"),
    "a set": ({0, 1}, TypeError, r"must be a tensor of indices or a list of names\. Found set"),
    "none": (None, TypeError, r"must be a tensor of indices or a list of names\. Found NoneType"),
}


@pytest.mark.parametrize("what", WRONG_IDS)
def test_wrong_task_ids(what):
    ids, error, message = WRONG_IDS[what]
    model, opt = made()
    with pytest.raises(error, match=message), opt.split(ids):
        pass
    backward(opt, model)  # nothing is left behind
    opt.step()


def test_a_wrong_reduction():
    with (
        pytest.raises(ValueError, match=r"`reduction` must be 'mean' or 'sum'\. Found 'none'"),
        made()[1].split(IDS, reduction="none"),
    ):
        pass


def test_tasks_that_are_not_known():
    with (
        pytest.raises(
            ValueError, match=r"needs to know the tasks: make the optimizer with tasks=\[\.\.\.\], their names or number"
        ),
        made(tasks=None)[1].split(IDS),
    ):
        pass


WRONG_LOSSES = {
    "too few": (
        lambda losses: losses[1:],
        ValueError,
        r"one entry for each of the 8 samples .* Found shape \(7,\).*reduction='none'",
    ),
    "the other dimension": (
        lambda losses: losses.expand(3, 8),
        ValueError,
        r"along dimension 0\. Found shape \(3, 8\).* reshape them to \(8, \.\.\.\)",
    ),
    "reduced": (lambda losses: losses.mean(), ValueError, r"one entry for each of the 8 samples .* Found shape \(\)"),
    "no elements": (
        lambda losses: losses[:, None].expand(8, 0),
        ValueError,
        r"`losses` has no elements\. Found shape \(8, 0\)",
    ),
    "detached": (
        lambda losses: losses.detach(),
        ValueError,
        r"losses have no graph .*detached, or computed under torch\.no_grad",
    ),
    "a mapping": (
        lambda losses: by_task(losses, IDS),
        TypeError,
        r"After split\(\), `losses` must be a tensor .* Found dict\..* without split\(\)",
    ),
    "a list": (list, TypeError, r"one loss for each sample \(reduction='none'\)\. Found list"),
}


@pytest.mark.parametrize("what", WRONG_LOSSES)
def test_wrong_losses(what):
    change, error, message = WRONG_LOSSES[what]
    model, opt = made()
    with opt.split(IDS):
        losses = errors(model, *batch(), IDS).mean(1)
    with pytest.raises(error, match=message):
        opt.backward(change(losses))
    assert not opt.due
    backward(opt, model)
    opt.step()


def test_split_twice():
    model, opt = made()
    with opt.split(IDS):
        pass
    with (
        pytest.raises(
            ValueError, match=r"split\(\) again, before the losses .* backward\(losses\) .* zero_grad\(\) to forget"
        ),
        opt.split(IDS),
    ):
        pass
    opt.zero_grad()
    backward(opt, model)
    opt.step()


def test_an_exception_inside_the_block_forgets_the_split():
    model, opt = made()
    with pytest.raises(ZeroDivisionError), opt.split(IDS):
        1 / 0  # noqa: B018
    opt.backward(by_task(errors(model, *batch()), IDS))
    opt.step()
    backward(opt, model)
    opt.step()


def test_losses_that_reach_nothing():
    model, opt = made()
    other = network()
    with opt.split(IDS):
        losses = errors(other, *batch()).mean(1)
    with pytest.raises(ValueError, match=r"reach none of the optimizer's trainable parameters.* another model.* frozen"):
        opt.backward(losses)
    assert not opt.due
    model.requires_grad_(False)
    with opt.split(IDS):
        losses = errors(nn.Sequential(model, nn.Linear(3, 3)), *batch()).mean(1)
    with pytest.raises(ValueError, match="reach none of the optimizer's trainable parameters"):
        opt.backward(losses)


# --- Samples that interact --------------------------------------------------------------------------------------------


def interacting(function):
    return lambda: Net(function, first=nn.Linear(4, 3))


INTERACTIONS = {
    "batch norm": (
        lambda: Net(lambda m, x: m.norm(m.first(x)), first=nn.Linear(4, 3), norm=nn.BatchNorm1d(3)),
        r"at operation NativeBatchNorm, on the way to parameter 'first\.weight': batch normalisation in training mode "
        r"mixes the samples .*Remedy: put these layers into evaluation mode .* GroupNorm or LayerNorm",
    ),
    "mean": (
        interacting(lambda m, x: m.first(x) - m.first(x).mean(0)),
        None,
    ),
    "centred": (
        interacting(lambda m, x: (lambda h: h - h.mean(0))(m.first(x))),
        r"samples that do not interact, but at operation Addmm, on the way to parameter 'first\.weight': elements of its "
        r"result are used by samples of several tasks.*Remedy: compute one loss per task.*mapping, without split\(\)",
    ),
    "softmax beside": (
        interacting(lambda m, x: (lambda h: h * h.softmax(0))(m.first(x))),
        r"at operation Addmm, on the way to parameter 'first\.weight': elements of its result are used by samples",
    ),
    "two orders": (
        interacting(lambda m, x: (lambda h: h + h.flip(0))(m.first(x))),
        r"at operation Addmm, on the way to parameter 'first\.weight': elements of its result are used by samples",
    ),
    "a statistic of the batch": (
        interacting(lambda m, x: (lambda h: (h / h.norm()).exp())(m.first(x).tanh())),
        r"at operation Tanh, on the way to parameter 'first\.weight'",
    ),
    "softmax": (interacting(lambda m, x: m.first(x).softmax(0)), None),
    "similarities": (interacting(lambda m, x: m.first(x) @ m.first(x).T), None),
}


@pytest.mark.parametrize("what", [what for what, (_, message) in INTERACTIONS.items() if message])
def test_samples_that_interact(what):
    make, message = INTERACTIONS[what]
    model, opt = made(model=make())
    with opt.split(IDS):
        losses = model(batch()[0]).square()
    with pytest.raises(ValueError, match=message):
        opt.backward(losses)
    assert not opt.due
    assert all(not rows.of for rows in opt._surgery.gradients.rows)
    with opt.split(IDS):
        losses = model.first(batch()[0]).square()
    opt.backward(losses)
    opt.step()


@pytest.mark.parametrize("what", [what for what, (_, message) in INTERACTIONS.items() if not message])
def test_samples_that_interact_and_can_be_told_apart(what):
    model, opt = made(gs.Sum(), model=INTERACTIONS[what][0]())
    with opt.split(IDS):
        losses = model(batch()[0]).square().mean(1)
    expected = task_gradients(by_task(losses, IDS), dict(model.named_parameters()))
    opt.backward(losses)
    held = opt._surgery.gradients
    for name, rows in zip(held.names, held.rows, strict=True):
        for task, row in rows.of.items():
            torch.testing.assert_close(row, expected[str(task)][name])


def test_batch_norm_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    _, opt = made(gs.Sum(), model=model)
    model[1].eval()
    losses = backward(opt, model, retain_graph=True)
    check_close(gradients(opt), torch.autograd.grad(sum(by_task(losses, IDS).values()), list(model.parameters())))


def test_an_error_on_the_way_leaves_nothing_behind():
    model, opt = made(gs.GradVac(beta=0.3))
    plain = copy.deepcopy(model)
    _, other = made(gs.GradVac(beta=0.3), model=plain)
    backward(opt, model, 3)
    with opt.split(IDS):
        hidden = model[:3](batch(3)[0])
        losses = model[3:](hidden).square().mean(1)
    hidden.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.backward(losses)
    assert not opt.due
    assert all(not rows.of for rows in opt._surgery.gradients.rows)
    for both, net in ((opt, model), (other, plain)):
        backward(both, net)
        both.step()
    check_same(model, plain)


# --- The check against a plain backward pass --------------------------------------------------------------------------


def swapped(*args):
    return products(*args).flip(0)


def scaled(*args):
    return products(*args) * 1.01


products = cuts.products


@pytest.mark.parametrize("wrong", [swapped, scaled])
def test_a_wrong_gradient_is_found(wrong, monkeypatch):
    model, opt = made()
    monkeypatch.setattr(cuts, "products", wrong)
    for _ in range(2):  # until it has once agreed
        with pytest.raises(
            RuntimeError,
            match=r"not those of a plain backward pass: .*0\.weight.*5\.weight.* \(at worst '\d\.weight', by .*report this",
        ):
            backward(opt, model)
        assert not opt.due
    monkeypatch.undo()
    backward(opt, model)
    opt.step()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_wrong_nan_is_found(monkeypatch):
    model, opt = made()
    monkeypatch.setattr(cuts, "products", lambda *args: products(*args) * torch.nan)
    with pytest.raises(RuntimeError, match="not those of a plain backward pass"):
        backward(opt, model)


@pytest.mark.parametrize("wrong", [swapped, scaled])
def test_verify_false(wrong, monkeypatch):
    model, opt = made(verify=False)
    monkeypatch.setattr(cuts, "products", wrong)
    monkeypatch.setattr(Pass, "verify", None)
    backward(opt, model)
    opt.step()


def test_the_check_runs_once(monkeypatch):
    calls = []
    plain = Pass.verify
    monkeypatch.setattr(Pass, "verify", lambda *args: calls.append(1) or plain(*args))
    model, opt = made()
    for step in range(3):
        backward(opt, model, step)
        opt.step()
        opt.zero_grad()
    assert calls == [1]


def test_the_check_waits_for_a_step_that_begins_with_a_split(monkeypatch):
    calls = []
    monkeypatch.setattr(Pass, "verify", lambda *args: calls.append(1))
    model, opt = made()
    opt.backward(by_task(errors(model, *batch()), IDS))
    backward(opt, model)
    opt.step()
    assert not calls
    opt.zero_grad()
    backward(opt, model)
    assert calls


def test_the_check_under_a_scaler():
    model, opt = made(gs.Sum())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    backward(opt, model, scaler=scaler)
    opt.combine()
    assert opt.last is not None


# --- Faults that there once were --------------------------------------------------------------------------------------


def each_task_apart(function):
    """A function of the rows of each task, called once for each."""

    def forward(m, x):
        shared = function(m)
        return torch.cat([shared(x[k == IDS]) for k in range(3)])[IDS.argsort(stable=True).argsort()]

    return forward


def autocast(function):
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return function(m, x.float()).float()

    return forward


def picked_twice(m, x):
    hidden = m.first(x)
    return hidden + hidden[[0, *range(8)]][1:]


def refined(m, x):
    """Samples of some tasks go through another layer."""
    hidden, some = m.first(x), IDS < 2
    return hidden.masked_scatter(some[:, None], m.second(hidden[some]))


def linear():
    return {"first": nn.Linear(4, 3)}


FAULTS = {
    "a number times [B]": lambda: Net(lambda m, x: x[:, 0] * m.scale, scale=()),
    "all but the last rows": lambda: Net(lambda m, x: torch.cat([m.first(x)[:-2], m.first(x[-2:])]), **linear()),
    "the last step": lambda: Net(lambda m, x: m.first(x[:, None].expand(-1, 3, -1))[:, -1:], **linear()),
    "one row of an embedding at a time": lambda: Net(lambda m, x: torch.stack([m.e(k) for k in IDS]), e=nn.Embedding(3, 4)),
    "a weight that is computed once, and used for each task": lambda: Net(
        each_task_apart(lambda m: (lambda w: lambda x: x @ w)(m.w.exp())), w=(4, 3)
    ),
    "autocast, and a layer that is used for each task": lambda: Net(
        autocast(each_task_apart(lambda m: m.first)), **linear()
    ).float(),
    "a row that is picked twice, and used once": lambda: Net(picked_twice, **linear()),
    "a layer for some of the tasks": lambda: Net(refined, **linear(), second=nn.Linear(3, 3)),
    "layer norm over the samples": lambda: Net(lambda m, x: nn.functional.layer_norm(m.first(x).T, (8,)).T, **linear()),
}


@pytest.mark.parametrize("what", FAULTS)
def test_what_once_was_wrong(what):
    gs.testing.check_split(FAULTS[what](), torch.randn(8, 4), IDS)


@pytest.mark.parametrize("norm", [nn.LayerNorm, lambda n: nn.GroupNorm(2, n)], ids=["layer", "group"])
def test_a_norm_of_a_parameter_when_one_task_is_there(norm):
    model = Net(lambda m, x: x + m.norm(m.position), position=(1, 4), norm=norm(4))
    gs.testing.check_split(model, torch.randn(8, 4), [1] * 8)


def overwritten(m, x):
    """A gradient that arrives nowhere, at operations that no rule knows."""
    hidden = torch.special.i0(m.first(x))
    hidden[:] = m.scale
    return hidden


def two_places(m, x):
    """What is computed of a table, looked up twice, at places that tasks do not share."""
    table = m.table.tanh()
    return table[2 * IDS] * table[2 * (IDS + 1) % 6]


def selected(m, x):
    """One task's samples, by an operation that no rule knows."""
    hidden = m.first(x)
    return hidden.tanh().index_put((IDS == 0,), m.second(hidden.masked_select((IDS == 0)[:, None]).view(-1, 3)))


def a_row_in_place(m, x):
    hidden = m.first(x)
    hidden[0] *= m.scale
    return hidden


MENDED = {
    "overwritten": lambda: Net(overwritten, **linear(), scale=(3,)),
    "selected": lambda: Net(selected, **linear(), second=nn.Linear(3, 3)),
    "a row in place": lambda: Net(a_row_in_place, **linear(), scale=(3,)),
}


@pytest.mark.parametrize("what", MENDED)
def test_operations_that_no_rule_knows(what):
    gs.testing.check_split(MENDED[what](), torch.randn(8, 4), IDS)


def test_a_computed_table_whose_rows_belong_to_several_tasks_is_refused():
    with pytest.raises(ValueError, match="at operation Tanh, on the way to parameter 'table'"):
        gs.testing.check_split(Net(two_places, table=(6, 3)), torch.randn(8, 4), IDS)


def test_a_task_id_of_more_than_32_bits():
    with pytest.raises(ValueError, match=r"`task_ids` must be indices of the 3 tasks"), made()[1].split([2**40]):
        pass


def test_check_split_where_all_gradients_should_be_zero(monkeypatch):
    monkeypatch.setattr(cuts, "products", lambda *args: products(*args) + 1)
    with pytest.raises(AssertionError, match=r"wrong for '0.weight'"):
        gs.testing.check_split(network(), torch.randn(8, 4), IDS, loss=lambda out: out * 0)


@pytest.mark.parametrize("ids", [[1] * 8, [0, 1] * 4])
def test_a_parameter_of_the_batch_s_shape_that_is_used_twice(ids):
    model = Net(lambda m, x: (m.first(x) + m.offset) * 2 + m.offset + m.offset, **linear(), offset=(8, 3))
    gs.testing.check_split(model, torch.randn(8, 4), ids)
