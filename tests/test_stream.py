"""Surgery inside the backward pass gives what surgery after it gives, bit for bit, with fewer rows in memory."""

import copy
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import strategies
import torch
from conftest import check_same, wrap
from hypothesis import given
from hypothesis import strategies as st
from oracles import gram
from test_checkpoint import check_equal_trees
from test_laws import every_rule, leaves, quick, situations, some_state
from torch import nn
from torch.nn.utils import parametrizations

import gradsurgery as gs
from gradsurgery._combination import Combination

TASKS = ("a", "b", "c", "d")
RULES = [gs.Sum(), gs.PCGrad(), gs.GradVac(beta=0.3), gs.MGDA(), gs.Chain(gs.PCGrad(), gs.Mean())]
EACH = torch.tensor([0, 1, 2, 3])

# Of all sizes, in any order; some with absent tasks, one with a single task.
BATCHES = [EACH.repeat(3), EACH.repeat(2).flip(0), EACH[[3, 1, 1, 0]], EACH.repeat(2), EACH[[2, 2, 2]], EACH.repeat(4)]


class Everything(nn.Module):
    """An embedding, tied weights, a layer that is used twice, weight norm, an adapter of two tasks, and heads."""

    def __init__(self, words=6):
        super().__init__()
        self.embed = nn.Embedding(words, 4)
        self.body = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
        self.body[3].weight = self.body[1].weight
        self.norm = parametrizations.weight_norm(nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.adapter = nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in TASKS)
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens, ids):
        x = self.embed(tokens).mean(1)
        for layer in [*self.body, self.body[0], self.norm]:
            x = x + layer(x).tanh() * self.scale
        x = x.index_put((ids < 2,), self.adapter(x[ids < 2]))
        return torch.cat([head(x[ids == k]) for k, head in enumerate(self.heads)])[ids.argsort(stable=True).argsort()]


def losses(model, step, ids):
    generator = torch.Generator().manual_seed(step)
    words = model.embed.num_embeddings
    tokens = torch.randint(words, (len(ids), 3), generator=generator)
    return (model(tokens, ids) - (ids[:, None] - 1.5) * torch.randn(len(ids), 2, generator=generator)).square().mean(1)


def made(rule=None, model=None, optimizer=None, **settings):
    model = model or Everything()
    inner = optimizer and optimizer(model.parameters(), lr=0.01)
    return model, wrap(model, rule or gs.PCGrad(), inner, **{"groups": "layer", "tasks": TASKS, **settings})


def pair(rule=None, model=None, optimizer=None, **settings):
    """One that streams, and one that does not."""
    model = model or Everything()
    twin = copy.deepcopy(model)
    return made(rule, model, optimizer, **settings), made(rule, twin, optimizer, stream=False, **settings)


def backward(model, opt, step, ids, **options):
    with opt.split(ids):
        found = losses(model, step, ids)
    opt.backward(found, **options)


def check_same_state(one, other):
    """Everything that a step leaves behind."""
    (model, opt), (twin, plain) = one, other
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad.to_dense(), q.grad.to_dense()), name
        assert p.grad is None or p.grad.layout == q.grad.layout, name
    check_equal_trees(opt.state_dict(), plain.state_dict())
    check_same_step(opt.last, plain.last)


def check_same_step(step, other):
    assert step.tasks == other.tasks
    assert step.groups == other.groups
    for name in ("active", "gram", "mixing"):
        assert torch.equal(getattr(step, name), getattr(other, name)), name
    assert torch.equal(step.losses.nan_to_num(-1), other.losses.nan_to_num(-1))


@pytest.fixture
def adds(monkeypatch):
    """The numbers of parameters of each call of ``Combination.add``; None where all were combined at once."""
    calls = []
    plain = Combination.add

    def add(self, parameters=None):
        calls.append(None if parameters is None else len(parameters))
        plain(self, parameters)

    monkeypatch.setattr(Combination, "add", add)
    return calls


# --- The same, bit for bit --------------------------------------------------------------------------------------------

GROUPS = {
    "layer": "layer",
    "module": "module",
    "tensor": "tensor",
    "mapping": {"ends": ["embed*", "heads*", "adapter*"], "middle": ["body.1*", "body.2*", "scale"]},
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_bit_for_bit(rule, groups, adds):
    one, other = pair(rule, optimizer=torch.optim.AdamW, groups=GROUPS[groups])
    assert one[1].streaming
    for step, ids in enumerate(BATCHES):
        adds.clear()
        for model, opt in (one, other):
            backward(model, opt, step, ids)
            opt.combine()
        assert len(adds) == 2 if step == 0 else len(adds) > 2
        check_same_state(one, other)
        for _, opt in (one, other):
            opt.step()
            opt.zero_grad()
    assert all(p.grad is None for p in one[0].unused.parameters())
    if groups == "mapping":
        assert "ends [a, b]" in one[1].last.groups


MODELS = {
    "a large table": lambda: Everything(words=500),
    "double precision": lambda: Everything().double(),
    "bfloat16": lambda: Everything().bfloat16(),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_models(name):
    one, other = pair(gs.GradVac(beta=0.3), MODELS[name](), groups="module")
    for step, ids in enumerate(BATCHES):
        for model, opt in (one, other):
            backward(model, opt, step, ids)
            opt.step()
        check_same_state(one, other)
        for _, opt in (one, other):
            opt.zero_grad()


@pytest.mark.parametrize("groups", ["layer", "tensor"])
@pytest.mark.parametrize("rule", [gs.PCGrad(), gs.GradVac(beta=0.3)], ids=repr)
def test_passes_that_add_up(rule, groups, adds):
    one, other = pair(rule, groups=groups)
    for step, ids in enumerate(BATCHES):
        adds.clear()
        for model, opt in (one, other):
            backward(model, opt, 10 + step, BATCHES[step - 1])
            backward(model, opt, step, ids)
            opt.step()
        assert (len(adds) > 2) == (step > 0)
        check_same_state(one, other)
        for _, opt in (one, other):
            opt.zero_grad()


def test_a_mapping_before_a_mixed_batch(adds):
    one, other = pair(gs.GradVac(beta=0.3))
    for step, ids in enumerate(BATCHES):
        adds.clear()
        for model, opt in (one, other):
            first = losses(model, 10 + step, EACH)
            opt.backward({task: first[k] for k, task in enumerate(TASKS)})
            backward(model, opt, step, ids)
            opt.step()
        assert (len(adds) > 2) == (step > 0)
        check_same_state(one, other)
        for _, opt in (one, other):
            opt.zero_grad()


def test_a_mapping_after_a_mixed_batch():
    one, other = pair(gs.GradVac(beta=0.3))
    for step, ids in enumerate(BATCHES[:4]):
        for model, opt in (one, other):
            backward(model, opt, step, ids)
            last = losses(model, 10 + step, EACH)
            opt.backward({task: last[k] for k, task in enumerate(TASKS)})
            opt.step()
        check_same_state(one, other)
        for _, opt in (one, other):
            opt.zero_grad()


def test_gradients_add_up_without_zero_grad():
    one, other = pair()
    for step, ids in enumerate(BATCHES):
        for model, opt in (one, other):
            backward(model, opt, step, ids)
            opt.step()
        check_same_state(one, other)


@pytest.mark.parametrize("rule", [gs.PCGrad(), gs.GradVac(beta=0.3)], ids=repr)
def test_a_scaler_and_an_overflow(rule):
    one, other = pair(rule, optimizer=torch.optim.Adam)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    for step, ids in enumerate(BATCHES):
        for (model, opt), scaler in zip((one, other), scalers, strict=True):
            with opt.split(ids):
                found = losses(model, step, ids)
            opt.backward(found * torch.where(ids == 0, torch.inf, 1.0) if step == 3 else found, scaler=scaler)
            opt.combine()
            scaler.step(opt)
            scaler.update()
        check_equal_trees(*[{"state": opt.rule_state, "p": list(model.parameters())} for model, opt in (one, other)])
        check_equal_trees(*[opt.state_dict() for _, opt in (one, other)])
        for _, opt in (one, other):
            opt.zero_grad()
    assert scalers[0].get_scale() == scalers[1].get_scale()


def test_surgery_in_every_other_step():
    one, other = pair(gs.GradVac(beta=0.3), every=2)
    for step, ids in enumerate(BATCHES * 2):
        for model, opt in (one, other):
            backward(model, opt, step, ids)
            opt.step()
        check_same_state(one, other)
        for _, opt in (one, other):
            opt.zero_grad()


def test_frozen_parameters_and_retained_graphs():
    one, other = pair()
    for step, ids in enumerate(BATCHES):
        for model, opt in (one, other):
            model.body[step % 3].requires_grad_(step % 2 == 0)
            backward(model, opt, step, ids, retain_graph=True)
            opt.step()
        check_same_state(one, other)
        for model, opt in (one, other):
            model.requires_grad_(True)
            opt.zero_grad()


def test_a_checkpoint_continues_bit_for_bit():
    one, other = pair(gs.GradVac(beta=0.3), optimizer=torch.optim.AdamW)
    for step, ids in enumerate(BATCHES):
        if step == 3:
            state = copy.deepcopy((one[0].state_dict(), one[1].state_dict()))
            one = made(gs.GradVac(beta=0.3), optimizer=torch.optim.AdamW)
            one[0].load_state_dict(state[0])
            one[1].load_state_dict(state[1])
        for model, opt in (one, other):
            backward(model, opt, step, ids)
            opt.step()
            opt.zero_grad()
    check_same(one[0], other[0])
    check_equal_trees(one[1].state_dict(), other[1].state_dict())


# --- Rows are freed on the way ----------------------------------------------------------------------------------------


def deep(layers=20):
    return nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(layers)])


def deep_step(model, opt, step=0, **options):
    with opt.split(EACH.repeat(2)):
        found = model(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).square().mean(1)
    opt.backward(found, **options)


@pytest.mark.parametrize("groups", ["layer", "tensor"])
def test_few_rows_are_in_memory_at_a_time(groups, monkeypatch):
    model, opt = made(model=deep(), groups=groups)
    total = sum(p.numel() for p in model.parameters())
    live = []
    plain = Combination.add

    def add(self, parameters=None):
        rows = zip(opt._surgery.gradients.rows, opt._surgery.gradients.parameters, strict=True)
        live.append(sum(p.numel() for held, p in rows if held.of) / total)
        plain(self, parameters)

    monkeypatch.setattr(Combination, "add", add)
    for step in range(3):
        live.clear()
        deep_step(model, opt, step)
        assert not any(held.of for held in opt._surgery.gradients.rows) or step == 0
        opt.step()
        opt.zero_grad()
        if step == 0:
            assert live == [1.0]
        else:
            assert len(live) >= 8
            assert max(live) < 0.15


def test_memory_for_rows_is_used_again():
    model, opt = made(model=deep())
    arena = opt._surgery.gradients.arena
    sizes = []
    for step in range(4):
        deep_step(model, opt, step)
        opt.step()
        opt.zero_grad()
        sizes.append(arena._wanted)
    whole = 4 * len(TASKS) * sum(p.numel() for p in model.parameters())
    assert sizes[2] == sizes[3]
    assert 0 < sizes[3] < 0.3 * whole


def test_the_first_step_does_not_stream(adds):
    model, opt = made(model=deep())
    deep_step(model, opt)
    assert not adds
    assert opt.due
    opt.step()
    assert adds == [None]
    deep_step(model, opt, 1)
    assert len(adds) > 2
    assert None not in adds[1:]
    assert not opt.due


def test_not_even_without_the_check(adds):
    model, opt = made(model=deep(), verify=False)
    deep_step(model, opt)
    assert not adds
    opt.step()
    deep_step(model, opt, 1)
    assert len(adds) > 2


def test_gradients_are_there_after_the_backward_pass():
    model, opt = made(model=deep())
    for step in range(2):
        opt.zero_grad()
        deep_step(model, opt, step)
        assert all((p.grad is None) == (step == 0) for p in model.parameters())
        opt.combine()
        grads = [p.grad.clone() for p in model.parameters()]
    last = opt.last
    opt.step()  # combines nothing again
    assert opt.last is last
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))


# --- Whether it streams -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Global(gs.Rule):
    """Looks at all groups."""

    separable: ClassVar[bool] = False

    def mix(self, gram, state, *, active=None, generator=None):
        return torch.eye(gram.shape[-1], dtype=gram.dtype).expand_as(gram) * (1 + (gram.sum() > 0)), state


WHY_NOT = {
    "one group": ({"groups": "model"}, r"one surgery group, which is complete at the end"),
    "nonfinite raise": ({"nonfinite": "raise"}, r"nonfinite='raise' looks at all gradients"),
    "nonfinite skip": ({"nonfinite": "skip"}, r"nonfinite='skip' looks at all gradients"),
    "not separable": ({"rule": Global()}, r"Global\(\) needs all surgery groups at a time"),
    "a chain that is not": (
        {"rule": gs.Chain(gs.PCGrad(), Global())},
        r"Chain\(PCGrad\(weights=None\), Global\(\)\) needs all surgery",
    ),
}


@pytest.mark.parametrize("what", WHY_NOT)
def test_where_it_does_not_stream(what, adds):
    settings, message = WHY_NOT[what]
    model, opt = made(model=deep(), **settings)
    assert not opt.streaming
    assert re.search(message, opt.streaming.why)
    with pytest.raises(ValueError, match=r"`stream` is True, but surgery cannot be streamed: .*" + message):
        made(model=deep(), stream=True, **settings)
    for step in range(3):
        deep_step(model, opt, step)
        opt.step()
        opt.zero_grad()
    assert adds == [None] * 3


def test_streaming_can_be_forbidden_and_demanded(adds):
    model, opt = made(model=deep(), stream=False)
    assert opt.streaming == (False, "stream=False")
    deep_step(model, opt)
    opt.step()
    deep_step(model, opt)
    opt.step()
    assert adds == [None, None]
    assert made(model=deep(), stream=True)[1].streaming == (True, "")
    assert made(model=deep())[1].streaming == (True, "")


def test_a_mapping_does_not_stream(adds):
    model, opt = made()
    for step in range(3):
        found = losses(model, step, EACH)
        opt.backward({task: found[k] for k, task in enumerate(TASKS)})
        opt.step()
    assert adds == [None] * 3


# --- The number of passes ---------------------------------------------------------------------------------------------


def test_one_pass_more_than_ever():
    model, opt = made(model=deep())
    for step in range(2):
        deep_step(model, opt, step)
        opt.step()
        opt.zero_grad()
    deep_step(model, opt)
    before = [p.grad.clone() for p in model.parameters()]
    message = r"backward\(\) once more in a step that had 1 of them at most .* streamed.* stream=False, or call step\(\)"
    with pytest.raises(RuntimeError, match=message):
        deep_step(model, opt, 1)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match=message):
        opt.backward({"a": model(torch.randn(2, 6)).sum()})
    opt.step()
    opt.zero_grad()
    deep_step(model, opt)
    opt.step()


@pytest.mark.parametrize("clear", ["step", "zero_grad", "combine"])
def test_what_ends_a_streamed_step(clear):
    model, opt = made(model=deep())
    deep_step(model, opt)
    opt.step()
    for step in range(3):
        deep_step(model, opt, step)
        getattr(opt, clear)()


def test_fewer_passes_than_ever(adds):
    one, other = pair(gs.GradVac(beta=0.3))
    streamed = []
    for step, passes in enumerate([2, 2, 1, 2, 1, 1, 2]):
        adds.clear()
        for model, opt in (one, other):
            for number in range(passes):
                backward(model, opt, 10 * step + number, BATCHES[number])
            opt.step()
        streamed.append(len(adds) > 2)
        check_same_state(one, other)
        for _, opt in (one, other):
            opt.zero_grad()
    assert streamed == [False, True, False, True, False, False, True]


def failing_step(model, opt):
    with opt.split(EACH.repeat(2)):
        hidden = model[:10](torch.randn(8, 6))
        found = model[10:](hidden).square().mean(1)
    hidden.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.backward(found)


def test_after_an_error_in_a_streamed_pass():
    one, other = pair(gs.GradVac(beta=0.3), deep())
    for model, opt in (one, other):
        for step in range(2):
            deep_step(model, opt, step)
            opt.step()
            opt.zero_grad()
    state = copy.deepcopy(one[1].rule_state)
    failing_step(*one)
    assert not one[1].due
    assert not any(held.of for held in one[1]._surgery.gradients.rows)
    check_equal_trees(one[1].rule_state, state)
    one[1].zero_grad()
    deep_step(*one)
    one[1].step()


@pytest.mark.parametrize("what", ["gradients", "generator"])
def test_an_error_in_a_streamed_pass_changes_nothing(what):
    model, opt = made(model=deep())
    for step in range(2):
        deep_step(model, opt, step)
        opt.step()
        opt.zero_grad()
    random = opt.state_dict()["surgery"]["generator"].clone()
    failing_step(model, opt)
    if what == "gradients":
        assert all(p.grad is None for p in model.parameters())
    else:
        assert torch.equal(opt.state_dict()["surgery"]["generator"], random)


def test_an_error_in_a_streamed_pass_leaves_gradients_that_were_there():
    model, opt = made(model=deep())
    for step in range(2):
        deep_step(model, opt, step)
        opt.step()
        opt.zero_grad()
    for i, p in enumerate(model.parameters()):
        p.grad = torch.ones_like(p).to_sparse() if i % 3 == 0 else torch.ones_like(p)
    before = [p.grad for p in model.parameters()]
    failing_step(model, opt)
    for i, (p, grad) in enumerate(zip(model.parameters(), before, strict=True)):
        assert torch.equal(p.grad.to_dense(), torch.ones_like(p))
        assert p.grad.is_sparse == (i % 3 == 0)
        assert p.grad.is_sparse or p.grad is grad  # where others may look for it, as in a bucket


# --- The law ----------------------------------------------------------------------------------------------------------


@every_rule
@quick
@given(situation=situations(strategies.jacobians, groups=4, max_tasks=4), data=st.data())
def test_separable(rule, situation, data):
    jacobian, _, targets = situation
    groups, tasks = jacobian.shape[:2]
    draw = lambda size: torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))  # noqa: E731
    there = draw(groups * tasks).view(groups, tasks) if data.draw(st.booleans()) else None
    part = draw(groups)
    present = torch.ones(groups, tasks, dtype=torch.bool) if there is None else there
    generator = torch.Generator()

    def mix(active, state):
        everyone = present if active is None else active
        matrix = gram(jacobian) * everyone[:, :, None] * everyone[:, None, :]
        return rule.mix(matrix, state, active=active, generator=generator.manual_seed(1))

    state = some_state(rule, tasks, groups, targets)
    whole, expected = mix(there, state)
    after = generator.get_state()
    first, between = mix(present & part[:, None], state)
    second, found = mix(present & ~part[:, None], between)
    assert torch.equal(torch.where(part[:, None, None], first, second), whole)
    assert torch.equal(generator.get_state(), after)
    expected = dict(leaves(expected))
    for key, value in leaves(found):
        assert torch.equal(value, expected[key])
