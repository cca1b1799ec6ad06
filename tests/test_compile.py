"""``torch.compile``: models and losses are compiled, surgery is left out and says so, and nothing of the result changes."""

import copy
import warnings

import pytest
import torch
from conftest import Bent, batch, check_same, wrap
from torch import nn

import gradsurgery as gs
from gradsurgery import _compile

RULE = gs.GradVac(beta=0.3)
LEFT_OUT = "torch.compile leaves gradient surgery as it is"
pytestmark = pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function",  # of PyTorch's own optimizers
)


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()
    _compile._said.clear()


class Counting:
    """A backend that counts the graphs that it gets, and how often they run."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


def pair(**settings):
    model = Bent()
    twin = copy.deepcopy(model)
    make = lambda m: wrap(m, RULE, torch.optim.Adam(m.parameters(), lr=0.01), **settings)  # noqa: E731
    return model, make(model), twin, make(twin)


def train(function, opt, twin, other, steps=4):
    """``function`` on one model, the same uncompiled on its twin."""
    for number in range(steps):
        function(batch(number))
        other.backward(twin.losses(batch(number)))
        other.step()
        other.zero_grad()


def check_close(model, twin):
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_compiled_losses():
    model, opt, twin, other = pair()
    compiled = torch.compile(model.losses, backend="aot_eager", fullgraph=True)

    def step(x):
        opt.backward(compiled(x))
        opt.step()
        opt.zero_grad()

    train(step, opt, twin, other)
    check_close(model, twin)


@pytest.mark.parametrize("what", ["step", "joint loss", "optimizer's step", "combine"])
def test_surgery_in_compiled_code_is_left_out_and_says_so_once(what):
    model, opt, twin, other = pair(groups="tensor")
    backend = Counting()

    def everything(x):
        opt.backward(model.losses(x))
        opt.step()
        opt.zero_grad()

    def forward(x):
        return opt.joint_loss(model.losses(x))

    parts = {"step": everything, "joint loss": forward, "optimizer's step": opt.step, "combine": opt.combine}
    compiled = torch.compile(parts[what], backend=backend)

    def step(x):
        if what == "step":
            compiled(x)
            return
        if what == "joint loss":
            compiled(x).backward()
        else:
            opt.backward(model.losses(x))
            compiled()
        if what != "optimizer's step":
            opt.step()
        opt.zero_grad()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(step, opt, twin, other)
    assert len([warning for warning in said if LEFT_OUT in str(warning.message)]) == 1
    check_close(model, twin)
    assert torch.equal(opt.last.active, other.last.active)
    # The losses and the inner optimizer's step, which Dynamo may compile once more when its state has been made.
    assert backend.graphs <= {"step": 4, "joint loss": 1, "optimizer's step": 3, "combine": 0}[what]


def test_fullgraph_is_an_error_that_says_why():
    model, opt, *_ = pair()
    compiled = torch.compile(opt.joint_loss, backend="eager", fullgraph=True)
    losses = model.losses(batch())
    with pytest.raises(Exception, match="gradient surgery is not compiled"):
        compiled(losses)


IDS = torch.tensor([0, 1, 2, 0, 1, 2, 2, 0])


@pytest.mark.parametrize("way", ["wrapped", "in place", "a part"])
def test_mixed_batches_run_uncompiled_and_say_so_once(way):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    twin = copy.deepcopy(model)
    backend = Counting()
    if way == "wrapped":
        called = torch.compile(model, backend=backend)
    else:
        called = model
        (model if way == "in place" else model[2]).compile(backend=backend)
    opt, other = wrap(called, RULE, tasks=3), wrap(twin, RULE, tasks=3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number in range(3):
            for o, m in ((opt, called), (other, twin)):
                with o.split(IDS):
                    losses = m(batch(number)).square()
                o.backward(losses)
                o.step()
                o.zero_grad()
    assert ["Inside split(), compiled models run as they are" in str(warning.message) for warning in said] == [True]
    check_same(model, twin)
    assert backend.runs == 0
    called(batch())  # outside, it is compiled
    assert backend.runs == 1


def test_a_split_inside_compiled_code():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    twin = copy.deepcopy(model)
    opt, other = wrap(model, RULE, tasks=3), wrap(twin, RULE, tasks=3)

    def step(x, model=model, opt=opt):
        with opt.split(IDS):
            losses = model(x).square()
        opt.backward(losses)
        opt.step()
        opt.zero_grad()

    compiled = torch.compile(step, backend="aot_eager")
    with pytest.warns(UserWarning, match=LEFT_OUT):
        compiled(batch())
    step(batch(), twin, other)
    for number in range(1, 3):
        compiled(batch(number))
        step(batch(number), twin, other)
    check_close(model, twin)
