"""Small models that several test files share, and the naive computations that they are compared with."""

import sys

import pytest
import torch
from ranks import Ranks
from torch import nn

import gradsurgery as gs

torch.set_num_threads(1)  # the models are tiny, and threads wait for each other where other programs run

collect_ignore = ["mutants.py"]  # a program, which needs more packages than the tests do

TASKS = ("a", "b", "c")


def pytest_collection_modifyitems(config, items):
    """What needs several processes runs in one worker: they are started once, and do not wait for each other's cores."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.get_closest_marker("distributed"):
                item.add_marker(pytest.mark.xdist_group("distributed"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks():
    """Runs a function on several processes: ``ranks(2, function, *arguments)``."""
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture(autouse=True)
def _no_accelerator():
    """An Accelerator keeps its settings in the class, for the Trainer of Transformers too."""
    yield
    if "accelerate" in sys.modules:
        forget_accelerator()


def forget_accelerator():
    """As in a new process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Heads(nn.Module):
    """A trunk that all three tasks share, an adapter that only ``a`` and ``b`` reach, and a head for each task."""

    def __init__(self, tasks=TASKS):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
        self.adapter = nn.Linear(5, 5)
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in tasks})

    def losses(self, x):
        hidden = self.trunk(x)
        result = {}
        for k, (task, head) in enumerate(self.heads.items()):
            features = torch.tanh(self.adapter(hidden)) if task in ("a", "b") else hidden
            result[task] = (head(features)[:, 0] - (-1) ** k * (k + 1) * x.sum(1)).square().mean()
        return result


class Bent(nn.Module):
    """Every parameter is shared: the outputs of one small network are pulled in as many directions as there are tasks."""

    def __init__(self, tasks=TASKS):
        super().__init__()
        self.tasks = tasks
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, len(tasks)))

    def losses(self, x):
        out = self.layers(x)
        return {task: (out.sum(1) + k * out[:, k] - 2 * k + 1).square().mean() for k, task in enumerate(self.tasks)}


def batch(step=0):
    """Inputs of both models."""
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def pcgrad(a, b):
    """PCGrad's combined gradient of two tasks, line by line."""
    product = a @ b
    if product >= 0:
        return a + b
    return a - product / (b @ b) * b + b - product / (a @ a) * a


def wrap(model, rule, optimizer=None, **settings):
    """The optimizer wrapper around SGD, unless another optimizer is given."""
    return gs.SurgeryOptimizer(optimizer or torch.optim.SGD(model.parameters(), lr=0.1), rule, model=model, **settings)


def task_gradients(losses, parameters):
    """Task → name → gradient or None, by one ``torch.autograd.grad`` per loss."""
    tensors = list(parameters.values())
    return {
        task: dict(zip(parameters, torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True), strict=True))
        for task, loss in losses.items()
    }


def combined(gradients, group_of, rule):
    """Name → what should be in ``p.grad``, on concatenated vectors.

    Within a surgery group, parameters that the same tasks reach are operated on together. A parameter that one task alone
    reaches has that task's gradient, one that none reaches has None.
    """
    names = list(next(iter(gradients.values())))
    result = dict.fromkeys(names)
    cells = {}
    for name in names:
        reached = tuple(task for task in gradients if gradients[task][name] is not None)
        if len(reached) == 1:
            result[name] = gradients[reached[0]][name]
        elif reached:
            cells.setdefault((group_of(name), reached), []).append(name)
    for (_, reached), members in cells.items():
        jacobian = torch.stack([torch.cat([gradients[t][name].flatten() for name in members]) for t in reached])
        pieces = gs.operate(jacobian, rule).split([gradients[reached[0]][name].numel() for name in members])
        for name, piece in zip(members, pieces, strict=True):
            result[name] = piece.view_as(gradients[reached[0]][name])
    return result


def check_gradients(model, expected, **tolerance):
    """Compares ``p.grad`` of all parameters by name; None only equals None."""
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def check_same(model, other):
    """The parameters of two models are equal, bit for bit."""
    for (name, parameter), (_, twin) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(parameter, twin), name
