"""Several processes against one on all of their samples."""

import pytest
import torch
from conftest import TASKS
from torch import nn

import gradsurgery as gs

pytestmark = pytest.mark.distributed

STEPS = 20
RULES = {
    "sum": gs.Sum(),
    "mean": gs.Mean(),
    "pcgrad": gs.PCGrad(),
    "gradvac": gs.GradVac(beta=0.1),
    "mgda": gs.MGDA(),
    "chain": gs.Chain(gs.PCGrad(), gs.GradVac(beta=0.1, tasks=("a", "b")), gs.Mean()),
}
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}


class Mixed(nn.Module):
    """A batch of samples of three tasks: symbols and numbers go through a trunk, and each task reads off its own output."""

    def __init__(self, sparse=False):
        super().__init__()
        self.embedding = nn.Embedding(12, 4, sparse=sparse)
        self.trunk = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 5))
        self.rest = nn.Linear(5, 3)

    def forward(self, x, symbols):
        return self.rest(torch.tanh(self.trunk(x + self.embedding(symbols))))

    def losses(self, x, symbols, task_ids):
        out = self(x, symbols)
        wanted = torch.stack([x.sum(1), -2 * x[:, 0], x[:, 1] - 3], 1)
        own = torch.nn.functional.one_hot(task_ids, 3).to(x)
        return (out - wanted).square() * (own + 0.1)  # [B, 3]


def samples(step, sizes, dtype):
    """Inputs, symbols and tasks of all ranks' samples. Rank 0 never has the third task, and not all have the second."""
    generator = torch.Generator().manual_seed(step)
    parts = []
    for rank, size in enumerate(sizes):
        x = torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype)
        symbols = torch.randint(12, (size,), generator=generator)
        task_ids = torch.randint(3, (size,), generator=generator)
        if rank == 0:
            task_ids[task_ids == 2] = 0
        if rank == 1 + step % 2:
            task_ids[task_ids == 1] = 2
        parts.append((x, symbols, task_ids))
    return parts


def joined(parts):
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def new(kind, dtype, **settings):
    torch.manual_seed(3)
    model = kind().to(dtype)
    settings = {"groups": "layer", "tasks": TASKS, **settings}
    rule = settings.pop("rule")
    inner = settings.pop("inner", lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.5))(model.parameters())
    wrapper = settings.pop("wrap", lambda model: model)
    wrapped = wrapper(model)
    return wrapped, gs.SurgeryOptimizer(inner, rule, model=wrapped, **settings)


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def step_mixed(model, opt, part, **settings):
    x, symbols, task_ids = part
    with opt.split(task_ids, **settings):
        losses = getattr(model, "module", model).losses(x, symbols, task_ids)
    opt.backward(losses)


def task_losses(model, part):
    """One loss for each task that is there, and how many samples it is the mean of."""
    x, symbols, task_ids = part
    losses = getattr(model, "module", model).losses(x, symbols, task_ids)
    found = {task: losses[task_ids == k] for k, task in enumerate(TASKS) if (task_ids == k).any()}
    return {task: own.mean() for task, own in found.items()}, {task: len(own) for task, own in found.items()}


def step_tasks(model, opt, part):
    losses, counts = task_losses(model, part)
    opt.backward(losses, samples=counts)


SOURCES = {"mixed": step_mixed, "tasks": step_tasks}


def gradients(model):
    return [None if p.grad is None else p.grad.to_dense().clone() for p in model.parameters()]


def equal(ours, theirs):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def compare(found, expected, close):
    for ours, theirs in zip(found, expected, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
        else:
            error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
            assert error <= close, float(error)


def run(rank, sizes, dtype, source, settings, steps=STEPS, accumulate=1):
    """Parameters after training, whether gradients were equal on all ranks, and the last losses."""
    model, opt = new(Mixed, dtype, **settings)
    same = []
    for step in range(steps):
        for micro in range(accumulate):
            SOURCES[source](model, opt, samples(step * accumulate + micro, sizes, dtype)[rank])
        opt.combine()
        same.append(gradients(model))
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in model.parameters()], same, opt.last.losses, opt.rule_state


def alone(sizes, dtype, source, settings, steps=STEPS, accumulate=1):
    """The same on one process, with all samples."""
    settings = {k: v for k, v in settings.items() if k not in ("process_group", "wrap", "check_ranks")}
    model, opt = new(Mixed, dtype, **settings)
    for step in range(steps):
        for micro in range(accumulate):
            SOURCES[source](model, opt, joined(samples(step * accumulate + micro, sizes, dtype)))
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in model.parameters()], None, opt.last.losses, opt.rule_state


SIZES = {2: (5, 8), 4: (6, 3, 9, 1)}


def check_run(ranks, count, dtype, source, close=None, **settings):
    steps = {k: settings.pop(k) for k in ("steps", "accumulate") if k in settings}
    expected = alone(SIZES[count], dtype, source, settings, **steps)
    results = ranks(count, run_with, SIZES[count], dtype, source, settings, steps)
    for parameters, grads, losses, state in results:
        compare(parameters, expected[0], close or CLOSE[dtype])
        torch.testing.assert_close(losses, expected[2], rtol=10 * CLOSE[dtype], atol=0, equal_nan=True)
        assert all(equal(a, b) for a, b in zip(grads, results[0][1], strict=True))
        assert str(state) == str(results[0][3])


def run_with(rank, sizes, dtype, source, settings, steps):
    return run(rank, sizes, dtype, source, settings, **steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rule", RULES)
def test_ranks_do_as_one_process_on_all_samples(ranks, rule, source, count, dtype):
    check_run(ranks, count, dtype, source, rule=RULES[rule], process_group=True, check_ranks=True)
